"""Options of commands that say which model, and opening what they name before long work."""

import math
import os
from pathlib import Path

import click

# Whatever loads a backend is imported inside, after the options have been checked.
from keras_sd import interruption, presets
from keras_sd.cli.command import decorated
from keras_sd.errors import UserError

DTYPES = ("float32", "float16", "bfloat16")


def model_options(default="emoji"):
    """The options that say which model, and what is added to it."""
    return decorated(
        click.option(
            "--model", default=default, help="Preset, hub id, diffusers folder, .safetensors or .ckpt."
        ),
        click.option("--vae", help="Folder or file of another autoencoder."),
        click.option(
            "--lora", "loras", multiple=True, metavar="PATH[:WEIGHT]", help="LoRA to add; may be repeated."
        ),
        click.option("--lora-folder", help="Where prompts find LoRAs: <lora:name:0.8>."),
        click.option(
            "--embedding",
            "embeddings",
            multiple=True,
            metavar="PATH[:TOKEN]",
            help="Textual inversion to add; may be repeated.",
        ),
        click.option("--dtype", default="float32", type=click.Choice(DTYPES), help="Precision."),
        click.option("--batch-size", default=8, type=click.IntRange(1), help="Images made at a time."),
        click.option(
            "--jit-compile/--no-jit-compile",
            default=True,
            callback=_compiled,
            help="Compile by XLA; a few small images are faster without. JAX always compiles.",
        ),
    )


def _compiled(context, parameter, value):
    if not value and os.environ.get("KERAS_BACKEND") == "jax":
        raise click.BadParameter("JAX always compiles; leave it out, or use TensorFlow.")
    return value


def check_steps(model, num_inference_steps):
    """Refuses more steps than a model's schedule has, where that can be read before a backend is loaded."""
    folder = presets.find(model)
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.weights.diffusers_folder import SCHEDULER

    if (folder / SCHEDULER).is_file():
        most = SchedulerConfig.load(folder / SCHEDULER).num_train_timesteps
        if num_inference_steps > most:
            raise UserError(f"num_inference_steps {num_inference_steps}: out of range; use 1 to {most}")


def check_size(options, height, width, title="", remedy=""):
    """Refuses a size that a model's latents do not divide, where that can be read before it is opened.

    Args:
        options: the command's, of which "model" and "vae" are looked at.
        height, width: in pixels; None is the model's own.
        title, remedy: what the line says before and behind.
    """
    folder = Path(options["vae"]) if options.get("vae") else presets.find(options["model"])
    config = folder / "vae" / "config.json"
    if options.get("vae") and not config.is_file():
        config = folder / "config.json"
    if not config.is_file():
        return
    from keras_sd.config import VAEConfig

    factor = VAEConfig.load(config).downsampling
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % factor:
            raise UserError(
                f"{title}{name} {side}: does not fit the model; use a multiple of {factor}{remedy}"
            )


def open_model(model, loras=(), lora_folder=None, embeddings=(), **options):
    """Opens a preset, a hub id, a folder or a file; an unknown name fails before a backend is loaded.

    Args:
        loras: paths of LoRAs, each with ":weight" behind it if it is not 1.
        lora_folder: where prompts find LoRAs by their names.
        embeddings: paths of textual inversions, each with ":token" behind it to call its word otherwise.
    """
    source = presets.find(model)
    updates = [_path_and_weight(text) for text in loras]
    for path in [path for path, _ in updates] + ([lora_folder] if lora_folder else []):
        if not Path(path).exists():
            raise UserError(f"{path}: no such LoRA; give a file, or a folder that holds one")
    words = [_path_and_token(text) for text in embeddings]
    with interruption.phase(f"opening {model}"):
        from keras_sd.pipeline.stable_diffusion import StableDiffusion

        pipeline = StableDiffusion.load(source, **options)
        pipeline.name, pipeline.lora_folder = model, lora_folder
        for path, weight in updates:
            pipeline.load_lora(path, weight=weight)
        for path, token in words:
            pipeline.load_textual_inversion(path, token)
    return pipeline


def _path_and_weight(text):
    path, _, weight = text.rpartition(":")
    try:
        weight = float(weight)
    except ValueError:
        return text, 1.0  # a colon of the path
    if path and not math.isfinite(weight):
        raise UserError(f"--lora {text}: {weight} is not a finite number; give another weight")
    return (path, weight) if path else (text, 1.0)


def _path_and_token(text):
    if Path(text).exists():
        return text, None
    path, _, token = text.rpartition(":")
    if not path or not Path(path).exists():
        raise UserError(f"{path or text}: no such embedding; give a file, or a folder that holds one")
    return path, token
