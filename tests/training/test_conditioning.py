"""Training of UNets with further input channels, for inpainting and upscaling, by the usual commands."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.cli.train.main import main
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.models.pixels import any_white, images_to_unit
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training.conditioning import Upscaling, conditioning_of, random_mask
from keras_sd.training.encoder import Encoder
from tests import tiny
from tests.programs import Program
from tests.training.test_stored_encodings import write_images

KINDS = ("inpainting", "upscaler")
STEPS = 3


def model(kind):
    if kind == "inpainting":
        return tiny.pipeline(unet=dataclasses.replace(tiny.ONE_BLOCK_UNET, in_channels=9))
    config = dataclasses.replace(tiny.ONE_BLOCK_UNET, in_channels=7, num_class_embeds=400)
    return tiny.pipeline(unet=config, low_res_scheduler_config=SchedulerConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditioning")
    write_images(folder / "images", 6)
    for kind in KINDS:
        model(kind).save(folder / kind)
    return folder


def arguments(folder, kind, method, output, *more):
    images = "--instance-data-dir" if method == "dreambooth" else "--train-data-dir"
    values = [method, images, folder / "images", "--output-dir", output, "--max-train-steps", STEPS]
    values += ["--pretrained-model-name-or-path", folder / kind, "--train-batch-size", 2]
    values += ["--learning-rate", 0.01, "--lr-warmup-steps", 0, "--lr-scheduler", "constant"]
    values += ["--rank", 2] if method == "lora" else []
    return [*map(str, values), *map(str, more)]


def weights(output, step=STEPS):
    return load_file(output / f"checkpoint-{step}" / "weights.safetensors")


def assert_same_weights(output, other):
    ours, theirs = weights(output), weights(other)
    assert ours.keys() == theirs.keys()
    assert all((array == theirs[name]).all() for name, array in ours.items())


def test_masks_are_those_of_the_recipe():
    masks = [random_mask((48, 64), np.random.default_rng(index)) for index in range(2000)]
    shares = np.array([mask.mean() for mask in masks])
    assert all(mask.shape == (48, 64) and mask.dtype == bool for mask in masks)
    assert 0.22 < (shares == 1).mean() < 0.28
    others = shares[shares < 1]
    assert others.min() > 0 and 0.2 < others.mean() < 0.6 and others.std() > 0.15
    assert (random_mask((48, 64), np.random.default_rng(7)) == masks[7]).all()


def test_inpainting_gets_what_it_gets_when_it_samples():
    sd = model("inpainting")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), "uint8")
    masks = np.stack([random_mask((16, 24), np.random.default_rng(index)) for index in range(5)])[..., None]
    found = Encoder(sd.vae, None, sd.tokenizer, 2).inpainting_channels(images, masks)
    hidden = np.asarray(sd.vae.encode(images_to_unit(images) * ~masks).mean) * sd.vae.config.scaling_factor
    np.testing.assert_array_equal(found[..., :1], any_white(masks, 4))
    np.testing.assert_allclose(found[..., 1:], hidden, atol=1e-5)


def test_upscaler_gets_a_small_noisy_image():
    conditioning = conditioning_of(model("upscaler"))
    assert isinstance(conditioning, Upscaling)
    image = np.full((16, 24, 3), 200, "uint8")
    drawn = [conditioning.draw(image, np.random.default_rng(index)) for index in range(200)]
    levels = np.array([one["class_labels"] for one in drawn])
    assert 0 <= levels.min() < 20 and 330 < levels.max() < 350  # of 400 labels
    first = drawn[0]
    assert first["channels"].shape == (4, 6, 3) and first["channels"].dtype == np.float32
    clean = min(drawn, key=lambda one: one["class_labels"])["channels"]
    noisy = max(drawn, key=lambda one: one["class_labels"])["channels"]
    assert np.abs(clean - images_to_unit(image)[0, 0, 0]).max() < np.abs(noisy).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["text-to-image", "lora"])
def test_trained_evaluated_and_exported(folder, tmp_path, run_program, kind, method):
    more = ("--evaluation-steps", STEPS, "--kid-images", 4, "--num-inference-steps", 2, "--no-jit-compile")
    validated = ("--validation-steps", STEPS, "--validation-examples", 4, "--checkpointing-steps", 1)
    code, _, told = run_program(main, *arguments(folder, kind, method, tmp_path, *more, *validated))
    assert code == 0, told
    assert "evaluated step 3" in told and "validated step 3" in told
    assert f"keras-sd {'upscale IMAGE' if kind == 'upscaler' else 'inpaint IMAGE MASK'}" in told
    changed = [(array != weights(tmp_path)[name]).any() for name, array in weights(tmp_path, 2).items()]
    assert all(changed)
    sd = StableDiffusion.load(tmp_path / "model" if method == "text-to-image" else folder / kind)
    if method == "lora":
        sd.load_lora(tmp_path / "model")
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), "uint8")
    mask = np.arange(16) % 16 < 8
    if kind == "inpainting":
        (made,) = sd.inpaint(image, np.tile(mask, (16, 1)), "red heart", num_inference_steps=1)
        assert (made[:, ~mask] == image[:, ~mask]).all() and (made != image).any()
    else:
        assert sd.upscale(image[:4, :4], "red heart", num_inference_steps=1).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_on_jax(folder, tmp_path, kind):
    quiet = ("--evaluation-steps", 0, "--random-flip", "--no-center-crop")

    def start(output, *more):
        values = arguments(folder, kind, "lora", tmp_path / output, *quiet, *more)
        return Program(["-m", "keras_sd.train", *values])

    for one in (start("whole"), start("resumed", "--max-train-steps", 2)):
        done = one.finish()
        assert done.returncode == 0, done.stderr
    done = start("resumed", "--resume-from-checkpoint", "latest").finish()
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("method", "more", "line"),
    [
        (
            "lora",
            ("--cache-latents", "disk"),
            "--cache-latents disk: an inpainting model gets another masked image at each draw; use "
            "--cache-latents off",
        ),
        (
            "dreambooth",
            ("--instance-prompt", "sks"),
            "dreambooth trains text-to-image models, and this is one for inpaint",
        ),
    ],
)
def test_refused(folder, tmp_path, run_program, method, more, line):
    values = arguments(folder, "inpainting", method, tmp_path, "--evaluation-steps", 0, *more)
    code, _, told = run_program(main, *values)
    assert code == 2 and line in told.splitlines()[-1]
