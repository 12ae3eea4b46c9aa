"""KID and FID of a training command: which images are measured, and through which network."""

import warnings

from keras_sd import interruption, presets
from keras_sd.cli.command import is_given, refuse_unused
from keras_sd.cli.train.options import FEWEST_FOR_KID


def check_kid(options):
    """Raise UserError for options of KID without effect."""
    refuse_unused(["kid", "inception_weights"], options["kid_images"], "with --kid-images 0")
    is_published = options["kid"] == "kid_inception"
    refuse_unused(["inception_weights"], is_published, "without --kid kid_inception")


def open_inception(options):
    """Return the extractor of Inception v3, or None if KID is measured by another network, or not at all.

    The published weights are found, or downloaded, before a model is opened and images are encoded.
    """
    is_measured = options.get("kid_images") and options["evaluation_steps"]
    if not is_measured or options["kid"] == "kid_emoji":
        return None
    from keras_sd.metrics.features import InceptionFeatures, PublishedInceptionFeatures

    compiled = options["jit_compile"]
    with interruption.phase("opening Inception v3"):
        if options["kid"] == "kid_inception":
            return PublishedInceptionFeatures(options["inception_weights"], jit_compile=compiled)
        return InceptionFeatures(75, jit_compile=compiled)


def extractor_of(run, open_image_encoder):
    """Return the feature extractor of a run: Inception v3, or CLIP's image encoder with kid_emoji.

    Args:
        open_image_encoder: returns the image encoder, or None if the model has none. Then the result is
            None, too, with a warning if the user has asked for KID.
    """
    from keras_sd.metrics.features import ClipFeatures

    if run.inception is not None:
        return run.inception
    image_encoder, count = open_image_encoder(), run.options["kid_images"]
    if image_encoder is not None:
        return ClipFeatures(image_encoder, jit_compile=run.settings.jit_compile)
    if run.options["evaluation_steps"] and count and (is_given("kid_images") or is_given("kid")):
        warnings.warn(
            f"--kid-images {count}: not measured, as the model has no image encoder for kid_emoji; give "
            "--kid kid_inception",
            stacklevel=2,
        )
    return None


def emoji_image_encoder():
    """Return the image encoder of the bundled model."""
    from keras_sd.weights.loading import load_part

    return load_part(presets.find("emoji"), "image_encoder")


def example_sets(source, held_out, count):
    """Return the examples that KID is measured on, evenly spaced in each split that has enough of them."""
    from keras_sd.data.sources import evenly

    splits = {"train": source, "held_out": held_out}
    if count and 0 < len(held_out) < FEWEST_FOR_KID:
        warnings.warn(
            f"{len(held_out)} images are held out, too few for KID, which is measured on training images "
            f"alone; hold out {FEWEST_FOR_KID} or more",
            stacklevel=3,
        )
    return {
        name: evenly(split, count) for name, split in splits.items() if count and len(split) >= FEWEST_FOR_KID
    }
