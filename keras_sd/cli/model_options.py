"""Options that name a model and its additions, and opening them."""

import os
from pathlib import Path

import click

# Whatever loads a backend is imported inside, after the options have been checked.
from keras_sd import interruption, presets
from keras_sd.arguments import shown
from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import LARGEST
from keras_sd.errors import UserError
from keras_sd.weights.diffusers_folder import holds_pixel_upscaler
from keras_sd.weights.safetensors_files import read_safetensors

DTYPES = ("float32", "float16", "bfloat16")


quantize_option = click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="int8: keep the kernels of UNet and text encoder in 8 bits, a quarter of the memory of float32.",
)


def model_options(default="emoji"):
    """Return a decorator that adds the options for the model, its additions and its computation."""
    return decorated(
        click.option(
            "--model",
            default=default,
            help="Preset (see `keras-sd presets`), hub id, diffusers folder, .safetensors or .ckpt file.",
        ),
        click.option("--vae", help="Folder or file of another VAE. By default the model's own."),
        click.option(
            "--lora",
            "loras",
            multiple=True,
            metavar="PATH[:WEIGHT]",
            help="LoRA to add, with weight 1 unless another is given; may be repeated.",
        ),
        click.option("--lora-folder", help="Folder of the LoRAs that prompts name, as in <lora:name:0.8>."),
        click.option(
            "--embedding",
            "embeddings",
            multiple=True,
            metavar="PATH[:TOKEN]",
            help="Textual inversion to add; TOKEN renames its word. May be repeated.",
        ),
        click.option(
            "--dtype", default="float32", type=click.Choice(DTYPES), help="Precision of the computation."
        ),
        click.option(
            "--batch-size",
            default=8,
            type=click.IntRange(1),
            help="Images per batch; fewer need less memory.",
        ),
        click.option(
            "--jit-compile/--no-jit-compile",
            default=None,
            callback=_compiled,
            help="Compile with XLA (JAX always does): the first call waits, the others are faster. On by "
            "default, but for bfloat16 on a processor that multiplies it.",
        ),
        click.option(
            "--engine",
            default="keras",
            type=click.Choice(["keras", "openvino"]),
            help="openvino: compute each part on a processor by OpenVINO where that is faster.",
        ),
        quantize_option,
    )


def _compiled(context, parameter, value):
    if value is False and os.environ.get("KERAS_BACKEND") == "jax":
        raise click.BadParameter("JAX always compiles; leave it out, or use TensorFlow.")
    return value


def check_size(options, height, width):
    """Raise UserError for a size that does not fit the latents, if the VAE's config can be read already.

    Args:
        options: the command's options, of which "model" and "vae" are used.
        height, width: in pixels; None is the model's own.
    """
    factor = size_factor(options, default=1)
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % factor:
            raise UserError(f"{name} {side}: does not fit the model; use a multiple of {factor}")


def size_factor(options, default=8):
    """Return what images' sides are multiples of; `default` if the VAE's config cannot be read yet."""
    folder = Path(options["vae"]) if options.get("vae") else presets.find(options["model"])
    config = folder / "vae" / "config.json"
    if options.get("vae") and not config.is_file():
        config = folder / "config.json"
    if not config.is_file():
        return default
    from keras_sd.config import VAEConfig

    return VAEConfig.load(config).downsampling


def skipped_layers(text_encoder, clip_skip):
    """Return the number of skipped layers, as the library counts, of a --clip-skip, where the last is 1.

    Raises:
        UserError: there are not so many.
    """
    layers = text_encoder.config.num_hidden_layers
    if clip_skip > layers:
        raise UserError(f"--clip-skip {clip_skip}: the text encoder has {layers} layers; give 1 to {layers}")
    return clip_skip - 1


def open_model(model, loras=(), lora_folder=None, embeddings=(), **options):
    """Open a preset, a hub id, a folder or a file; an unknown name fails before a backend is loaded.

    Args:
        loras: paths of LoRAs, each followed by ":weight" if it is not 1.
        lora_folder: folder of the LoRAs that prompts name.
        embeddings: paths of textual inversions, each followed by ":token" to rename its word.
        options: as `StableDiffusion.load` takes them.
    """
    if options.get("engine", "keras") != "keras":
        from keras_sd.backend import check_engine  # which loads a backend

        check_engine(options["engine"], options["dtype"])
    source = presets.find(model)
    if holds_pixel_upscaler(source):
        raise UserError(f"{model}: is an upscaler, which takes no text; use the command upscale")
    if options.get("vae") and not Path(options["vae"]).exists():
        raise UserError(f"vae {options['vae']}: no such file or folder; correct the path")
    updates = [path_and_weight(text) for text in loras]
    for path in [path for path, _ in updates] + ([lora_folder] if lora_folder else []):
        if not Path(path).exists():
            raise UserError(f"{path}: no such LoRA; give a file, or a folder that holds one")
    if lora_folder and not Path(lora_folder).is_dir():
        raise UserError(f"lora_folder {lora_folder}: is no folder; name the one that holds the LoRAs")
    for path in [path for path, _ in updates if path.endswith(".safetensors") and Path(path).is_file()]:
        read_safetensors(path)  # only its header: a damaged file is an error before the model is opened
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


def path_and_weight(text, title="--lora "):
    """Return the path and the weight of PATH[:WEIGHT]; `title` is what stands before it in messages."""
    path, _, weight = text.rpartition(":")
    try:
        weight = float(weight)
    except ValueError:
        if path and Path(path).exists() and not Path(text).exists():
            fault = f"the weight {shown(weight)} is no number; give one, such as 0.8"
            raise UserError(f"{title}{text}: {fault}") from None
        return text, 1.0  # a colon of the path
    if path and not abs(weight) < LARGEST:
        raise UserError(f"{title}{text}: {weight} is not a finite number in float32; give another weight")
    return (path, weight) if path else (text, 1.0)


def _path_and_token(text):
    if Path(text).exists():
        return text, None
    path, _, token = text.rpartition(":")
    if not path or not Path(path).exists():
        raise UserError(f"{path or text}: no such embedding; give a file, or a folder that holds one")
    return path, token
