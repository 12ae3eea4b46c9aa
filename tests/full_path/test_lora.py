"""LoRA from a folder of photographs to a file that diffusers reads, by the real command on both backends."""

import pytest

from tests.full_path.commands import (
    KILLED_AFTER,
    Runs,
    assert_all_trained,
    assert_backends_agree,
    assert_images_differ,
    assert_same_run,
    checkpoint,
)
from tests.programs import Program
from tests.reference import run_reference


@pytest.fixture(scope="module")
def runs(folder):
    inputs = ("--pretrained-model-name-or-path", folder / "model", "--train-data-dir", folder / "photographs")
    return Runs(folder, "lora", *inputs, "--train-batch-size", 2, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def on_jax(runs):
    return runs.train("jax", "jax")


@pytest.fixture(scope="module")
def start(on_jax):
    """The first halves of the updates as they were after two steps; the second ones began at zero."""
    first = checkpoint(on_jax, step=KILLED_AFTER)
    return {name: 0 * array if ".lora_B." in name else array for name, array in first.items()}


def test_every_update_is_trained_and_the_same_on_both_backends(runs, on_jax, start):
    attentions = 10 * 2 * 4  # transformers, attentions in each, projections
    assert len(start) == 2 * attentions
    on_tensorflow = runs.train("tensorflow", "tensorflow")
    assert_all_trained(on_jax, start)
    assert_all_trained(on_tensorflow, start)
    assert_backends_agree(on_jax, on_tensorflow, start)


@pytest.mark.slow
def test_killed_run_ends_as_the_unbroken_one(runs, on_jax):
    assert_same_run(on_jax, runs.train_killed("killed", "jax"))


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        (("--rank", 4), "made with another rank (8 there and 4 here)"),
        (("--lora-layers", "all"), 'made with another lora_layers ("attention" there and "all" here)'),
        (("--train-text-encoder",), "made with another trained"),
        (("--adam-beta1", 0.8), "made with another adam_beta1 (0.9 there and 0.8 here)"),
    ],
)
def test_other_options_are_refused_before_the_model_is_opened(option, fault, runs, on_jax):
    command = runs.arguments("jax", "--resume-from-checkpoint", "latest", *option)
    done = Program(command).finish()
    assert done.returncode == 2
    assert fault in done.stderr and "resume with the same options" in done.stderr
    assert "training: lora" not in done.stderr  # the line before anything is opened


GENERATE = """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def generate():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
        return pipeline("a cup of coffee", **options).images

    outputs["before"] = generate()
    pipeline.load_lora_weights(folder / "jax" / "model")
    outputs["after"] = generate()
"""


def test_diffusers_generates_with_the_updates(folder, on_jax):
    outputs = run_reference(GENERATE, {}, folder)
    assert_images_differ(outputs["before"], outputs["after"])
