"""The options of masked losses: which parts of an image a model learns from."""

from pathlib import Path

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import SHARE
from keras_sd.errors import UserError

mask_options = decorated(
    click.option(
        "--alpha-mask",
        is_flag=True,
        help="Learn from an image as far as its alpha channel is opaque.",
    ),
    click.option(
        "--mask-data-dir",
        type=click.Path(),
        help="Folder of masks with the names and sizes of the training images: white parts are learned, "
        "black ones are not, grey ones in part.",
    ),
    click.option(
        "--unmasked-weight", type=SHARE, help="Weight of parts that are masked out, 0 to 1. By default 0."
    ),
)


def masks_of(options):
    """Return the `data.masks.MaskFiles` of a command's options; without any it is false.

    Raises:
        UserError: an option has no effect.
    """
    from keras_sd.data.masks import MaskFiles

    if options.get("dataset_config"):  # which says where masks are
        return MaskFiles()
    folder = options.get("mask_data_dir")
    return MaskFiles(
        bool(options.get("alpha_mask")),
        None if folder is None else Path(folder),
        options.get("unmasked_weight"),
    )


def refuse_masks(source, options, method):
    """Raise UserError for a --dataset-config with masks, for a method that counts all of an image."""
    if getattr(source, "has_masks", False):
        keys = "alpha_mask and conditioning_data_dir"
        raise UserError(f"{options['dataset_config']}: {keys} have no effect with {method}; remove them")
