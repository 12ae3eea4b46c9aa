"""The options that training commands share, each written once, and the checks of what was typed."""

import functools
from pathlib import Path

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, Number
from keras_sd.errors import UserError
from keras_sd.pipeline.defaults import usual

FEWEST_FOR_KID = 4  # images in a set: two in each half


DECAY = Number(min=0, max=1, max_open=True)
# Looked for when the command runs, as its documentation may be read where they are not.
FILE, FILE_OR_FOLDER = click.Path(dir_okay=False), click.Path()

# What an evaluation alone uses.
OF_EVALUATIONS = (
    *("validation_prompts", "num_validation_images", "validation_images", "num_inference_steps"),
    *("kid", "kid_images", "guidance_scale"),
)

# Options whose values follow the model (`keras_sd.pipeline.defaults`), with their types and help.
_FOLLOWS_MODEL = {
    "max_train_steps": (COUNT, "Updates of the weights."),
    "train_batch_size": (COUNT, "Images in a batch, over all devices."),
    "learning_rate": (POSITIVE, "Highest learning rate."),
    "lr_scheduler": (click.Choice(["cosine", "constant"]), "Learning-rate schedule after the warm-up."),
    "lr_warmup_steps": (FROM_ZERO, "Updates over which the learning rate rises from 0."),
    "adam_beta2": (DECAY, "Decay of the second moment."),
    "ema_decay": (DECAY, "Largest decay of the EMA weights."),
    "guidance_scale": (NOT_NEGATIVE, "Guidance scale of the samples; up to 1: none."),
}


def model_option(method, name, text=None):
    """A click option whose value follows the model: None until `prepare` has looked into its folder."""
    kind, usual_text = _FOLLOWS_MODEL[name]
    value = usual(method)[name]
    shown = f"{value:g}" if isinstance(value, float) else value
    return click.option(
        _flag(name), type=kind, help=text or usual_text, show_default=f"the model's own; usually {shown}"
    )


def _flag(name):
    return f"--{name.replace('_', '-')}"


def run_options(method, *, without=(), **defaults):
    """The options that every method has.

    Args:
        method: its name in `keras_sd.pipeline.defaults`.
        without: names of those that mean nothing to it.
        defaults: replace default values by the option's name.
    """

    def option(flag, default, text, **more):
        name = flag.split("/")[0].lstrip("-").replace("-", "_")
        shown = more.pop("show_default", True)
        default = defaults.get(name, default)
        return name, click.option(flag, default=default, show_default=shown, help=text, **more)

    def follows_model(name):
        return name, model_option(method, name)

    options = [
        option("--output-dir", None, "Run folder: checkpoints, logs, samples and, at the end, the model."),
        option("--dataset-name", None, "`emoji`, `openmoji` or the name of a TFDS data set."),
        option("--train-data-dir", None, "Folder of images, in place of --dataset-name."),
        follows_model("max_train_steps"),
        follows_model("train_batch_size"),
        option("--gradient-accumulation-steps", 1, "Batches in one update.", type=COUNT),
        follows_model("learning_rate"),
        follows_model("lr_scheduler"),
        follows_model("lr_warmup_steps"),
        option("--adam-beta1", 0.9, "Decay of the first moment.", type=DECAY),
        follows_model("adam_beta2"),
        option("--adam-epsilon", 1e-8, "Added to the root of the second moment.", type=POSITIVE),
        option("--adam-weight-decay", 0.01, "Decoupled weight decay.", type=NOT_NEGATIVE),
        option(
            "--max-grad-norm", 1.0, "Global norm at which gradients are clipped; 0: not.", type=NOT_NEGATIVE
        ),
        follows_model("ema_decay"),
        option(
            "--mixed-precision",
            "auto",
            "Precision of the layers; `auto`: bf16 on a GPU or TPU that multiplies it, no on a processor.",
            type=click.Choice(["auto", "no", "fp16", "bf16"]),
        ),
        option("--jit-compile/--no-jit-compile", True, "Compile the step by XLA."),
        option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            False,
            "Compute activations again in the backward pass: less memory, about a third more time.",
        ),
        option("--offload-ema/--no-offload-ema", False, "Keep the EMA weights in host memory."),
        option(
            "--seed", 0, "Seed of weights, order, noise and timesteps.", type=click.IntRange(0, 2**32 - 1)
        ),
        option("--checkpointing-steps", 500, "Updates between two checkpoints.", type=COUNT),
        option("--checkpoints-total-limit", 2, "Checkpoints to keep.", type=COUNT),
        option("--resume-from-checkpoint", None, "`latest` or a checkpoint folder."),
        option("--evaluation-steps", 1000, "Updates between two evaluations; 0: none.", type=FROM_ZERO),
        option(
            "--distribution",
            None,
            "Several devices (JAX): each takes a part of the batch (`data`; `auto`: if there are any), or of "
            "the weights (`model`).",
            type=click.Choice(["auto", "data", "model"]),
        ),
        option("--coordinator", None, "HOST:PORT of process 0, when several processes train together."),
        option("--num-processes", None, "How many they are.", type=int),
        option("--process-id", None, "Which of them this is, from 0.", type=int),
        option("--coordinator-timeout", 300, "Seconds to wait for the others.", type=COUNT),
    ]
    add_options = decorated(*(add for name, add in options if name not in without))

    def decorate(command):
        @functools.wraps(command)
        def checked(**values):
            _check_names()
            return command(**values)

        return add_options(checked)

    return decorate


def _check_names():
    """Refuses empty text, as of a shell's variable that was never set, and files that are not there."""
    context = click.get_current_context()
    for parameter in context.command.params:
        flag, value = parameter.opts[0], context.params.get(parameter.name)
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{flag}: empty; give a value, or leave it out")
        if value is not None and parameter.type is FILE and not Path(value).is_file():
            raise UserError(f"{flag} {value}: no such file; correct the path")
        if value is not None and parameter.type is FILE_OR_FOLDER and not Path(value).exists():
            raise UserError(f"{flag} {value}: no such file or folder; correct the path")


def _enough_for_kid(context, parameter, count):
    if 0 < count < FEWEST_FOR_KID:
        raise UserError(f"--kid-images {count}: too few; give {FEWEST_FOR_KID} or more, or 0 for none")
    return count


def evaluation_options(num_inference_steps=20):
    """The options of methods that draw samples on their way, by default in so many steps."""
    return decorated(
        inference_steps_option(num_inference_steps),
        click.option(
            "--kid-images",
            default=100,
            show_default=True,
            type=FROM_ZERO,
            callback=_enough_for_kid,
            help="Images of each split that KID compares; 0: none.",
        ),
    )


def inference_steps_option(default):
    return click.option(
        "--num-inference-steps",
        default=default,
        show_default=True,
        type=COUNT,
        help="Sampling steps of evaluations.",
    )


snr_gamma_option = click.option(
    "--snr-gamma", type=POSITIVE, help="Gamma of min-SNR weighting; 5 is usual. Off by default."
)


def is_given(name):
    """Whether the user has typed the option of that name."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def refuse_unused(names, has_effect, reason):
    """Refuses those of the named options that the user has given although they have no effect.

    Args:
        reason: what they need or what overrides them, as the rest of "--name: has no effect ...".
    """
    flags = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    for name in names:
        if not has_effect and name in flags and is_given(name):
            raise UserError(f"{flags[name]}: has no effect {reason}; leave it out")
