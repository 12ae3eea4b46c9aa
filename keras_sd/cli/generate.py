"""The commands that generate images: one for each task of `StableDiffusion`."""

import sys
from pathlib import Path

import click

from keras_sd import interruption, presets
from keras_sd.arguments import (
    LARGEST_SEED,
    LONGEST_SIDE,
    MOST_IMAGES,
    checked_interval,
    first_step,
    whole_number,
)

# Whatever loads a backend is imported inside the commands, after their options have been checked.
from keras_sd.cli.command import Command, decorated, refuse_unused
from keras_sd.cli.model_options import (
    check_sampling,
    check_size,
    model_options,
    open_model,
    size_factor,
    skipped_layers,
)
from keras_sd.cli.option_types import NOT_NEGATIVE, SHARE, Number
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.diffusion.samplers import SAMPLERS, sampler_key
from keras_sd.errors import UserError
from keras_sd.weights.diffusers_folder import holds_pixel_upscaler

sampling_options = decorated(
    click.option(
        "--num-inference-steps",
        default=30,
        type=click.IntRange(1),
        help="Denoising steps for an image; the time is proportional to them.",
    ),
    click.option(
        "--guidance-scale",
        type=NOT_NEGATIVE,
        show_default="the model's own; usually 7.5",
        help="Strength of classifier-free guidance (CFG scale); 1 or less: no guidance, half the time.",
    ),
    click.option(
        "--guidance-interval",
        default=(0.0, 1.0),
        type=(SHARE, SHARE),
        metavar="START END",
        help="Fractions of the steps between which there is guidance; other steps take half the time.",
    ),
    click.option(
        "--reuse-interval",
        default=1,
        type=click.IntRange(1),
        help="Run the whole UNet every N steps; steps between reuse its deep features (DeepCache).",
    ),
    click.option(
        "--seed", default=0, type=click.IntRange(0, LARGEST_SEED), help="Image i uses this seed + i."
    ),
)


class _SamplerChoice(click.Choice):
    def convert(self, value, parameter, context):
        return super().convert(sampler_key(value), parameter, context)


prompt_options = decorated(
    click.option("--negative-prompt", help="What the images must not show. By default nothing."),
    sampling_options,
    click.option(
        "--sampler",
        type=_SamplerChoice(tuple(SAMPLERS)),
        help="By default the one that the model names. A1111's names are understood.",
    ),
    click.option(
        "--eta", default=0.0, type=SHARE, help="Fraction of fresh noise in a step of DDIM and TCD; 0: none."
    ),
    click.option(
        "--guidance-rescale",
        default=0.0,
        type=SHARE,
        help="Reduce overexposure by guidance; 0: off, usually 0.7.",
    ),
    click.option(
        "--clip-skip",
        default=1,
        type=click.IntRange(1, 1000),
        help="Layer of the text encoder that is used, counted from the last, which is 1, as in A1111.",
    ),
)

SIDE = click.IntRange(8, LONGEST_SIDE)


def size_options(meaning):
    """Return a decorator that adds --height and --width."""
    return decorated(*(click.option(flag, type=SIDE, help=meaning) for flag in ("--height", "--width")))


image_size_options = size_options("Scale IMAGE to this size, in pixels. By default its own size.")
output_size_options = size_options("Size in pixels, a multiple of 8. By default the model's own.")

num_images_option = click.option(
    "--num-images", default=1, type=click.IntRange(1, MOST_IMAGES), help="Number of images."
)


def strength_option(default):
    return click.option(
        "--strength",
        default=default,
        type=Number(0, 1, min_open=True),
        help="Fraction of the denoising that is done again; 1: IMAGE is replaced completely.",
    )


