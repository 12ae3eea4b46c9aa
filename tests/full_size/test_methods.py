"""Every method of training a model of Stable Diffusion 1.5's layout, on both backends, to what it writes.

`tests/full_path` does the same for LoRA and for the whole UNet.
"""

import functools

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
from tests.reference import run_reference

BATCH = ("--train-batch-size", 2, "--learning-rate", 1e-3)
CLASS = ("--with-prior-preservation", "--class-prompt", "a photo of a cup", "--num-class-images", 3)

OPEN = """
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline

    def open_pipeline(name="model"):
        pipeline = StableDiffusionPipeline.from_pretrained(folder / name, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(pipeline, prompt="a cup", **options):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", **options}
        return pipeline(prompt, **options).images

    pipeline = open_pipeline()
"""

# What diffusers does with the model that a run has written.
GENERATE = {
    "model": """
    outputs["before"] = generate(pipeline)
    outputs["after"] = generate(open_pipeline(f"{run}/model"))
""",
    "lora": """
    outputs["before"] = generate(pipeline)
    pipeline.load_lora_weights(folder / run / "model")
    outputs["after"] = generate(pipeline)
""",
    "lcm": """
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    outputs["before"] = generate(pipeline, guidance_scale=1.0)
    pipeline.load_lora_weights(folder / run / "model")
    outputs["after"] = generate(pipeline, guidance_scale=1.0)
""",
    "word": """
    outputs["before"] = generate(pipeline)
    pipeline.load_textual_inversion(folder / run / "model" / "learned_embeds.safetensors")
    outputs["after"] = generate(pipeline, "<mug>")
""",
    "vae": """
    outputs["before"] = generate(pipeline)
    pipeline.vae = AutoencoderKL.from_pretrained(folder / run / "model" / "vae")
    outputs["after"] = generate(pipeline)
""",
}


def methods(folder):
    """Name -> (the command with its options, what diffusers does with its model)."""
    model = ("--pretrained-model-name-or-path", folder / "model")
    data = ("--train-data-dir", folder / "photographs")
    subject = (
        *model,
        "--instance-data-dir",
        folder / "photographs",
        "--instance-prompt",
        "a photo of sks cup",
    )
    return {
        "text-to-image": (("text-to-image", *model, *data, *BATCH), "model"),
        "lora-everywhere": (
            ("lora", *model, *data, *BATCH, "--lora-layers", "all", "--train-text-encoder"),
            "lora",
        ),
        "dreambooth": (("dreambooth", *subject, *BATCH, *CLASS, "--train-text-encoder"), "model"),
        "dreambooth-lora": (("dreambooth", *subject, *BATCH, "--lora"), "lora"),
        "textual-inversion": (
            (
                *("textual-inversion", *model, *data, *BATCH),
                *("--placeholder-token", "<mug>", "--initializer-token", "cup"),
            ),
            "word",
        ),
        "lcm": (("lcm", *model, *data, *BATCH), "lcm"),
        "vae": (("vae", *data, *BATCH, "--pretrained-vae", folder / "model"), "vae"),
        "vae-decoder": (
            ("vae", *data, *BATCH, "--pretrained-vae", folder / "model", "--decoder-only"),
            "vae",
        ),
    }


METHODS = (
    *("text-to-image", "lora-everywhere", "dreambooth", "dreambooth-lora", "textual-inversion"),
    *("lcm", "vae", "vae-decoder"),
)


@pytest.fixture(scope="module")
def unbroken(folder):
    """Gives the run of a method on a backend, which is made once."""

    @functools.cache
    def run(method, backend):
        return runs_of(folder, method).train(f"{method} on {backend}", backend)

    return run


def runs_of(folder, method):
    command, _ = methods(folder)[method]
    return Runs(folder, *command)


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_trained_and_the_same_on_both_backends(method, unbroken):
    on_jax, on_tensorflow = unbroken(method, "jax"), unbroken(method, "tensorflow")
    first = checkpoint(on_jax, step=KILLED_AFTER)
    assert_all_trained(on_jax, first)
    assert_all_trained(on_tensorflow, first)
    assert_backends_agree(on_jax, on_tensorflow, first)


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_ends_as_the_unbroken_one(method, backend, folder, unbroken):
    killed = runs_of(folder, method).train_killed(f"{method} on {backend}, killed", backend)
    assert_same_run(unbroken(method, backend), killed)


@pytest.mark.parametrize("method", METHODS)
def test_diffusers_opens_and_generates(method, folder, unbroken):
    run = unbroken(method, "jax").name
    script = f"{OPEN}\n    run = {run!r}\n{GENERATE[methods(folder)[method][1]]}"
    outputs = run_reference(script, {}, folder)
    assert_images_differ(outputs["before"], outputs["after"])
