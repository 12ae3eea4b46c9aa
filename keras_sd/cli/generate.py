"""The commands that generate images: one for each task of `StableDiffusion`."""

import click

from keras_sd.arguments import MOST_IMAGES, first_step

# Whatever loads a backend is imported inside the commands, after their options have been checked.
from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.model_options import check_size, model_options, open_model
from keras_sd.cli.option_types import Number
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.sampling_options import fill_sampling, open_for_sampling, prompt_options
from keras_sd.cli.task_images import (
    check_images,
    image_parameters_of,
    image_size_options,
    num_images_option,
    output_size_options,
    read_task_image,
    read_task_mask,
    save_images,
)
from keras_sd.cli.upscale import second_stage, second_stage_options
from keras_sd.errors import UserError


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
@second_stage_options
@prompt_options
@model_options()
def generate(prompt, num_images, height, width, **options):
    """Generate images from PROMPT.

    One image is written to the file named by --output. Of several images, heart.png shows all side by side,
    and heart-0.png, heart-1.png, ... are the single ones. Each file holds the parameters that made it.
    Without --output no file is replaced: image.png, image-1.png, ...

    \b
    keras-sd generate "red heart" --num-images 4 --seed 1 --output heart.png
    """
    output = check_images(options, num_images)
    check_size(options, height, width)
    fill_sampling(options["model"], options)
    stage = second_stage(options)
    pipeline, sampling = open_for_sampling(options)
    upscaled = stage and stage.open()
    images = pipeline.text_to_image(prompt, num_images=num_images, height=height, width=width, **sampling)
    if not stage:
        save_images(pipeline, images, output, prompt, sampling)
        return
    drawn = images.shape[1:3]
    images = upscaled(images, prompt, sampling["negative_prompt"], seed=sampling["seed"])
    more = stage.parameters(images.shape[1] // drawn[0])
    save_images(pipeline, images, output, prompt, sampling, more, size=drawn)


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
    """Generate images from PROMPT that start from IMAGE.

    \b
    keras-sd image-to-image photo.png "an oil painting" --strength 0.6
    """
    fill_sampling(options["model"], options)
    first_step(strength, options["num_inference_steps"])
    pixels = read_task_image(image, options, height, width)
    output = check_images(options, num_images)
    pipeline, sampling = open_for_sampling(options)
    images = pipeline.image_to_image(pixels, prompt, num_images=num_images, strength=strength, **sampling)
    save_images(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


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

    \b
    keras-sd inpaint photo.png mask.png "a garden bench"
    """
    fill_sampling(options["model"], options)
    first_step(strength, options["num_inference_steps"])
    pixels = read_task_image(image, options, height, width)
    is_scaled = height is not None or width is not None
    mask = read_task_mask(mask, image, pixels.shape[:2], is_scaled)
    output = check_images(options, num_images)
    pipeline, sampling = open_for_sampling(options)
    images = pipeline.inpaint(pixels, mask, prompt, num_images=num_images, strength=strength, **sampling)
    save_images(pipeline, images, output, prompt, sampling, {"Denoising strength": strength})


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
    """Interpolate between PROMPTS; with a single one, vary the noise along a circle.

    \b
    keras-sd walk "red heart" "blue heart" --output walk.gif
    """
    output = check_output(output, (".gif", ".png"), default="walk.gif", overwrite=overwrite)
    refuse_unused({"frame_rate"}, output.path.suffix.lower() == ".gif", "on a PNG file")
    if num_frames < len(prompts):
        raise UserError(f"num_frames {num_frames}: fewer than the {len(prompts)} prompts; use more")
    check_size(options, height, width)
    fill_sampling(options["model"], options)
    pipeline, sampling = open_for_sampling(options)
    frames = pipeline.random_walk(list(prompts), num_frames, height=height, width=width, **sampling)
    from keras_sd.files.image_files import image_grid, save_gif, save_png
    from keras_sd.pipeline.image_parameters import number

    path = output.free()
    text = image_parameters_of(pipeline, prompts, sampling, frames.shape[1:3]) | {"Frames": num_frames}
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
    """Encode and decode IMAGE with the VAE, to show what it preserves.

    \b
    keras-sd reconstruct photo.png --output same.png
    """
    unused = {"loras", "lora_folder", "embeddings", "quantize"}
    refuse_unused(unused, False, "on the VAE, which alone is used")
    pixels = read_task_image(image, options, height, width)
    output = check_images(options)
    pipeline = open_model(**options)
    from keras_sd.files.image_files import save_png

    pixels = pipeline.reconstruct(pixels)[0]
    path = output.free()
    save_png(pixels, path)
    click.echo(path)
