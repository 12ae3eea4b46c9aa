"""The options of the alignment of a UNet's features with an image encoder's, and the model that they name."""

import click

from keras_sd import presets
from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.option_types import NOT_NEGATIVE
from keras_sd.cli.train.caching import caching_of
from keras_sd.cli.train.opening import find_part
from keras_sd.errors import UserError

_PART = "image_encoder"

alignment_options = decorated(
    click.option(
        "--alignment-weight",
        default=0.0,
        type=NOT_NEGATIVE,
        help="Weight of the similarity between the UNet's bottleneck and an image encoder's features (REPA), "
        "which lets a new UNet learn in fewer steps; usually 0.5. 0: none.",
    ),
    click.option(
        "--alignment-model",
        help="Preset, folder or file with that image encoder, a CLIP. By default the model's own.",
    ),
)


def check_alignment(options):
    """Check the options of the alignment before anything is opened.

    Raises:
        UserError: an option has no effect, or there is no image encoder.
    """
    refuse_unused(["alignment_model"], options["alignment_weight"], "without --alignment-weight")
    if not options["alignment_weight"]:
        return
    caching_of(options).refuse_disk_for_alignment()
    if options["alignment_model"]:
        find_part(options["alignment_model"], _PART)
        return
    folders = [presets.find(options["pretrained_model_name_or_path"])]
    if options["pretrained_clip"]:
        folders.append(presets.find(options["pretrained_clip"]))
    # What a single file holds is known when it is opened.
    if all(folder.is_dir() and not (folder / _PART).is_dir() for folder in folders):
        raise _missing(options)


def _missing(options):
    return UserError(
        f"--alignment-weight {options['alignment_weight']:g}: {options['pretrained_model_name_or_path']} has "
        "no image encoder; name a CLIP that has one by --alignment-model, such as emoji"
    )


def alignment_of(pipeline, options):
    """Return the `Alignment` of a pipeline's UNet by the options; None without one.

    Raises:
        UserError: there is no image encoder, or it cannot be opened.
    """
    if not options["alignment_weight"]:
        return None
    from keras_sd.training.alignment import Alignment
    from keras_sd.weights.loading import load_part

    encoder = pipeline.image_encoder
    if options["alignment_model"]:
        encoder = load_part(presets.find(options["alignment_model"]), _PART)
    if encoder is None:
        raise _missing(options)
    downsampling = pipeline.vae.config.downsampling
    return Alignment(encoder, pipeline.unet, downsampling, options["alignment_weight"])
