"""The options of training data: where captions are and how they are drawn, and faulty examples."""

import sys
import warnings
from pathlib import Path

import click

from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.option_types import FROM_ZERO, SHARE
from keras_sd.cli.train.masks import masks_of
from keras_sd.cli.train.options import FILE
from keras_sd.errors import UserError

_OF_TAGS = ("keep_tokens", "caption_separator")
_OF_FILES = (
    *("caption_extension", "caption_lines", "image_column", "caption_column", "dataset_config_name"),
    *("train_data_dir", "dataset_name", "streaming", "alpha_mask", "mask_data_dir", "unmasked_weight"),
)


on_bad_sample_option = click.option(
    "--on-bad-sample",
    default="error",
    type=click.Choice(["error", "skip"]),
    help="Faulty images and captions: `error` names them all and stops, `skip` leaves them out and counts "
    "them.",
)


def source_options(captions=True):
    """Return a decorator that adds the options of how a data set is read.

    Args:
        captions: whether its captions are read, too.
    """
    options = [
        on_bad_sample_option,
        click.option(
            "--dataset-config-name", help="Configuration of a data set on the hub, if it has several."
        ),
        click.option(
            "--image-column",
            help="Column of images in a data set, or of file names in metadata.jsonl or .csv. By default the "
            "only one of images, and file_name.",
        ),
        click.option(
            "--streaming",
            is_flag=True,
            help="Of a data set on the hub fetch only images and captions, example by example, with "
            "--max-train-samples the first ones. They are kept for the next start.",
        ),
    ]
    if captions:
        options += [
            click.option("--caption-column", help="Column of captions. By default text or caption."),
            click.option(
                "--caption-extension",
                help="Suffix of the caption files beside images. By default .txt, or else .caption.",
            ),
            click.option(
                "--caption-lines",
                type=click.Choice(["first", "each"]),
                help="Lines of a caption file that are a caption; kohya takes the first. By default each.",
            ),
        ]
    return decorated(*options)


max_token_length_option = click.option(
    "--max-token-length",
    default="75",
    type=click.Choice(["75", "150", "225"]),
    help="Tokens of a caption, in one, two or three chunks of 75; the rest of longer ones is cut.",
)

dataset_config_option = click.option(
    "--dataset-config",
    type=FILE,
    help="TOML file of several data sets with repeats or weights, as kohya's, instead of a single one.",
)

drawing_options = decorated(
    click.option("--shuffle-caption", is_flag=True, help="Put a caption's tags in a new order at each draw."),
    click.option(
        "--keep-tokens",
        default=0,
        type=FROM_ZERO,
        help="First tags of a caption that are neither moved nor left out.",
    ),
    click.option("--caption-separator", default=",", help="What stands between the tags of a caption."),
    click.option(
        "--caption-tag-dropout-rate",
        default=0.0,
        type=SHARE,
        help="Share of the tags that is left out at each draw, 0 to 1.",
    ),
    max_token_length_option,
)
"""Adds the options of how a caption is drawn and tokenized."""

caption_options = decorated(dataset_config_option, drawing_options)


def captions_of(options):
    """Return `data.captions.Captions` of a command's options.

    Raises:
        UserError: an option is out of range or has no effect.
    """
    from keras_sd.data.captions import Captions

    names = ("shuffle_caption", "caption_tag_dropout_rate", *_OF_TAGS)
    captions = Captions(**{name: options[name] for name in names if name in options})
    if options.get("dataset_config"):
        has_option = any(one.name == "dataset_config" for one in click.get_current_context().command.params)
        file = "--dataset-config" if has_option else options["dataset_config"]
        refuse_unused((*names, *_OF_FILES), False, f"with {file}, whose file says it")
    refuse_unused(_OF_TAGS, not captions.is_fixed, "without --shuffle-caption or --caption-tag-dropout-rate")
    return captions


def caption_rules(options, source):
    """Return how captions are drawn, for all examples or for each one; None if they are fixed.

    Args:
        source: the source of the run, not framed.
    """
    if options.get("dataset_config"):
        return source.caption_rules()
    captions = captions_of(options)
    return None if captions.is_fixed else captions


def configured_source(options, need_captions, is_reg=None):
    """Return the source of a run with a --dataset-config; the arguments are those of `load_config`."""
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.data.sources import load_config

    reading = reading_of(options)
    named = {name: reading[name] for name in ("on_bad_sample", "max_samples", "seed")}
    path = Path(options["dataset_config"])
    return load_config(path, MINIMUM_SIDE, need_captions=need_captions, is_reg=is_reg, **named)


def refuse_drawn_captions(options, source, method):
    """Raise UserError for a --dataset-config that draws tags, for a method that cannot."""
    if options.get("dataset_config") and source.caption_rules() is not None:
        keys = "shuffle_caption and caption_tag_dropout_rate"
        raise UserError(f"{options['dataset_config']}: {keys} have no effect with {method}; remove them")


def apply_config(options):
    """Set the options of a run that its --dataset-config sets; those on the command line stay.

    Raises:
        UserError: the file is faulty, or sets an option that the command does not have.
    """
    from click.core import ParameterSource

    from keras_sd.data.dataset_config import read_dataset_config

    path = options.get("dataset_config")
    if not path:
        return
    context = click.get_current_context()
    for name, value in read_dataset_config(Path(path)).options.items():
        flag = next((one.opts[0] for one in context.command.params if one.name == name), None)
        if flag is None:
            raise UserError(f"{path}: sets {name}, which this command does not have; remove it")
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            options[name] = value
        elif options[name] != value:
            warnings.warn(f"{flag}: {options[name]}, not the {value} of {path}", stacklevel=2)


def caption_identity(options):
    """Return the JSON values of drawn and of long captions, which a resumed run must share."""
    from keras_sd.data.dataset_config import read_dataset_config

    identity = captions_of(options).identity()
    if options.get("dataset_config"):
        identity = read_dataset_config(Path(options["dataset_config"])).identity()
    identity |= clip_skip_identity(options)
    length = options.get("max_token_length", "75")
    return identity if length == "75" else identity | {"max_token_length": int(length)}


def clip_skip_identity(options):
    """Return the JSON values of the text encoder's layer, which a resumed run must share."""
    skip = options.get("clip_skip", 1)
    return {} if skip == 1 else {"clip_skip": skip}


def reading_of(options):
    """Return the arguments of `load_source` in a command's options, or in those of an earlier run."""
    from keras_sd.data.caption_files import CaptionFiles

    names = ("caption_extension", "caption_lines", "image_column", "caption_column")
    files = CaptionFiles(**{name: options.get(name) for name in names})
    return {
        "caption_files": files,
        "on_bad_sample": options.get("on_bad_sample") or "error",
        "config_name": options.get("dataset_config_name"),
        "streaming": bool(options.get("streaming")),
        "max_samples": options.get("max_train_samples"),
        "seed": options.get("seed") or 0,
        "masks": masks_of(options),
    }


def print_notes(source, options):
    """Print what the user should know of a source, each note in a line."""
    from keras_sd.cli.command import in_flags

    if not options.get("process_id"):
        for note in getattr(source, "notes", ()):
            print(f"data: {in_flags(note)}", file=sys.stderr, flush=True)
