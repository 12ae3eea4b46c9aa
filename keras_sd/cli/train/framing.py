"""The options of all training commands that say how images are resized, cropped and flipped."""

import sys

import click

from keras_sd.cli.command import in_flags, refuse_unused
from keras_sd.cli.option_types import COUNT, SIDE
from keras_sd.data.framing import INTERPOLATIONS
from keras_sd.errors import UserError
from keras_sd.pipeline.defaults import ModelDefaults

ENABLED_BUCKETS = 9  # of --enable-bucket

_BUCKETS = ("aspect_ratio_buckets", "enable_bucket", "bucket_upscale")
# Methods whose networks or losses take images of one size only, and why.
_ONE_SHAPE = {
    "clip": "as the image encoder has one size",
    "super-resolution": "as this method trains on squares of --crop-size",
}


def framing_options(flips):
    """Return the options' names and the options.

    Args:
        flips: whether half of the images are mirrored by default.
    """
    return [
        (
            "resolution",
            click.option(
                "--resolution",
                type=SIDE,
                show_default="the model's own",
                help="Side of the training images in pixels, a multiple of 8. Buckets have the area of this "
                "square.",
            ),
        ),
        (
            "center_crop",
            click.option(
                "--center-crop/--no-center-crop",
                default=True,
                help="Crop the middle of each image, or a part that is drawn anew each time.",
            ),
        ),
        (
            "random_flip",
            click.option(
                "--random-flip/--no-random-flip", default=flips, help="Mirror half of the images at random."
            ),
        ),
        (
            "interpolation",
            click.option(
                "--interpolation",
                "--image-interpolation-mode",
                default="lanczos",
                type=click.Choice(INTERPOLATIONS),
                help="Filter by which images are resized.",
            ),
        ),
        (
            "aspect_ratio_buckets",
            click.option(
                "--aspect-ratio-buckets",
                type=COUNT,
                show_default="1, squares",
                help="Crop each image to the nearest of at most N ratios from 1:2 to 2:1, of equal area. A "
                "batch is of one ratio, and a step is compiled for each.",
            ),
        ),
        (
            "enable_bucket",
            click.option(
                "--enable-bucket",
                is_flag=True,
                help=f"As --aspect-ratio-buckets {ENABLED_BUCKETS}, whose number counts if both are given.",
            ),
        ),
        (
            "bucket_upscale",
            click.option(
                "--bucket-upscale/--bucket-no-upscale",
                default=False,
                help="Enlarge images that are smaller than their bucket. By default they are an error; "
                "--on-bad-sample skip leaves them out.",
            ),
        ),
    ]


train_batch_size_option = click.option(
    "--train-batch-size",
    type=COUNT,
    show_default="the model's own for LoRA; usually 4",
    help="Images in a batch of the training: buckets that an epoch shows fewer images of are merged.",
)


def train_batch_size_of(options, model):
    """Return the batch size of the training that a command prepares.

    Args:
        options: of the command.
        model: path of the model.
    """
    default = ModelDefaults.load(model).training("lora")["train_batch_size"]
    return options["train_batch_size"] or default


def check_framing(method, options):
    """Check the options against each other and the method, and fill in the number of buckets.

    Raises:
        UserError: an option has no effect, or the method cannot honour it.
    """
    if options["aspect_ratio_buckets"] is None:
        options["aspect_ratio_buckets"] = ENABLED_BUCKETS if options["enable_bucket"] else 1
    reason = _ONE_SHAPE.get(method)
    if options.get("crop_size") and not reason:
        reason = "with --crop-size, whose squares have one size"
    if options.get("with_prior_preservation"):
        reason = "with --with-prior-preservation: both images of a pair have one size"
    if reason:
        refuse_unused(_BUCKETS, False, reason)
        if options["aspect_ratio_buckets"] > 1:  # of a --dataset-config
            raise UserError(f"--aspect-ratio-buckets: has no effect {reason}; leave it out")
    if method == "clip":
        refuse_unused(["resolution"], False, _ONE_SHAPE["clip"])
        if options["resolution"]:
            raise UserError(f"--resolution: has no effect {_ONE_SHAPE['clip']}; leave it out")
    if not options["center_crop"] and options.get("cache_latents") in ("memory", "disk"):
        raise UserError(
            f"--cache-latents {options['cache_latents']}: keeps one crop of an image, and --no-center-crop "
            "draws another each time; use --cache-latents off, or leave out --no-center-crop"
        )
    refuse_unused(["bucket_upscale"], options["aspect_ratio_buckets"] > 1, "without --aspect-ratio-buckets")


def framing_of(options, own_size):
    """Return the `Framing` of a command's options.

    Args:
        own_size: side in pixels of the model's images, the default resolution.
    """
    from keras_sd.data.framing import Framing

    return Framing(
        options["resolution"] or own_size,
        "center" if options["center_crop"] else "random",
        options["random_flip"],
        options["interpolation"],
        options["aspect_ratio_buckets"],
        options["bucket_upscale"],
    )


def check_small_images(source, options, model):
    """Raise UserError for images that are smaller than their bucket, before a backend is loaded.

    Args:
        source: the source of the run, not framed; or None.
        options: of the command, with the model's defaults filled in.
        model: path of the pretrained model; or None.
    """
    if source is None or options["aspect_ratio_buckets"] == 1 or options.get("on_bad_sample") == "skip":
        return
    side = options["resolution"] or (model and own_size_of(model))
    if side:
        from keras_sd.data.framing import FramedSource

        FramedSource(source, framing_of(options, side), options["train_batch_size"])


def own_size_of(model):
    """Return the side of a model's images in pixels, by its configs; None for a part of a model."""
    from keras_sd.config import UNetConfig, VAEConfig
    from keras_sd.weights.readers import read_configs

    parts = read_configs(model).parts
    if not {"unet", "vae"} <= parts.keys():
        return None
    factor = VAEConfig.from_dict(parts["vae"].config).downsampling
    return UNetConfig.from_dict(parts["unet"].config).sample_size * factor


def framed(source, framing, batch_size, on_bad_sample="error"):
    """Return the `FramedSource` of a run, and print how its images fall into buckets.

    Args:
        on_bad_sample: "skip" leaves out images that are smaller than their bucket.

    Raises:
        UserError: images are too small.
    """
    from keras_sd import backend
    from keras_sd.data.framing import framed_source

    result = framed_source(source, framing, batch_size, on_bad_sample)
    if backend.process_index() == 0:
        for line in result.summary():
            print(in_flags(line), file=sys.stderr, flush=True)
    return result


def check_sides(framing, factor):
    """Raise UserError unless the sides of all buckets are multiples of a VAE's factor."""
    if any(side % factor for size in framing.grid() for side in size):
        raise UserError(
            f"resolution {framing.resolution}: does not fit the VAE, as the sides of all buckets must be "
            f"multiples of {factor}; give another one"
        )
