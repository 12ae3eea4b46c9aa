"""The length of a run in epochs, in place of a number of updates."""

import click
import numpy as np

from keras_sd.cli.command import is_given
from keras_sd.cli.option_types import COUNT
from keras_sd.errors import UserError

_MOST_STEPS = 2**31 - 1

epochs_option = click.option(
    "--num-train-epochs",
    "--max-train-epochs",
    type=COUNT,
    help="Times that all images are shown in the whole run, in place of --max-train-steps. An epoch shows an "
    "image as often as its repeats say.",
)

saving_epochs_option = click.option(
    "--checkpointing-epochs",
    "--save-every-n-epochs",
    type=COUNT,
    help="Save a checkpoint whenever all images were shown so often, in place of --checkpointing-steps.",
)


def check_epochs(options):
    """Raise UserError if the length of a run, or that between two checkpoints, is given twice."""
    saving = options["checkpointing_epochs"]
    if saving and is_given("checkpointing_steps"):
        raise UserError(f"--checkpointing-epochs {saving}: --checkpointing-steps is given too; leave one out")
    if options["num_train_epochs"] and options["max_train_steps"] is not None:
        raise UserError(
            f"--num-train-epochs {options['num_train_epochs']}: --max-train-steps is given too; leave one out"
        )


def images_of_epoch(source, repeats=None):
    """Return how many images an epoch shows.

    Args:
        source: the examples.
        repeats: how often it shows each of them; once by default.
    """
    return len(source) if repeats is None else int(np.sum(repeats))


def steps_of_epochs(options, images, checkpoint=None):
    """Return the number of updates after which all images were shown so often.

    Batches go on from one epoch to the next, so no epoch ends with a smaller one; only the last update of the
    run is rounded up.

    Args:
        options: of the command, with the model's defaults filled in.
        images: the result of `images_of_epoch`.
        checkpoint: folder of the checkpoint to resume from, whose images count, in batches of any size.

    Raises:
        UserError: there are too many.
    """
    from keras_sd.training.checkpoints import steps_and_examples

    step, seen = (0, 0) if checkpoint is None else steps_and_examples(checkpoint)
    epochs, of_update = options["num_train_epochs"], _images_of_update(options)
    steps = step + max(-(-(epochs * images - seen) // of_update), 0)
    if steps > _MOST_STEPS:
        raise UserError(f"--num-train-epochs {epochs}: {steps} updates are too many; give fewer")
    return max(steps, 1)


def saving_steps_of_epochs(options, images):
    """Return the number of updates from one checkpoint to the next, to the nearest; the arguments are those
    of `steps_of_epochs`.
    """
    return max(round(options["checkpointing_epochs"] * images / _images_of_update(options)), 1)


def _images_of_update(options):
    return options["train_batch_size"] * options["gradient_accumulation_steps"]


def updates_of_epochs(options, images, checkpoint):
    """Return the settings that are given in epochs, as numbers of updates."""
    counted = {}
    if options["num_train_epochs"]:
        counted["max_train_steps"] = steps_of_epochs(options, images, checkpoint)
    if options["checkpointing_epochs"]:
        counted["checkpointing_steps"] = saving_steps_of_epochs(options, images)
    return counted
