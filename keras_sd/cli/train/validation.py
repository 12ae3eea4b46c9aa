"""The options of the validation loss, the images that it is measured on, and those that are held out."""

import warnings

import click
import numpy as np

from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.option_types import FROM_ZERO, Number
from keras_sd.cli.train.options import OF_EVALUATIONS
from keras_sd.errors import UserError
from keras_sd.training.run_folder import changed_options

USUAL_STEPS = 500
_USUAL_EXAMPLES = 64

_steps_option = click.option(
    "--validation-steps",
    type=FROM_ZERO,
    show_default=f"{USUAL_STEPS}; 0 in shorter runs",
    help="Measure the loss on fixed images, noise and timesteps every N updates, before the first and after "
    "the last one; 0: never.",
)
_examples_option = click.option(
    "--validation-examples",
    default=_USUAL_EXAMPLES,
    type=click.IntRange(1, 4096),
    help="Draws of an image, a noise and a timestep that the validation loss is measured on; fewer images "
    "are drawn several times.",
)
_split_option = click.option(
    "--validation-split",
    type=Number(min=0, max=1, min_open=True, max_open=True),
    help="Share of the images that is not trained on, for evaluations and the validation loss, if the data "
    "has no split `validation`.",
)

of_training_images = decorated(_steps_option, _examples_option)
"""Adds the options of methods that measure the validation loss on their training images."""

validation_options = decorated(_steps_option, _examples_option, _split_option)
"""Adds the options of methods that measure it on held-out images, too."""


def choose_validation(options):
    """Set `validation_steps` where it is not given, and refuse options that have no effect."""
    if "validation_steps" not in options:
        return
    if options["validation_steps"] is None:
        options["validation_steps"] = USUAL_STEPS if options["max_train_steps"] >= USUAL_STEPS else 0
        if not options["validation_steps"]:
            reason = f"in a run of fewer than {USUAL_STEPS} steps without --validation-steps"
            refuse_unused(["validation_examples"], False, reason)
    refuse_unused(["validation_examples"], options["validation_steps"], "with --validation-steps 0")
    uses_split = options["validation_steps"] or options["evaluation_steps"]
    reason = "without --validation-steps or --evaluation-steps, which measure on it"
    refuse_unused(["validation_split"], uses_split, reason)


def warn_of_other_evaluations(options):
    """Warn if a resumed run evaluates in another way than before, so that figures cannot be compared."""
    names = [name for name in (*OF_EVALUATIONS, "validation_examples") if name != "sample_at_first"]
    changed = changed_options(options["output_dir"], names)
    if changed:
        said = "; ".join(
            f"`{name}` {_value(now)}, before {_value(then)}" for name, (then, now) in changed.items()
        )
        warnings.warn(f"evaluations are not those before the resumed step: {said}", stacklevel=3)


def _value(value):
    if value is None or value == []:
        return "not given"
    return ", ".join(value) if isinstance(value, list) else str(value)


def split_source(source, held_out, options):
    """Return the training and the held-out source, the latter by `--validation-split` if it is given.

    Raises:
        UserError: the data has a split of its own, or too few images.
    """
    share = options.get("validation_split")
    if not share:  # 0 in a TOML file
        return source, held_out
    if len(held_out):
        raise UserError(
            f"--validation-split {share:g}: the data has a split `validation` of its own; leave it out"
        )
    from keras_sd.data.chosen_source import ChosenSource

    count = round(share * len(source))
    if not 0 < count < len(source):
        raise UserError(
            f"--validation-split {share:g}: leaves {count} of {len(source)} images for validation; give a "
            "share that leaves some for each side"
        )
    order = np.random.default_rng((options["seed"], count)).permutation(len(source))
    parts = [ChosenSource(source, np.sort(part)) for part in (order[count:], order[:count])]
    parts[0].notes = [f"{count} of {len(source)} images are held out by --validation-split"]
    parts[1].notes = []
    return parts[0], parts[1]


def validation_sets(run, source, held_out):
    """Return the sets of the validation loss as name -> a few images in squares; none without validation.

    Args:
        run: the result of `preparation.prepare`.
        source, held_out: framed sources of training and of held-out images (empty if there are none).
    """
    if not run.settings.validation_steps:
        return {}
    from keras_sd.data.chosen_source import ChosenSource
    from keras_sd.data.framing import FramedSource

    sets = {}
    for name, images in (("train", source), ("held_out", held_out)):
        count = min(run.options["validation_examples"], len(images))
        if count:
            places = np.arange(count) * len(images) // count
            sets[name] = FramedSource(ChosenSource(images.source, places), source.framing.of_squares())
    return sets


def validation_of(run, sets):
    """Return the `Validation` of sets of images or their encodings; None without validation."""
    from keras_sd.training.validation import Validation

    return Validation(sets, run.options["validation_examples"]) if sets else None


def encoded_validation(run, sets, pipeline, text_encoder, tokenizer, mode="memory"):
    """Return the `Validation` of sets of captioned images; None without validation.

    Args:
        sets: from `validation_sets`.
        text_encoder: None if captions are encoded in the training step.
        tokenizer: of the captions.
        mode: "memory", where their encodings are kept, or "off" for a model that gets images, too.
    """
    from keras_sd.training.caching import Caching
    from keras_sd.training.stored_encodings import encoded_source

    encoded = {
        name: encoded_source(
            images,
            pipeline.vae,
            text_encoder,
            tokenizer,
            Caching(mode),
            jit_compile=run.settings.jit_compile,
            progress=False,
        )
        for name, images in sets.items()
    }
    return validation_of(run, encoded)


def validated_examples(run):
    """Return the number of validation examples of a method on its training images; None for none."""
    return run.options["validation_examples"] if run.settings.validation_steps else None
