"""The optimizers through a training command, on both backends."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.train.main import train
from tests import tiny
from tests.programs import Program

UNET = dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, block_out_channels=(24,))
OPTIONS = "--max-train-steps 4 --train-batch-size 4 --lr-warmup-steps 1 --evaluation-steps 0 --resolution 16"
# Options, and what the line at the start names.
CASES = {
    "AdamW8bit": (
        "--use-8bit-adam --gradient-accumulation-steps 2",
        "batch size 4 x 2, AdamW8bit, learning rate 0.0002 (",
    ),
    "Adafactor": ("--optimizer AdaFactor --learning-rate 1e-3", "learning rate 0.001 (constant, warm-up 1)"),
    "Lion": ("--optimizer-type Lion --weight-decay 0.1", "learning rate 4e-05 ("),
    "Prodigy": ("--optimizer Prodigy --prodigy-d0 1e-3", "batch size 4, Prodigy, learning rate 1 ("),
}


def arguments(folder, name):
    options = ["--no-jit-compile"] if keras.backend.backend() == "tensorflow" else []
    paths = ["--train-data-dir", folder / "images", "--unet-config", folder / "unet.json"]
    output = ["--output-dir", folder / f"{name} {keras.backend.backend()}"]
    return list(map(str, ["ddim", *paths, *output, *OPTIONS.split(), *CASES[name][0].split(), *options]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), "uint8")).save(folder / f"images/{index}.png")
    UNET.save(folder / "unet.json")
    return folder


def train_all(folder):
    for name in CASES:
        train.main(arguments(folder, name), standalone_mode=False)


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def printed(request, folder, tmp_path_factory):
    """What the runs of a backend print, after them."""
    assert keras.backend.backend() == "tensorflow"
    if request.param == "tensorflow":
        import contextlib
        import io

        with contextlib.redirect_stderr(io.StringIO()) as errors:
            train_all(folder)
        return "tensorflow", errors.getvalue()
    program = "import pathlib, sys; from tests.cli.train import test_optimizer as here; "
    done = Program(["-c", program + "here.train_all(pathlib.Path(sys.argv[1]))", folder]).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return "jax", done.stderr


def test_every_optimizer_trains_and_is_named(folder, printed):
    backend, text = printed
    lines = [line for line in text.splitlines() if line.startswith("training: ")]
    for (name, (_, words)), line in zip(CASES.items(), lines, strict=True):
        assert words in line and name in line
        run = folder / f"{name} {backend}"
        log = [json.loads(text) for text in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in log if "gradient_norm" in record]
        assert len(steps) == 4 and all(record["gradient_norm"] > 0 for record in steps)
        assert [record["learning_rate"] for record in steps][0] == 0
        weights, averages = (
            load_file(run / "checkpoint-4" / f"{group}.safetensors") for group in ("weights", "ema")
        )
        apart = [np.abs(weights[key] - averages[key]).max() for key in weights]
        assert np.isfinite(apart).all() and np.median(apart) > 1e-6
