"""Latent consistency distillation: what is drawn, resuming, its command, and its LoRA in diffusers.

That its loss and gradients are right stands in `test_gradients`.
"""

import json

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.cli.train.lcm import lcm
from keras_sd.diffusion.denoiser import NoiseStreams
from keras_sd.errors import UserError
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training.consistency import consistency_example, train_consistency
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.dreambooth import read_images
from keras_sd.training.encodings import EncodedSource
from keras_sd.training.lora import add_lora
from keras_sd.training.text_to_image import diffusion_example
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference
from tests.training.test_dreambooth import STEPS, assert_equal, short_run, write_pictures
from tests.training.test_trainer import copy_as_of_step

NUM_STEPS = 3
SHAPE = (4, 4, 4)

SCRIPT = """
from diffusers import LCMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)

def latents():
    draws = iter(inputs["noise"].permute(0, 1, 4, 2, 3))
    first = next(draws)
    sys.modules[LCMScheduler.__module__].randn_tensor = lambda shape, **options: next(draws)
    result = pipe("red heart", latents=first, num_inference_steps=len(inputs["noise"]), guidance_scale=1.0,
                  output_type="latent").images
    return result.permute(0, 2, 3, 1)

outputs["before"] = latents()
pipe.load_lora_weights(folder / "run" / "model")
outputs["after"] = latents()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and images to distil it on."""
    folder = tmp_path_factory.mktemp("consistency")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False).save(folder / "model")
    for picture in write_pictures(folder / "images", 3, 0).glob("*.png"):
        picture.with_suffix(".txt").write_text("red heart")
    return folder


def command(folder, output, *options):
    """Runs the command as the command line does."""
    arguments = ["--pretrained-model-name-or-path", folder / "model", "--output-dir", output]
    arguments += ["--train-data-dir", folder / "images", "--max-train-steps", STEPS, "--kid-images", 0]
    arguments += ["--train-batch-size", 2, "--rank", 2, "--learning-rate", "1e-1", "--lr-warmup-steps", 0]
    lcm.main([*map(str, arguments), "--no-jit-compile", *options], standalone_mode=False)


def test_examples_are_those_of_diffusion_at_the_steps_of_the_teacher():
    example = {
        "mean": np.zeros(SHAPE, "float32"),
        "standard_deviation": np.ones(SHAPE, "float32"),
        "contexts": np.ones((1, 12, 16), "float32"),
        "empty_context": np.zeros((12, 16), "float32"),
    }
    timesteps = np.array([999, 749, 499, 249])
    noise = NoiseDrawing(DiffusionSettings(), 4)
    drawn = [
        consistency_example(example, np.random.default_rng(seed), timesteps, noise) for seed in range(200)
    ]
    counts = [sum(one["timesteps"] == timestep for one in drawn) for timestep in timesteps]
    assert sum(counts) == 200 and min(counts) > 30
    plain = diffusion_example(example, np.random.default_rng(7), noise=noise)
    for name in ("samples", "noise", "context"):
        np.testing.assert_array_equal(drawn[7][name], plain[name])
    np.testing.assert_array_equal(drawn[7]["negative"], example["empty_context"])


def train(folder, output, resume=None, **options):
    """Distils the tiny model."""
    settings = short_run(output, resume)
    keras.utils.set_random_seed(0)
    sd = StableDiffusion.load(folder / "model", jit_compile=False)
    add_lora(sd.unet, 2, 2)

    pictures = read_images(folder / "images", "red heart", 16)
    encoded = EncodedSource(pictures, sd.vae, sd.text_encoder, sd.tokenizer, jit_compile=False)
    parts = (sd.unet, sd.scheduler_config, encoded)
    return sd, train_consistency(settings, *parts, **{"guidance_scale": 5.0} | options)


def test_resumes_to_the_bit_and_leaves_the_model_as_it_is(tmp_path, folder):
    sd, finished = train(folder, tmp_path / "whole")
    assert finished
    copy_as_of_step(2, tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="guidance_scale"):
        train(folder, tmp_path / "parts", resume="latest", guidance_scale=3.0)
    assert train(folder, tmp_path / "parts", resume="latest")[1]
    for group in ("weights", "ema", "optimizer"):
        whole, parts = (
            load_file(tmp_path / name / f"checkpoint-{STEPS}" / f"{group}.safetensors")
            for name in ("whole", "parts")
        )
        assert_equal(whole, parts)
    before, state = StableDiffusion.load(folder / "model").unet, torch_state(sd.unet)
    updates = {name for name in state if ".lora_" in name}
    assert updates and all(np.abs(state[name]).max() > 0 for name in updates)
    assert_equal({name: array for name, array in state.items() if name not in updates}, torch_state(before))


def test_command_writes_a_lora_with_which_diffusers_draws_the_same(folder):
    command(folder, folder / "run", "--validation-prompts", "red heart")
    assert (folder / "run" / "samples" / f"step-{STEPS:06}.png").is_file()
    lines = (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    streams = NoiseStreams([3])
    noise = np.stack([streams.draw(SHAPE) for _ in range(NUM_STEPS)])
    reference = run_reference(SCRIPT, {"noise": noise}, folder)
    sd = StableDiffusion.load(folder / "model", jit_compile=False)

    def distance(expected):
        streams = NoiseStreams([3])
        options = {"sampler": "lcm", "num_inference_steps": NUM_STEPS, "streams": streams}
        found = sd.denoise(streams.draw(SHAPE), sd.encode_text("red heart"), **options)
        return np.abs(found - expected).max() / expected.std()

    assert distance(reference["before"]) < 1e-4
    for name in ("pytorch_lora_weights", "lora_kohya"):
        sd.load_lora(folder / "run" / "model" / f"{name}.safetensors")
        assert distance(reference["after"]) < 1e-4
        sd.unload_lora()
    assert distance(reference["after"]) > 1e-2
