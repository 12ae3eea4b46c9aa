"""The prompts of sample images: on the command line, or in a file."""

from pathlib import Path

import click

from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.train.options import FILE


def sample_options(default):
    """Return the options for the prompts of sample images; `default` describes the usual ones."""
    return decorated(
        click.option(
            "--validation-prompts",
            multiple=True,
            help=f"Prompt of sample images; may be repeated. By default {default}.",
        ),
        click.option(
            "--validation-prompts-file",
            type=FILE,
            help="File of prompts, each with its own options: kohya's .txt (`a heart --n blurry --w 512 --h "
            "512 --d 7 --s 30 --l 7.5`), .json or .toml.",
        ),
    )


def prompts_of(options):
    """Return the prompts of a run's file, before long work; None without one.

    Raises:
        UserError: the file is faulty, or prompts are given, too.
    """
    from keras_sd.training.sample_prompts import read_sample_prompts

    if not options.get("validation_prompts_file"):
        return None
    refuse_unused(["validation_prompts"], False, "with --validation-prompts-file")
    return read_sample_prompts(Path(options["validation_prompts_file"]))