@click.command(cls=Command)
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@output_size_options
@prompt_options
@model_options()
def generate(prompt, num_images, height, width, **options):
    """Generate images from PROMPT.

    One image is written to the file named by --output. Of several images, heart.png shows all side by side,
    and heart-0.png, heart-1.png, ... are the single ones. Each file holds the parameters that made it.
    Without --output no file is replaced: image.png, image-1.png, ...
    """
    output = _check_images(options, num_images)
    check_size(options, height, width)
    pipeline, sampling = _open(options)
    images = pipeline.text_to_image(prompt, num_images=num_images, height=height, width=width, **sampling)
    _save(pipeline, images, output, prompt, sampling)


@click.command(cls=Command)
@click.argument("image")
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@strength_option(0.8)
@image_size_options
@prompt_options
@model_options()
def image_to_image(image, prompt, num_images, strength, height, width, **options):
    """Generate images from PROMPT that start from IMAGE."""
    first_step(strength, options["num_inference_steps"])
    pixels = _read_image(image, options, height, width)
    output = _check_images(options, num_images)
    pipeline, sampling = _open(options)
    images = pipeline.image_to_image(pixels, prompt, num_images=num_images, strength=strength, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


@click.command(cls=Command)
@click.argument("image")
@click.argument("mask")
@click.argument("prompt")
@output_option("image.png")
@num_images_option
@strength_option(1.0)
@image_size_options
@prompt_options
@model_options()
def inpaint(image, mask, prompt, num_images, strength, height, width, **options):
    """Replace the white part of MASK, an image of IMAGE's size, as PROMPT says.

    Transparent parts of MASK are kept. If no opaque part of it is white, as in a layer painted in another
    colour, all opaque parts are replaced.
    """
    first_step(strength, options["num_inference_steps"])
    pixels = _read_image(image, options, height, width)
    is_scaled = height is not None or width is not None
    mask = _read_mask(mask, image, pixels.shape[:2], is_scaled)
    output = _check_images(options, num_images)
    pipeline, sampling = _open(options)
    images = pipeline.inpaint(pixels, mask, prompt, num_images=num_images, strength=strength, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


@click.command(cls=Command)
@click.argument("image")
@click.argument("prompt", default="")
@output_option("image.png")
@num_images_option
@click.option(
    "--noise-level",
    type=click.IntRange(0),
    help="Noise added to IMAGE, in timesteps; more lets the model invent more. By default the model's own.",
)
@prompt_options
@model_options("emoji-upscaler")
def upscale(image, prompt, num_images, noise_level, **options):
    """Upscale IMAGE: 2x with the bundled model, 4x with Stable Diffusion's x4 upscaler.

    The bundled upscaler takes no PROMPT.
    """
    pixels = _read_image(image)
    output = _check_images(options, num_images)
    folder = presets.find(options["model"])
    more = {} if noise_level is None else {"noise_level": noise_level}
    _check_upscaler(options["model"], folder, noise_level)
    if holds_pixel_upscaler(folder):
        if prompt:
            raise UserError(f"{options['model']}: takes no prompt; leave it out, or give a model with text")
        unused = {"guidance_scale", "guidance_interval", "guidance_rescale", "negative_prompt"}
        unused |= {"vae", "loras", "lora_folder", "embeddings", "clip_skip"}
        refuse_unused(unused, False, f"on {options['model']}, which takes no text")
        check_sampling(folder, options)
        _upscale_pixels(folder, pixels, output, num_images, more, options)
        return
    pipeline, sampling = _open(options)
    images = pipeline.upscale(pixels, prompt, num_images=num_images, **more, **sampling)
    _save(pipeline, images, output, prompt, sampling, {"Noise level": more.get("noise_level", 20)})


def _check_upscaler(model, folder, noise_level):
    """Raise UserError for a model that is no upscaler, or lacks the noise level, if its config says so."""
    if not (folder / "unet" / "config.json").is_file():
        return
    from keras_sd.config import UNetConfig

    levels = UNetConfig.load(folder / "unet" / "config.json").num_class_embeds
    if not levels:
        raise UserError(f"model {model}: is no upscaler; use emoji-upscaler, x4-upscaler or another one")
    if noise_level is not None:
        whole_number("noise_level", noise_level, 0, levels - 1)


def _upscale_pixels(folder, pixels, output, num_images, noise_level, options):
    """Upscale with a pixel upscaler, which has no text encoder, and write the images."""
    from tqdm import tqdm

    with interruption.phase(f"opening {options['model']}"):
        from keras_sd.pipeline.upscaler import Upscaler

        upscaler = Upscaler.load(
            folder, **{name: options[name] for name in ("dtype", "batch_size", "jit_compile")}
        )
    seed = options["seed"]
    turns = -(-num_images // options["batch_size"])
    settings = {name: options[name] for name in ("num_inference_steps", "sampler", "eta", "reuse_interval")}
    with tqdm(total=turns * options["num_inference_steps"], unit="step") as bar:
        images = upscaler.upscale(
            pixels[None].repeat(num_images, axis=0),
            seed=seed,
            **settings,
            on_step=lambda denoised: bar.update(),
            **noise_level,
        )
    from keras_sd.pipeline.image_parameters import sampling_parameters

    settings |= {"scheduler_config": upscaler.scheduler_config, "guidance_scale": 1.0}
    settings["size"] = images.shape[1:3]
    more = {"Noise level": noise_level.get("noise_level", 0), "Model": options["model"]}
    if options["dtype"] != "float32":
        more["Precision"] = options["dtype"]
    _write(images, output, lambda index: sampling_parameters("", seed=_seed(seed, index), **settings) | more)


@click.command(cls=Command)
@click.argument("prompts", nargs=-1, required=True)
@output_option("walk.gif", "GIF file, or PNG file for a contact sheet.")
@click.option(
    "--num-frames", default=24, type=click.IntRange(1, MOST_IMAGES), help="Frames of the whole walk."
)
@click.option("--frame-rate", default=10.0, type=Number(1, 50), help="Frames per second of a GIF.")
@output_size_options
@prompt_options
@model_options()
def walk(prompts, output, overwrite, num_frames, frame_rate, height, width, **options):
    """Interpolate between PROMPTS; with a single one, vary the noise along a circle."""
    output = check_output(output, (".gif", ".png"), default="walk.gif", overwrite=overwrite)
    refuse_unused({"frame_rate"}, output.path.suffix.lower() == ".gif", "on a PNG file")
    if num_frames < len(prompts):
        raise UserError(f"num_frames {num_frames}: fewer than the {len(prompts)} prompts; use more")
    check_size(options, height, width)
    pipeline, sampling = _open(options)
    frames = pipeline.random_walk(list(prompts), num_frames, height=height, width=width, **sampling)
    from keras_sd.files.image_files import image_grid, save_gif, save_png
    from keras_sd.pipeline.image_parameters import number

    path = output.free()
    text = _parameters(pipeline, prompts, sampling, frames.shape[1:3]) | {"Frames": num_frames}
    if path.suffix.lower() == ".gif":
        save_gif(frames, path, frame_rate, text | {"Frame rate": number(frame_rate)})
    else:
        save_png(image_grid(frames), path, text)
    click.echo(path)


@click.command(cls=Command)
@click.argument("image")
@output_option("image.png")
@image_size_options
@model_options()
def reconstruct(image, height, width, **options):
    """Encode and decode IMAGE with the VAE, to show what it preserves."""
    refuse_unused({"loras", "lora_folder", "embeddings"}, False, "on the VAE, which alone is used")
    pixels = _read_image(image, options, height, width)
    output = _check_images(options)
    pipeline = open_model(**options)
    from keras_sd.files.image_files import save_png

    pixels = pipeline.reconstruct(pixels)[0]
    path = output.free()
    save_png(pixels, path)
    click.echo(path)


COMMANDS = (generate, image_to_image, inpaint, upscale, walk, reconstruct)


def _check_images(options, num_images=1):
    """Remove --output and --overwrite from the options, and check that the images can be written."""
    output, overwrite = options.pop("output"), options.pop("overwrite")

    def singles(path):
        indices = range(num_images) if num_images > 1 else ()
        return [path.with_stem(f"{path.stem}-{index}") for index in indices]

    return check_output(output, ".png", default="image.png", overwrite=overwrite, beside=singles)


def _open(options):
    """Open the model that the options name; return the pipeline and the remaining options of the task."""
    names = ("model", "vae", "dtype", "batch_size", "loras", "lora_folder", "embeddings", "jit_compile")
    model = {name: options.pop(name) for name in names}
    check_sampling(model["model"], options)
    checked_interval(options["guidance_interval"])
    pipeline = open_model(**model)
    if options["guidance_scale"] is None:
        options["guidance_scale"] = pipeline.defaults.guidance_scale
    options["clip_skip"] = skipped_layers(pipeline.text_encoder, options["clip_skip"])
    return pipeline, options


def _read_image(path, options=None, height=None, width=None):
    """Return the pixels of an image file, in the given size or, with a model's options, one that fits it.

    A side that is not given follows from the image's ratio. Sides are rounded to what the model can take.
    """
    from keras_sd.data.images import examine_image, read_image

    if options is None:
        return read_image(Path(path))
    check_size(options, height, width)
    own, factor = examine_image(Path(path))[:2], size_factor(options)
    if height is None and width is None:
        # Rounded down, as diffusers does.
        height, width = (max(factor, side - side % factor) for side in own)
        if (height, width) != own:
            print(
                f"{path}: {own[1]} x {own[0]} pixels, scaled to {width} x {height}, multiples of {factor}",
                file=sys.stderr,
            )
    elif height is None:
        height = max(factor, round(width * own[0] / own[1] / factor) * factor)
    elif width is None:
        width = max(factor, round(height * own[1] / own[0] / factor) * factor)
    return read_image(Path(path), (height, width))


def _read_mask(path, image, size, is_scaled):
    """Return the mask for an image, at the size in which that is read.

    Args:
        path, image: the files.
        size: height and width in pixels.
        is_scaled: whether the user has given a size, so that the mask may have any.
    """
    from keras_sd.data.images import examine_image, read_mask

    (own_height, own_width, _), (height, width, _) = (examine_image(Path(file)) for file in (path, image))
    if not is_scaled and (own_height, own_width) != (height, width):
        raise UserError(
            f"{path}: is {own_width}x{own_height}, the image {width}x{height}; scale it to the image's size, "
            "or both with --height and --width"
        )
    return read_mask(Path(path), size)


def _parameters(pipeline, prompt, sampling, size, index=0):
    """Return the parameters of image `index` for its file."""
    settings = sampling | {"seed": _seed(sampling["seed"], index)}
    return pipeline.parameters(prompt, size=size, **settings)


def _seed(seed, index):
    """Return the seed of an image, as `arguments.image_seeds` counts."""
    return (seed + index) % (LARGEST_SEED + 1)


def _save(pipeline, images, output, prompt, sampling, more=None):
    """Write images of a pipeline with their parameters."""

    def parameters(index):
        return _parameters(pipeline, prompt, sampling, images.shape[1:3], index) | (more or {})

    _write(images, output, parameters)


def _write(images, output, parameters):
    """Write one image, or a grid of several and the single ones, each with its parameters."""
    from keras_sd.files.image_files import image_grid, save_png

    path = output.free()
    if len(images) == 1:
        files = [(path, images[0], parameters(0))]
    else:
        files = [(path, image_grid(images), parameters(0) | {"Batch size": len(images)})]
        for index, single in enumerate(output.beside(path)):
            place = {"Batch size": len(images), "Batch pos": index}
            files.append((single, images[index], parameters(index) | place))
    for path, image, text in files:
        save_png(image, path, text)
        click.echo(path)
