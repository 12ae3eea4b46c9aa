"""`--kid` of the training commands: the network that measures, the names of the figures, and faults."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import train
from keras_sd.weights.inception import FILE_NAME
from tests import tiny
from tests.metrics.inception import coloured_images, random_weights

INCEPTION = ("--kid", "kid_inception", "--kid-images", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a model without an image encoder, a UNet's config, and weights of Inception v3."""
    folder = tmp_path_factory.mktemp("kid")
    (folder / "images").mkdir()
    for index, image in enumerate(coloured_images(0, 6, 32, 32)):
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text("a square")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    shutil.rmtree(folder / "model" / "image_encoder")
    tiny.ONE_LEVEL_PIXEL_UNET.save(folder / "pixel.json")
    save_file(random_weights(), folder / "weights.safetensors")
    return folder


def command(folder, method, output, *options):
    own = {
        "ddim": ("--unet-config", folder / "pixel.json"),
        "lora": ("--pretrained-model-name-or-path", folder / "model", "--rank", 2),
    }
    given = [method, "--train-data-dir", folder / "images", "--output-dir", folder / output, *own[method]]
    given += [
        "--max-train-steps",
        1,
        "--train-batch-size",
        2,
        "--lr-warmup-steps",
        0,
        "--evaluation-steps",
        1,
    ]
    given += ["--num-inference-steps", 1, "--mixed-precision", "no", "--no-jit-compile", *options]
    return list(map(str, given))


def figures_of(run_folder):
    lines = (run_folder / "logs" / "metrics.jsonl").read_text().splitlines()
    figures = {name: value for line in lines for name, value in json.loads(line).items()}
    return {name: value for name, value in figures.items() if name.startswith(("kid", "fid"))}


def check_figures(figures, network):
    names = {f"{metric}_{network}_train_{weights}" for metric in ("kid", "fid") for weights in ("ema", "raw")}
    assert figures.keys() == names
    assert all(np.isfinite(value) for value in figures.values())
    # The images of a step's training are far from the real ones.
    assert figures[f"fid_{network}_train_raw"] > 0.1


@pytest.mark.parametrize("method", ["ddim", "lora"])
def test_a_run_is_measured_by_a_named_file_of_weights(folder, run_program, method):
    """The model of the LoRA has no image encoder of its own."""
    weights = ("--inception-weights", folder / "weights.safetensors")
    arguments = command(folder, method, method, *INCEPTION, *weights)
    code, _, errors = run_program(lambda: run_command(train, "train"), *arguments)
    assert code == 0, errors
    # It is not the published file, so its figures must not be taken for those of papers.
    check_figures(figures_of(folder / method), "inception_unverified")
    assert "weights.safetensors: not the published file by its SHA-256" in errors
    assert "FID of 4 images with 2048 features" in errors


def run_here(run_program, *arguments):
    code, _, errors = run_program(lambda: run_command(train, "train"), *arguments)
    return code, [line for line in errors.splitlines() if not line.startswith("warning")]


@pytest.mark.parametrize("kind", ["cut", "missing tensor", "missing file", "pickle of another program"])
def test_a_wrong_file_ends_in_one_line_before_the_run(folder, run_program, kind):
    path = folder / f"{kind}.safetensors"
    if kind == "cut":
        path.write_bytes((folder / "weights.safetensors").read_bytes()[:-4])
    elif kind == "missing tensor":
        weights = load_file(folder / "weights.safetensors")
        del weights["Mixed_6b.branch7x7_2.conv.weight"]
        save_file(weights, path)
    elif kind == "pickle of another program":
        path = path.with_suffix(".pth")
        path.write_bytes(b"\x80\x04]\x94.")
    arguments = command(folder, "lora", kind, *INCEPTION, "--inception-weights", path)
    code, errors = run_here(run_program, *arguments)
    assert code == 2 and str(path) in errors[-1], errors
    assert not (folder / kind / "model").exists() and not any("training:" in line for line in errors)


def test_without_a_connection_the_remedy_is_a_flag(folder, run_program, monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, errors = run_here(run_program, *command(folder, "ddim", "offline", *INCEPTION))
    assert code == 2 and "could not be downloaded" in errors[-1]
    assert errors[-1].endswith(f"name the file {FILE_NAME} by --inception-weights"), errors
    # Nothing is looked for where nothing is measured.
    options = ("--kid", "kid_inception", "--kid-images", "0")
    code, errors = run_here(run_program, *command(folder, "ddim", "offline", *options))
    assert code == 2 and "--kid: has no effect with --kid-images 0" in errors[-1]


def test_a_model_without_an_image_encoder_is_told_of(folder, run_program):
    arguments = command(folder, "lora", "unmeasured", "--kid-images", 4)
    code, _, errors = run_program(lambda: run_command(train, "train"), *arguments)
    assert code == 0, errors
    assert "--kid-images 4: not measured, as the model has no image encoder" in errors
    assert "give --kid kid_inception" in errors
    assert figures_of(folder / "unmeasured") == {}
