"""The benchmark: every case and side runs, results are compared, and one that fails stops nothing."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_sd import presets
from keras_sd.errors import run_command
from tests import tiny
from tests.reference import run_reference

ROOT = Path(__file__).parents[1]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools/bench.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_sides_are_compared_and_one_that_fails_is_named(tmp_path):
    """KerasCV has no network of that size."""
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
    assert "seconds" not in keras_cv and "KerasCV has no network" in keras_cv["failed"]
    table = output.with_suffix(".md").read_text()
    assert f"failed: {keras_cv['failed']}" in table and "compiling pays" in table
    assert output.with_suffix(".png").stat().st_size > 10_000


CASES = ["unet", "vae-encode", "vae-decode", "generation", "training", "training-lora"]

BY_DIFFUSERS = """
    import io
    import json
    import numpy as np

    specs = json.loads((folder / "specs.json").read_text())
    sys.path.insert(0, specs.pop("tools"))
    from benchmark import worker

    torch.set_grad_enabled(True)
    answers = {}
    for case, spec in specs.items():
        sys.stdin = io.StringIO("\\n")
        worker.serve(spec, answers.setdefault(case, []).append)
        outputs[case] = torch.from_numpy(np.load(spec["result"]))
    (folder / "answers.json").write_text(json.dumps(answers))
"""


def check_answers(answers):
    """What one start, one line of input and its end are answered with."""
    ready, call, end = answers
    assert ready["first_call_seconds"] > 0 and call["seconds"] > 0 and end["peak_bytes"] > 0


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """One start of each case, without turns, to which an implementation and a file are still to be added."""
    model = tmp_path_factory.mktemp("bench")
    tiny.pipeline().save(model)
    spec = {"folder": str(model), "size": 16, "batch": 2, "steps": 2, "xla": "off", "precision": "float32"}
    return {case: spec | {"case": case} for case in CASES}


@pytest.fixture(scope="module")
def by_diffusers(specs, tmp_path_factory):
    """The results of all cases."""
    folder = tmp_path_factory.mktemp("diffusers")
    own = {
        case: spec | {"implementation": "diffusers", "result": str(folder / f"{case}.npy")}
        for case, spec in specs.items()
    }
    (folder / "specs.json").write_text(json.dumps(own | {"tools": str(ROOT / "tools")}))
    results = run_reference(BY_DIFFUSERS, {}, folder)
    for answers in json.loads((folder / "answers.json").read_text()).values():
        check_answers(answers)
    return results


@pytest.mark.parametrize("case", CASES)
def test_case_gives_the_same_by_diffusers(case, specs, by_diffusers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmark import worker

    result, answers = tmp_path / "tensorflow.npy", []
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    worker.serve(specs[case] | {"implementation": "tensorflow", "result": str(result)}, answers.append)
    check_answers(answers)
    expected = by_diffusers[case]
    tolerance = 8 / 255 if case == "generation" else 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(np.load(result), expected, rtol=0, atol=tolerance)


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
def test_bad_input_ends_in_one_line(arguments, line, run_program, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import bench as program

    code, _, errors = run_program(lambda: run_command(program.bench, "bench.py"), *arguments)
    assert code == 2
    assert line in errors.splitlines()[-1]
