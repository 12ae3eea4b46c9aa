"""The bundled models: small, in half precision, and of sense; `test_pipeline` opens `emoji` in diffusers."""

import numpy as np
import pytest
from safetensors import safe_open

from keras_sd import StableDiffusion
from keras_sd.data.sources import load_source
from keras_sd.pipeline.upscaler import Upscaler
from keras_sd.presets import find
from keras_sd.training.super_resolution import measure_upscaling


@pytest.fixture(scope="module")
def emoji():
    return StableDiffusion.from_preset("emoji")


def test_folder_is_small_and_in_half_precision():
    files = [path for path in find("emoji").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_a_red_heart_is_red_on_white(emoji):
    image = emoji.text_to_image("red heart", num_inference_steps=20, guidance_scale=5, progress=False)[
        0
    ].astype(int)
    red, green, blue = image[24:40, 24:40].mean(axis=(0, 1))
    assert red > green + 80 and red > blue + 80
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 200


def test_upscaler_is_sharper_than_interpolation():
    source = load_source("emoji", "validation", 128)
    images = np.stack([source[index]["image"] for index in range(0, 200, 50)])
    upscaler = Upscaler.load(find("emoji-upscaler"), jit_compile=False)
    _, figures = measure_upscaling(upscaler, images, num_inference_steps=4)
    assert figures["psnr"] > max(figures["bicubic_psnr"], figures["lanczos_psnr"])
    assert figures["edge_error"] < 0.7 * min(figures["bicubic_edge_error"], figures["lanczos_edge_error"])
