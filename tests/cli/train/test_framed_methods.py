"""Every method that takes buckets or another resolution, on photos of two shapes: whole, and resumed."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import train
from tests import tiny

BUCKETS = ("--resolution", 32, "--aspect-ratio-buckets", 3)
VALIDATION = ("--validation-steps", 2, "--validation-examples", 4)
METHODS = {
    "vae": BUCKETS,
    "ddim": (*BUCKETS, *VALIDATION, "--validation-split", 0.2),
    "lcm": (*BUCKETS, "--rank", 2),
    "textual-inversion": (*BUCKETS, *VALIDATION, "--placeholder-token", "<x>"),
    "dreambooth": (*BUCKETS, *VALIDATION, "--instance-prompt", "a sks heart"),
    "super-resolution": ("--resolution", 24, "--crop-size", 16, *VALIDATION),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of two shapes, a model of 16 pixels, and configs of small networks."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        shape = (60, 66) if index % 2 else (40, 80)
        pixels = generator.integers(0, 256, (*shape, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "photos" / f"{index:02}.png")
        (folder / "photos" / f"{index:02}.txt").write_text(tiny.TEXTS[index])
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    (folder / "vae.json").write_text(json.dumps(tiny.VAE.to_dict()))
    (folder / "pixels.json").write_text(json.dumps(tiny.ONE_LEVEL_PIXEL_UNET.to_dict()))
    upscaler = dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, in_channels=6, num_class_embeds=50)
    (folder / "upscaler.json").write_text(json.dumps(upscaler.to_dict()))
    return folder


def command(folder, method, output, *options):
    photos = "--instance-data-dir" if method == "dreambooth" else "--train-data-dir"
    given = ["train", method, photos, folder / "photos", "--output-dir", folder / output]
    if method == "vae":
        given += ["--vae-config", folder / "vae.json"]
    elif method == "ddim":
        given += ["--unet-config", folder / "pixels.json"]
    elif method == "super-resolution":
        given += ["--unet-config", folder / "upscaler.json"]
    else:
        given += ["--pretrained-model-name-or-path", folder / "model"]
    given += [*METHODS[method], "--train-batch-size", 2, "--lr-warmup-steps", 0, "--checkpointing-steps", 2]
    return [*given, "--evaluation-steps", 0, "--mixed-precision", "no", "--no-jit-compile", *options]


def run(monkeypatch, capfd, *given):
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
    with pytest.raises(SystemExit) as end:
        run_command(train, "train")
    told = capfd.readouterr().err
    assert end.value.code == 0, told
    assert "retracing" not in told
    return told


# The others share their loop with these.
OFTEN = ("vae", "dreambooth", "super-resolution")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in METHODS]
)
def test_resumed_training_is_the_same_to_the_bit(folder, monkeypatch, capfd, method):
    whole, resumed = f"{method}-whole", f"{method}-resumed"
    told = run(monkeypatch, capfd, *command(folder, method, whole, "--max-train-steps", 4))
    counts = {"super-resolution": "training: ", "ddim": "1 of 6 images are held out"}
    assert counts.get(method, "images: 32 x 32: 3, 40 x 24: 3; ") in told, told
    shutil.copytree(folder / whole / "checkpoint-2", folder / resumed / "checkpoint-2")
    more = ("--max-train-steps", 4, "--resume-from-checkpoint", "latest")
    run(monkeypatch, capfd, *command(folder, method, resumed, *more))
    arrays = [load_file(folder / one / "checkpoint-4" / "weights.safetensors") for one in (whole, resumed)]
    before = load_file(folder / whole / "checkpoint-2" / "weights.safetensors")
    assert any((before[name] != array).any() for name, array in arrays[0].items())
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(arrays[1][name], array, err_msg=name)
    figures = [validated(folder / one) for one in (whole, resumed)]
    if "--validation-steps" in METHODS[method]:
        sets = ["train", *(["held_out"] if method == "ddim" else [])]
        names = {f"validation_loss_{part}_{weights}" for part in sets for weights in ("ema", "raw")}
        assert names <= figures[0][4].keys() and len(figures[0][4]) == len(names) * 2 * 5
        assert list(figures[0]) == [0, 2, 4] and figures[1] == {step: figures[0][step] for step in (2, 4)}


def validated(run_folder):
    """The figures of the validation loss, by step."""
    records = map(json.loads, (run_folder / "logs" / "metrics.jsonl").read_text().splitlines())
    found = {}
    for record in records:
        figures = {name: value for name, value in record.items() if name.startswith("validation_loss")}
        if figures:
            found[record["step"]] = figures
    return found
