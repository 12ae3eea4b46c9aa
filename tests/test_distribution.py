"""Several devices and processes lose, step by step, what one device loses, and end with its weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.errors import UserError
from keras_sd.training import distribution, rendezvous
from tests import tiny

STEPS = 4
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
# Numbers stay float32's, and programs compile in half the time.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
SECONDS = 300


def start(arguments, flags="", backend="jax"):
    """Starts a Python process on `backend` with these flags for XLA."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "XLA_FLAGS": f"{FAST_COMPILATION} {flags}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What a process printed, once it has succeeded."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return output, errors


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return "127.0.0.1:{}".format(server.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned pictures of noise, and a tiny pipeline."""
    folder = tmp_path_factory.mktemp("distribution")
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    lines = []
    for index in range(12):
        picture = generator.integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(picture).save(folder / "pictures" / f"{index}.png")
        text = tiny.TEXTS[index % len(tiny.TEXTS)]
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}) + "\n")
    (folder / "pictures" / "metadata.jsonl").write_text("".join(lines))
    unet = tiny.UNetConfig(
        sample_size=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tiny.pipeline(unet=unet).save(folder / "model")
    return folder


def train(folder, output, *options, flags="", backend="jax"):
    """Starts `text-to-image` with all of its UNet trained, on batches of four."""
    arguments = ["-m", "keras_sd.train", "text-to-image", "--output-dir", folder / output]
    arguments += ["--pretrained-model-name-or-path", folder / "model"]
    arguments += ["--train-data-dir", folder / "pictures"]
    arguments += ["--max-train-steps", STEPS, "--train-batch-size", 4, "--checkpointing-steps", STEPS // 2]
    arguments += ["--learning-rate", 1e-3, "--lr-warmup-steps", 1, "--evaluation-steps", STEPS]
    arguments += ["--kid-images", 0, "--num-inference-steps", 1, "--validation-prompts", "red heart"]
    return start([*arguments, *options], flags, backend)


def processes(address, *own):
    """The flags of one of two processes."""
    return ("--distribution", "auto", "--coordinator", address, "--num-processes", 2, "--process-id", *own)


@pytest.fixture(scope="module")
def runs(folder):
    """The same training on one device, on two and in two processes; two at a time, as there are two cores."""
    one, two = (
        train(folder, "one"),
        train(folder, "two", "--distribution", "data", flags=TWO_DEVICES),
    )
    finish(one), finish(two)
    shutil.copytree(folder / "two" / f"checkpoint-{STEPS // 2}", folder / "resumed" / f"checkpoint-{STEPS // 2}")
    address = free_address()
    pair = [train(folder, "processes", *processes(address, index)) for index in range(2)]
    told = [finish(process)[1] for process in pair]
    # Process 0 alone has a progress line.
    assert [f"step {STEPS}/{STEPS}" in errors for errors in told] == [True, False]
    model, resumed = (
        train(folder, "model-parallel", "--distribution", "model", flags=TWO_DEVICES),
        train(folder, "resumed", "--resume-from-checkpoint", "latest"),
    )
    finish(model), finish(resumed)
    return folder


def losses(folder):
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def largest_difference(folder, other, group):
    """Of all tensors, each relative to its largest number."""
    ours, theirs = (load_file(path / f"checkpoint-{STEPS}" / f"{group}.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    return max(
        np.abs(ours[name] - theirs[name]).max() / max(np.abs(ours[name]).max(), 1e-9)
        for name in ours
        if ours[name].dtype == "float32"
    )


@pytest.mark.parametrize("output", ["two", "processes", "model-parallel", "resumed"])
def test_losses_and_weights_are_those_of_one_device(runs, output):
    expected, found = losses(runs / "one"), losses(runs / output)
    assert sorted(expected) == [1, 2, 3, 4]
    assert sorted(found) == ([3, 4] if output == "resumed" else [1, 2, 3, 4])
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
    for group in ("weights", "ema"):
        assert largest_difference(runs / "one", runs / output, group) < 1e-4
    sample = f"samples/step-{STEPS:06}.png"
    pictures = [np.asarray(Image.open(runs / name / sample)).astype(int) for name in ("one", output)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (runs / output / "model" / "model_index.json").is_file()
