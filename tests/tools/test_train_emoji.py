"""The script that trains the bundled models: its commands are those of the training programs."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from keras_sd.cli.train.main import train

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments, folder):
    command = [sys.executable, ROOT / "tools" / "train_emoji.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder
    )


def test_commands_are_those_of_the_programs(tmp_path):
    done = script("--list", "--output-dir", "a b", "--", "--no-jit-compile", folder=tmp_path)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["python", "-m", "keras_sd.train"]] * 6
    for line in lines:
        name, command, arguments = train.resolve_command(None, line[3:])
        with command.make_context(name, arguments) as context:  # refuses an option that there is not
            assert context.params["output_dir"].startswith("a b/") and not context.params["jit_compile"]
            assert context.params["max_train_steps"] > 1000
    # Each stage begins with the models of earlier ones.
    written = [line[line.index("--output-dir") + 1] for line in lines]
    for place, line in enumerate(lines):
        used = {argument.removesuffix("/model") for argument in line if argument.endswith("/model")}
        assert used <= set(written[:place])


def test_bad_stage_is_one_line(tmp_path):
    done = script("--stages", "vae,unheard", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--stages unheard: no such stage; choose from vae, vae-edges," in done.stderr


@pytest.mark.slow
def test_stage_is_trained_once_and_kept_in_half_precision(tmp_path):
    options = ("--stages", "upscaler", "--steps-factor", 0.001, "--", "--no-jit-compile")
    options += ("--lr-warmup-steps", 0, "--train-batch-size", 2)
    done = script(*options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "runs/emoji/emoji_upscaler/unet/diffusion_pytorch_model.safetensors"
    with safe_open(weights, "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    again = script(*options, folder=tmp_path)
    assert again.returncode == 0 and "upscaler: finished" in again.stdout, again.stderr
