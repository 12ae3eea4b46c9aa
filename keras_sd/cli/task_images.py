"""The images that commands read and write, at the size that the model takes and with their parameters."""

import sys
from pathlib import Path

import click

from keras_sd.arguments import LARGEST_SEED, LONGEST_SIDE, MOST_IMAGES
from keras_sd.cli.command import decorated

# Whatever loads a backend is imported inside the functions, after the options have been checked.
from keras_sd.cli.model_options import check_size, size_factor
from keras_sd.cli.outputs import check_output
from keras_sd.errors import UserError

SIDE = click.IntRange(8, LONGEST_SIDE)


def size_options(meaning):
    """Return a decorator that adds --height and --width."""
    return decorated(*(click.option(flag, type=SIDE, help=meaning) for flag in ("--height", "--width")))


image_size_options = size_options("Scale IMAGE to this size, in pixels. By default its own size.")
output_size_options = size_options("Size in pixels, a multiple of 8. By default the model's own.")

num_images_option = click.option(
    "--num-images", default=1, type=click.IntRange(1, MOST_IMAGES), help="Number of images."
)


def check_images(options, num_images=1):
    """Remove --output and --overwrite from the options, and check that the images can be written."""
    output, overwrite = options.pop("output"), options.pop("overwrite")

    def singles(path):
        indices = range(num_images) if num_images > 1 else ()
        return [path.with_stem(f"{path.stem}-{index}") for index in indices]

    return check_output(output, ".png", default="image.png", overwrite=overwrite, beside=singles)


def read_task_image(path, options=None, height=None, width=None):
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


def read_task_mask(path, image, size, is_scaled):
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


def image_parameters_of(pipeline, prompt, sampling, size, index=0):
    """Return the parameters of image `index` for its file."""
    settings = sampling | {"seed": image_seed(sampling["seed"], index)}
    return pipeline.parameters(prompt, size=size, **settings)


def image_seed(seed, index):
    """Return the seed of an image, as `arguments.image_seeds` counts."""
    return (seed + index) % (LARGEST_SEED + 1)


def save_images(pipeline, images, output, prompt, sampling, more=None, size=None):
    """Write images of a pipeline with their parameters.

    Args:
        more: further parameters.
        size: `(height, width)` in which the pipeline made them, if it is not theirs.
    """
    size = size or images.shape[1:3]

    def parameters(index):
        return image_parameters_of(pipeline, prompt, sampling, size, index) | (more or {})

    write_images(images, output, parameters)


def write_images(images, output, parameters):
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
