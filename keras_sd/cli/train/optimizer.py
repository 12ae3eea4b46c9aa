"""The options that choose an optimizer, and their defaults."""

import warnings

import click

from keras_sd.cli.command import is_given, refuse_unused
from keras_sd.cli.option_types import NOT_NEGATIVE, POSITIVE, Number
from keras_sd.errors import UserError
from keras_sd.training.optimizer_options import OPTIONS, TITLES, default_learning_rate
from keras_sd.training.rate_factors import parse_block_factors

DECAY = Number(min=0, max=1, max_open=True)
_TYPES = {"share": DECAY, "positive": POSITIVE, "not negative": NOT_NEGATIVE, "factor": Number(min=1)}

OF_SCHEDULE = (
    "learning_rate",
    "text_encoder_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
)


def optimizer_options(follows_model):
    """Return name -> click option of all options of optimizers.

    Args:
        follows_model: returns the option of a name whose default depends on the model.
    """
    options = {
        "optimizer": click.option(
            "--optimizer",
            "--optimizer-type",
            default="adamw",
            type=click.Choice(list(TITLES), case_sensitive=False),
            help="Rule of the updates. Less memory than AdamW's: adamw8bit, adafactor, lion. Prodigy finds "
            "its learning rate.",
        ),
        "use_8bit_adam": click.option(
            "--use-8bit-adam", is_flag=True, help="The same as --optimizer adamw8bit."
        ),
    }
    for name, option in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "adam_beta2":
            options[name] = follows_model(name)
        elif option.kind is bool:
            options[name] = click.option(
                f"{flag}/--no-{flag[2:]}", default=None, help=option.text, show_default=_shown(option)
            )
        else:
            options[name] = click.option(
                flag,
                *(["--weight-decay"] if name == "adam_weight_decay" else []),
                type=_TYPES[option.range],
                help=option.text,
                show_default=_shown(option),
            )
    return options


def _shown(option):
    """Return an option's default, or each optimizer's, for the help."""
    words = {
        name: {True: "on", False: "off"}.get(value, value) if option.kind is bool else f"{value:g}"
        for name, value in option.defaults.items()
        if value is not None
    }
    if len(set(words.values())) <= 1:
        return next(iter(words.values()), False)
    return ", ".join(f"{name} {word}" for name, word in words.items())


block_rates_option = click.option(
    "--learning-rate-by-block",
    help="Factors of the learning rate of the UNet's blocks, such as `down_blocks=0.5 up_blocks.2=0`. The "
    "longest name counts; 0 freezes.",
)

text_encoder_rate_option = click.option(
    "--text-encoder-lr",
    type=POSITIVE,
    help="Peak learning rate of the text encoder. By default that of the UNet.",
)


def choose_optimizer(options):
    """Set `optimizer` among a command's options, and refuse the options of others.

    Raises:
        UserError: an option belongs to another optimizer.
    """
    if options["use_8bit_adam"]:
        is_other = options["optimizer"] == "adamw" and is_given("optimizer")
        if is_other or options["optimizer"] not in ("adamw", "adamw8bit"):
            raise UserError(f"--use-8bit-adam: not with --optimizer {options['optimizer']}; leave one out")
        options["optimizer"] = "adamw8bit"
    if options.get("learning_rate_by_block") is not None:
        parse_block_factors(options["learning_rate_by_block"])
    optimizer = options["optimizer"]
    others = [name for name, option in OPTIONS.items() if optimizer not in option.defaults]
    refuse_unused(others, False, f"with --optimizer {optimizer}")
    relative = bool(options["adafactor_relative_step"])
    refuse_unused(OF_SCHEDULE, not relative, "with --adafactor-relative-step")
    refuse_unused(
        ["adafactor_warmup_init"],
        relative or not options["adafactor_warmup_init"],
        "without --adafactor-relative-step",
    )


def optimizer_defaults(optimizer, defaults, relative_step=False):
    """Return a model's default values as they are with an optimizer.

    Args:
        optimizer: its name.
        defaults: option name -> the model's default, which is for AdamW.
        relative_step: whether Adafactor chooses the learning rate.
    """
    defaults = {
        name: value
        for name, value in defaults.items()
        if name not in OPTIONS or optimizer in OPTIONS[name].defaults
    }
    if relative_step:
        return {name: value for name, value in defaults.items() if name not in OF_SCHEDULE}
    rate = default_learning_rate(optimizer, defaults["learning_rate"])
    return defaults | {"learning_rate": rate}


def check_learning_rate(options):
    """Warn of a learning rate that Prodigy would multiply with its own."""
    for name in ("learning_rate", "text_encoder_lr"):
        rate = options.get(name)
        if options["optimizer"] == "prodigy" and rate is not None and rate < 0.1:
            warnings.warn(
                f"Prodigy multiplies --{name.replace('_', '-')} {rate:g} by its own estimate; leave it out, "
                "or give about 1",
                stacklevel=3,
            )
