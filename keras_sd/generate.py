"""The commands that make pictures: one for each task of `StableDiffusion`."""

import math
from pathlib import Path

import click

# Whatever loads a backend is imported inside the commands, after their options have been checked.
from keras_sd import presets
from keras_sd.arguments import LARGEST_SEED
from keras_sd.diffusion.samplers import SAMPLERS
from keras_sd.errors import UserError
from keras_sd.option_types import NOT_NEGATIVE, SHARE, Number
from keras_sd.outputs import check_output, output_option

DTYPES = ("float32", "float16", "bfloat16")


def _decorated(*options):
    """One decorator that adds all of these options, in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sampling_options = _decorated(
    click.option("--steps", default=30, type=click.IntRange(1), help="Denoising steps."),
    click.option(
        "--guidance-scale",
        type=NOT_NEGATIVE,
        show_default="the model's own; usually 7.5",
        help="How much the prompt is followed; 1 switches guidance off.",
    ),
    click.option(
        "--guidance-interval",
        default=(0.0, 1.0),
        type=(SHARE, SHARE),
        metavar="START END",
        help="Share of the steps from which and to which there is guidance; the others take half the time.",
    ),
    click.option(
        "--reuse-interval",
        default=1,
        type=click.IntRange(1),
        help="Every which step runs the whole UNet; the others reuse its deep features.",
    ),
    click.option("--seed", default=0, type=click.IntRange(0, LARGEST_SEED), help="Image i uses seed + i."),
)

prompt_options = _decorated(
    click.option("--negative-prompt", help="What to stay away from."),
    sampling_options,
    click.option("--sampler", default="ddim", type=click.Choice(tuple(SAMPLERS)), help="Way of denoising."),
    click.option("--eta", default=0.0, type=SHARE, help="Fresh noise of DDIM, 0 to 1."),
    click.option(
        "--guidance-rescale",
        default=0.0,
        type=SHARE,
        help="Against overexposure by strong guidance.",
    ),
)


def model_options(default="emoji"):
    """The options that say which model, and what is added to it."""
    return _decorated(
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
        click.option("--batch-size", default=8, type=click.IntRange(1), help="Pictures made at a time."),
    )


size_options = _decorated(
    click.option("--height", type=click.IntRange(8), help="Pixels; the model's own by default."),
    click.option("--width", type=click.IntRange(8), help="Pixels; the model's own by default."),
)

num_images_option = click.option("--num-images", default=1, type=click.IntRange(1), help="Pictures to make.")


@click.command()
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@size_options
@prompt_options
@model_options()
def generate(prompt, num_images, height, width, **options):
    """Make pictures of PROMPT.

    One picture goes to the file named by --output. Of several, heart.png shows all side by side,
    and heart-0.png, heart-1.png, ... are the single ones. Each file says how it was made.
    Without --output, files that are there already stay: image.png, image-1.png, ...
    """
    output = _check_pictures(options, num_images)
    pipeline, sampling = _open(options)
    images = pipeline.text_to_image(prompt, num_images=num_images, height=height, width=width, **sampling)
    _save(pipeline, images, output, prompt, sampling)


@click.command()
@click.argument("image")
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@click.option("--strength", default=0.8, type=SHARE, help="How much is made new.")
@size_options
@prompt_options
@model_options()
def image_to_image(image, prompt, num_images, strength, height, width, **options):
    """Make pictures of PROMPT that begin from the picture IMAGE."""
    pixels = _read_picture(image, height, width)
    output = _check_pictures(options, num_images)
    pipeline, sampling = _open(options)
    images = pipeline.image_to_image(pixels, prompt, num_images=num_images, strength=strength, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


@click.command()
@click.argument("image")
@click.argument("mask")
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@click.option("--strength", default=1.0, type=SHARE, help="How much is made new.")
@size_options
@prompt_options
@model_options()
def inpaint(image, mask, prompt, num_images, strength, height, width, **options):
    """Make anew what is white in MASK, a picture of IMAGE's size, as PROMPT says."""
    pixels = _read_picture(image, height, width)
    mask = _read_picture(mask, height, width, mode="L")
    output = _check_pictures(options, num_images)
    pipeline, sampling = _open(options)
    images = pipeline.inpaint(pixels, mask, prompt, num_images=num_images, strength=strength, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


@click.command()
@click.argument("image")
@click.argument("prompt", default="")
@output_option("image.png")
@num_images_option
@click.option("--noise-level", type=click.IntRange(0), help="0 stays close to IMAGE; the model's usual one.")
@prompt_options
@model_options("emoji-upscaler")
def upscale(image, prompt, num_images, noise_level, **options):
    """Make a larger picture of IMAGE: twice as large, or as an upscaler of Stable Diffusion's kind does.

    The bundled upscaler takes no PROMPT.
    """
    pixels = _read_picture(image)
    output = _check_pictures(options, num_images)
    folder = Path(options["model"]) if Path(options["model"]).exists() else presets.find(options["model"])
    more = {} if noise_level is None else {"noise_level": noise_level}
    check_steps(folder, options["steps"])
    from keras_sd.upscaler import Upscaler

    if Upscaler.is_in(folder):
        if prompt:
            raise UserError(f"{options['model']}: takes no prompt; leave it out, or give a model with text")
        _upscale_pixels(folder, pixels, output, num_images, more, options)
        return
    pipeline, sampling = _open(options)
    images = pipeline.upscale(pixels, prompt, num_images=num_images, **more, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Noise level": more.get("noise_level", 20)})


def _upscale_pixels(folder, pixels, output, num_images, noise_level, options):
    """Writes pictures that an upscaler without text makes."""
    from tqdm import tqdm

    from keras_sd.upscaler import Upscaler

    upscaler = Upscaler.load(folder, dtype=options["dtype"], batch_size=options["batch_size"])
    steps, seed = options["steps"], options["seed"]
    turns = -(-num_images // options["batch_size"])
    with tqdm(total=turns * steps, unit="step") as bar:
        images = upscaler.upscale(
            pixels[None].repeat(num_images, axis=0),
            num_steps=steps,
            sampler=options["sampler"],
            eta=options["eta"],
            seed=seed,
            on_step=lambda denoised: bar.update(),
            **noise_level,
        )
    height, width = images.shape[1:3]
    said = {"prompt": "", "Steps": steps, "Sampler": options["sampler"], "Size": f"{width}x{height}"}
    _write(images, output, lambda index: said | {"Seed": seed + index, "Model": options["model"]})


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@output_option("walk.gif", "GIF, or PNG for a contact sheet.")
@click.option("--num-frames", default=24, type=click.IntRange(1), help="Frames of the whole walk.")
@click.option("--frame-rate", default=10.0, type=Number(1, 50), help="Frames a second of a GIF.")
@size_options
@prompt_options
@model_options()
def walk(prompts, output, overwrite, num_frames, frame_rate, height, width, **options):
    """Walk from prompt to prompt; with one PROMPTS, round a circle of noises."""
    output = check_output(output, (".gif", ".png"), default="walk.gif", overwrite=overwrite)
    pipeline, sampling = _open(options)
    frames = pipeline.random_walk(list(prompts), num_frames, height=height, width=width, **sampling)
    from keras_sd.images import image_grid, save_gif, save_png

    path = output.free()
    if path.suffix.lower() == ".gif":
        save_gif(frames, path, frame_rate)
    else:
        save_png(image_grid(frames), path)
    click.echo(path)


@click.command()
@click.argument("image")
@output_option("image.png")
@size_options
@model_options()
def reconstruct(image, height, width, **options):
    """Show what the autoencoder keeps of IMAGE."""
    pixels = _read_picture(image, height, width)
    output = _check_pictures(options)
    pipeline = open_model(**options)
    from keras_sd.images import save_png

    pixels = pipeline.reconstruct(pixels)[0]
    path = output.free()
    save_png(pixels, path)
    click.echo(path)


COMMANDS = (generate, image_to_image, inpaint, upscale, walk, reconstruct)


def _check_pictures(options, num_images=1):
    """Takes --output and --overwrite out of the options, and checks that the pictures can be written."""
    output, overwrite = options.pop("output"), options.pop("overwrite")

    def singles(path):
        indices = range(num_images) if num_images > 1 else ()
        return [path.with_stem(f"{path.stem}-{index}") for index in indices]

    return check_output(output, ".png", default="image.png", overwrite=overwrite, beside=singles)


def _open(options):
    """Opens the model that options name: the pipeline, and the options of a task."""
    names = ("model", "vae", "dtype", "batch_size", "loras", "lora_folder", "embeddings")
    model = {name: options.pop(name) for name in names}
    check_steps(model["model"], options["steps"])
    pipeline = open_model(**model)
    if options["guidance_scale"] is None:
        options["guidance_scale"] = pipeline.defaults.guidance_scale
    return pipeline, {"num_steps": options.pop("steps"), **options}


def _read_picture(path, height=None, width=None, mode="RGB"):
    from keras_sd.data.images import read_picture

    if (height is None) != (width is None):
        raise UserError("--height and --width: only one is given; give both, or none to keep the picture's")
    return read_picture(Path(path), (height, width) if height else None, mode)


def _save(pipeline, images, output, prompt, sampling, more=None):
    """Writes pictures of a pipeline; each says how it was made."""
    names = ("num_steps", "guidance_scale", "guidance_interval", "reuse_interval", "sampler", "eta")
    settings = {name: sampling[name] for name in ("negative_prompt", *names)}
    seed, size = sampling["seed"], images.shape[1:3]
    _write(
        images,
        output,
        lambda index: pipeline.parameters(prompt, seed=seed + index, size=size, **settings) | (more or {}),
    )


def _write(images, output, parameters):
    """Writes one picture, or a sheet of several and the single ones, with the parameters of each."""
    from keras_sd.images import image_grid, save_png

    path = output.free()
    files = [(path, images[0] if len(images) == 1 else image_grid(images), 0)]
    files += [(single, images[index], index) for index, single in enumerate(output.beside(path))]
    for path, image, index in files:
        save_png(image, path, parameters(index))
        click.echo(path)


def check_steps(model, steps):
    """Refuses more steps than a model's schedule has, where that can be read before a backend is loaded."""
    if Path(model).is_file():
        return  # tells it once it is open
    folder = Path(presets.find(model))
    from keras_sd.config import SchedulerConfig
    from keras_sd.weights.diffusers_folder import SCHEDULER

    if (folder / SCHEDULER).is_file():
        most = SchedulerConfig.load(folder / SCHEDULER).num_train_timesteps
        if steps > most:
            raise UserError(f"--steps {steps}: out of range; use 1 to {most}")


def open_model(model, loras=(), lora_folder=None, embeddings=(), **options):
    """Opens a preset, a hub id, a folder or a file; an unknown name fails before a backend is loaded.

    Args:
        loras: paths of LoRAs, each with ":weight" behind it if it is not 1.
        lora_folder: where prompts find LoRAs by their names.
        embeddings: paths of textual inversions, each with ":token" behind it to call its word otherwise.
    """
    source = model if Path(model).is_file() else presets.find(model)
    updates = [_path_and_weight(text) for text in loras]
    for path in [path for path, _ in updates] + ([lora_folder] if lora_folder else []):
        if not Path(path).exists():
            raise UserError(f"{path}: no such LoRA; give a file, or a folder that holds one")
    words = [_path_and_token(text) for text in embeddings]
    from keras_sd.pipeline import StableDiffusion

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
