"""The script of `make test-gpu`, on JAX's CPU with a tiny model: every part runs and is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400  # of a few milliseconds: the run that is killed after 20 must not be at its end by then


def script(folder, *arguments):
    command = [sys.executable, ROOT / "tools" / "test_gpu.py", "--folder", folder / "work"]
    command += ["--output", folder / "figures.jsonl", "--model", "emoji", "--size", 64, *arguments]
    # As from a shell: what is tested sets its own backend.
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    options = ("--steps", STEPS, "--mixed-precision", "no", "--model", folder / "model")
    done = script(folder, "--parts", "lora,resume", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = map(json.loads, (folder / "figures.jsonl").read_text().splitlines())
    return {line["part"]: line for line in lines}


def test_figures_are_written_for_each_part(figures):
    assert list(figures) == ["machine", "inputs", "lora", "resume"]
    assert figures["machine"]["packages"]["jax"] and figures["inputs"]["images"] == "photographs"
    for name in ("lora", "resume"):
        part = figures[name]
        assert part["passed"] and part["exit_code"] == 0 and part["last_step"] == STEPS
        assert part["images_per_second"] > 0 and 0 < part["seconds_to_first_step"] < part["seconds"]
        assert part["device"] and part["peak_host_bytes"] > 2**27


def test_nothing_of_tensorflow_is_imported(figures):
    assert not figures["lora"]["imported_tensorflow"]


def test_a_killed_run_goes_on_as_the_unbroken_one(figures):
    assert figures["resume"]["killed"] and figures["resume"]["largest_loss_difference"] == 0


def test_part_that_fails_is_named(tmp_path):
    done = script(tmp_path, "--parts", "checkpointing", "--steps", 11, "--model", "unheard")
    assert done.returncode == 1
    line = json.loads((tmp_path / "figures.jsonl").read_text().splitlines()[-1])
    assert not line["passed"] and line["exit_code"] == 2 and "unheard" in line["log"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--parts", "lora,vae"), "--parts vae"), (("--parts", "resume", "--steps", 20), "--steps 20")],
)
def test_bad_input_is_one_line(tmp_path, arguments, told):
    done = script(tmp_path, *arguments)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1]
