"""The whole UNet from a folder of photographs to a model that diffusers opens, on both backends."""

import pytest

from keras_sd.models.parameters import parameter_paths
from keras_sd.weights.loading import load_part
from tests.full_path.commands import (
    Runs,
    assert_all_trained,
    assert_backends_agree,
    assert_images_differ,
    assert_same_run,
)
from tests.reference import run_reference


@pytest.fixture(scope="module")
def runs(folder):
    inputs = ("--pretrained-model-name-or-path", folder / "model", "--train-data-dir", folder / "photographs")
    return Runs(folder, "text-to-image", *inputs, "--train-batch-size", 2, "--learning-rate", 1e-4)


@pytest.fixture(scope="module")
def on_jax(runs):
    return runs.train("jax", "jax")


@pytest.fixture(scope="module")
def start(folder):
    unet = load_part(folder / "model", "unet")
    return {f"unet.{each.name}": each.variable.numpy() for each in parameter_paths(unet)}


def test_every_weight_is_trained_and_the_same_on_both_backends(runs, on_jax, start):
    # Without XLA, which takes most of the time there; LoRA is trained with it.
    on_tensorflow = runs.train("tensorflow", "tensorflow", "--no-jit-compile")
    assert_all_trained(on_jax, start)
    assert_all_trained(on_tensorflow, start)
    assert_backends_agree(on_jax, on_tensorflow, start)


def test_killed_run_ends_as_the_unbroken_one(runs, on_jax):
    assert_same_run(on_jax, runs.train_killed("killed", "jax"))


GENERATE = """
    from diffusers import StableDiffusionPipeline

    for name in ("model", "jax/model"):
        pipeline = StableDiffusionPipeline.from_pretrained(folder / name, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        outputs[name] = pipeline(
            "a cup of coffee",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
"""


def test_diffusers_generates_with_the_trained_model(folder, on_jax):
    outputs = run_reference(GENERATE, {}, folder)
    assert_images_differ(outputs["model"], outputs["jax/model"])
