"""The bundled model: small, in half precision, and the same in diffusers."""

import shutil

import numpy as np
import pytest
from safetensors import safe_open

from keras_sd import StableDiffusion
from keras_sd.diffusion.samplers import NoiseStreams
from keras_sd.presets import find
from tests.reference import run_reference

PROMPTS = ["red heart", "flag of japan", "waving hand, dark skin tone"]

DIFFUSERS = f"""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "emoji", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = inputs["noise"].permute(0, 3, 1, 2)
    options = dict(num_inference_steps=20, guidance_scale=5.0, latents=noise, output_type="latent")
    outputs["latents"] = pipeline({PROMPTS!r}, **options).images.permute(0, 2, 3, 1)
"""


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


def test_diffusers_makes_the_same_latents(emoji, tmp_path):
    noise = NoiseStreams(range(3)).draw(emoji.latent_shape())
    shutil.copytree(find("emoji"), tmp_path / "emoji")
    expected = run_reference(DIFFUSERS, {"noise": noise}, tmp_path)["latents"]
    context, negative = emoji.encode_text(PROMPTS), emoji.encode_text([""] * 3)
    latents = emoji.denoise(noise, context, negative, num_steps=20, guidance_scale=5.0)
    assert np.abs(latents - expected).max() < 1e-3


def test_a_red_heart_is_red_on_white(emoji):
    image = emoji.text_to_image("red heart", num_steps=20, guidance_scale=5, progress=False)[0].astype(int)
    red, green, blue = image[24:40, 24:40].mean(axis=(0, 1))
    assert red > green + 80 and red > blue + 80
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 200
