"""The benchmark: every case and side runs, results are compared, and one that fails stops nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_sd import presets
from tests import tiny

ROOT = Path(__file__).parents[1]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools/bench.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_sides_are_compared_and_one_that_fails_is_named(tmp_path):
    """KerasCV has no network of that size, and says so in its own way."""
    output = tmp_path / "bench.json"
    case = ("--models", "emoji", "--cases", "text-encoder", "--repeats", "2")
    sides = ("--backends", "tensorflow", "--peers", "keras-cv")
    done = bench(*case, *sides, "--output", str(output))
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    on, off, keras_cv = results["results"][0]["sides"]
    assert (on["xla"], off["xla"], keras_cv["implementation"]) == ("on", "off", "keras-cv")
    assert off["difference"] < 1e-4
    assert off["ratio"] == pytest.approx(off["seconds"] / off["reference_seconds"])
    assert min(on["peak_bytes"], off["peak_bytes"]) > 2**27
    # 16 tokens through 4 blocks of width 192, 4 pictures at a time.
    encoder = json.loads((presets.find("emoji") / "text_encoder/config.json").read_text())
    width, tokens = encoder["hidden_size"], encoder["max_position_embeddings"]
    block = tokens * width * (4 * width + 2 * encoder["intermediate_size"]) + 2 * tokens**2 * width
    multiplications = 4 * encoder["num_hidden_layers"] * block
    assert on["warm"]["multiplications"] == multiplications
    assert off["gflops"] == pytest.approx(2 * multiplications / off["seconds"] / 1e9)
    assert "seconds" not in keras_cv and keras_cv["failed"]
    table = output.with_suffix(".md").read_text()
    assert f"failed: {keras_cv['failed']}" in table and "compiling pays" in table
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    tiny.pipeline().save(folder)
    return folder


@pytest.mark.parametrize(
    "case", ["unet", "vae-encode", "vae-decode", "generation", "training", "training-lora"]
)
def test_case_gives_the_same_by_diffusers(case, model, tmp_path):
    """One start of each side, without turns."""
    spec = {"case": case, "folder": str(model), "size": 16, "batch": 2, "steps": 2}
    results = {}
    for implementation in ("tensorflow", "diffusers"):
        result = tmp_path / f"{implementation}.npy"
        side = {"implementation": implementation, "xla": "off", "precision": "float32", "result": str(result)}
        done = subprocess.run(
            [sys.executable, "-m", "benchmark.worker", json.dumps(spec | side)],
            input="\n",
            capture_output=True,
            text=True,
            cwd=ROOT / "tools",
        )
        assert done.returncode == 0, done.stderr
        ready, call, end = map(json.loads, done.stdout.splitlines())
        assert ready["first_call_seconds"] > 0 and call["seconds"] > 0 and end["peak_bytes"] > 0
        results[implementation] = np.load(result)
    expected = results["diffusers"]
    tolerance = 8 / 255 if case == "generation" else 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(results["tensorflow"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--models", "sd3"), "sd3"),
        (("--cases", "unets"), "unets"),
        (("--size", "100"), "--size 100: no multiple of 64; use 64"),
        (("--backends", ""), "--backends: nothing to measure"),
        (("--output", "bench.txt"), "bench.txt"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, line):
    done = bench(*arguments)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
