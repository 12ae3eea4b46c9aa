"""Code in the manner of two Keras tutorials runs after its import line is changed, offline."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_sd import keras_cv
from keras_sd.config import SchedulerConfig
from keras_sd.errors import UserError
from tests import tiny

# The calls of the guide "High-performance image generation using Stable Diffusion in KerasCV", at 64 pixels.
GUIDE = """
import keras
import keras_sd.keras_cv as keras_cv

model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=False)
images = model.text_to_image("a red heart", batch_size=3)
print(images.shape, images.dtype)
keras.backend.clear_session()

keras.mixed_precision.set_global_policy("mixed_float16")
model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=False)
print(model.diffusion_model.compute_dtype, model.diffusion_model.variable_dtype)
images = model.text_to_image("a blue heart with a halo", batch_size=3, num_steps=3)
print(images.shape)
keras.mixed_precision.set_global_policy("float32")
"""

# The calls of the example "A walk through latent space with Stable Diffusion", at 64 pixels.
WALKS = """
import math
import keras
from keras import ops
from PIL import Image
import keras_sd.keras_cv as keras_cv

model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=True)
encoding_1 = ops.squeeze(model.encode_text("a woman running"))
encoding_2 = ops.squeeze(model.encode_text("a grinning face"))
interpolated = ops.linspace(encoding_1, encoding_2, 4)
noise = keras.random.normal((64 // 8, 64 // 8, 4), seed=12345)
frames = []
for encodings in ops.split(interpolated, 2):
    images = model.generate_image(encodings, batch_size=2, num_steps=3, diffusion_noise=noise)
    frames += [Image.fromarray(image) for image in images]
frames[0].save("walk.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)

encoding = ops.squeeze(model.encode_text("a flag"))
x, y = keras.random.normal(noise.shape, seed=1), keras.random.normal(noise.shape, seed=2)
angles = ops.linspace(0.0, 2 * math.pi, 4)
circle = ops.tensordot(ops.cos(angles), x, axes=0) + ops.tensordot(ops.sin(angles), y, axes=0)
for batch in ops.split(circle, 2):
    print(model.generate_image(encoding, batch_size=2, num_steps=3, diffusion_noise=batch).shape)
latents = model.image_encoder.predict_on_batch(ops.cast(images, "float32") / 127.5 - 1)
print(latents.shape, model.decoder.predict_on_batch(latents).shape)
"""


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """The cache of the Hugging Face hub, as a download of Stable Diffusion 1.5 would leave it."""
    home = tmp_path_factory.mktemp("huggingface")
    repository = home / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    tiny.pipeline(SchedulerConfig(), vae=tiny.EIGHTFOLD_VAE).save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return home


def run_tutorial(code, hub_cache, folder):
    environment = {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_performance_guide_runs(hub_cache, tmp_path):
    lines = run_tutorial(GUIDE, hub_cache, tmp_path)
    assert lines == ["(3, 64, 64, 3) uint8", "float16 float32", "(3, 64, 64, 3)"]


def test_the_random_walks_run(hub_cache, tmp_path):
    lines = run_tutorial(WALKS, hub_cache, tmp_path)
    assert lines == ["(2, 64, 64, 3)"] * 2 + ["(2, 8, 8, 4) (2, 64, 64, 3)"]
    with Image.open(tmp_path / "walk.gif") as walk:
        assert walk.n_frames == 4


@pytest.fixture(scope="module")
def compatible():
    return keras_cv.models.StableDiffusion(16, 16, model=tiny.pipeline(SchedulerConfig(), jit_compile=False))


def test_the_names_do_what_ours_do(compatible):
    ours = compatible.model
    images = compatible.text_to_image("red heart", "flag", 2, 4, unconditional_guidance_scale=3.0, seed=5)
    expected = ours.text_to_image(
        "red heart", "flag", num_images=2, num_steps=4, guidance_scale=3.0, seed=5, progress=False
    )
    np.testing.assert_array_equal(images, expected)
    long = "red heart " * 9
    assert compatible.generate_image(compatible.encode_text(long), num_steps=1, seed=0).shape == (
        1,
        16,
        16,
        3,
    )
    encoded = keras.ops.convert_to_numpy(compatible.image_encoder(images.astype("float32") / 127.5 - 1))
    np.testing.assert_allclose(encoded, ours.encode_image(images), atol=1e-4)
    assert compatible.tokenizer is ours.tokenizer and compatible.diffusion_model is ours.unet
    first, second = (compatible.text_to_image("red heart", num_steps=1) for _ in range(2))
    assert (first != second).any()  # without a seed each call draws anew


def test_arrays_that_do_not_fit_end_in_one_line(compatible):
    context = compatible.encode_text("red heart")
    noise = np.zeros((4, 4, 4))
    with pytest.raises(UserError, match="diffusion_noise and seed: both given"):
        compatible.generate_image(context, diffusion_noise=noise, seed=1)
    with pytest.raises(UserError, match=r"diffusion_noise: of shape \(3, 4, 4, 4\) for batch_size 2"):
        compatible.generate_image(context, batch_size=2, diffusion_noise=[noise] * 3)
