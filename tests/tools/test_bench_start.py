"""The benchmark of starts: real processes, their phases, and caches that the first one fills."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_row_is_measured_in_turns(tmp_path):
    output = tmp_path / "starts.json"
    options = ("--rows", "generate-phases", "--backends", "jax", "--rounds", "1", "--output", str(output))
    done = subprocess.run(
        [sys.executable, ROOT / "tools/bench_start.py", *options], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    ours, peer = row["sides"]
    assert (ours["side"], peer["side"]) == ("keras_sd, JAX", "diffusers")
    for side in (ours, peer):
        assert list(side["phases"]) == ["import", "open", "first image"] and min(side["phases"].values()) > 0
        assert sum(side["phases"].values()) < side["runs"][1]["seconds"] * 1.001
        assert side["median"]["peak_gigabytes"] > 0.2
    # The second process finds what the first one has kept.
    assert ours["cache_bytes"] > 2**17 > peer["cache_bytes"]
    assert ours["median"]["seconds"] < ours["first"]["seconds"]
    ratio = ours["median"]["seconds"] / peer["median"]["seconds"]
    assert f"| {ratio:.2f} × |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_a_side_that_fails_is_named(tmp_path):
    """No model of this name has folders of parts."""
    broken, output = tmp_path / "weights/sd15", tmp_path / "starts.json"
    broken.mkdir(parents=True)
    options = ("--rows", "opening", "--backends", "jax", "--rounds", "1", "--output", str(output))
    done = subprocess.run(
        [sys.executable, ROOT / "tools/bench_start.py", *options, "--weights-dir", str(broken.parent)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert [side["failed"].startswith("open: not reached") for side in row["sides"]] == [True, True]
    assert "failed: open: not reached" in output.with_suffix(".md").read_text()
