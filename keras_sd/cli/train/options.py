"""The options that training commands share, each written once, and checks of the given values."""

import functools
from pathlib import Path

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.config_file import config_file_option
from keras_sd.cli.option_types import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, Number
from keras_sd.cli.train.epochs import epochs_option, saving_epochs_option
from keras_sd.cli.train.framing import framing_options
from keras_sd.cli.train.optimizer import DECAY, optimizer_options
from keras_sd.cli.train.plan import plan_option
from keras_sd.errors import UserError
from keras_sd.pipeline.defaults import usual
from keras_sd.training.optimizer_options import OPTIONS

FEWEST_FOR_KID = 4  # images in a set: two in each half


# Existence is checked when the command runs: tests parse documented commands without these files.
FILE, FILE_OR_FOLDER = click.Path(dir_okay=False), click.Path()

# Options that only affect evaluations.
OF_EVALUATIONS = (
    *("validation_prompts", "num_validation_images", "validation_images", "num_inference_steps"),
    *("validation_prompts_file", "kid", "kid_images", "inception_weights", "guidance_scale"),
    "sample_at_first",
)

# Those of `training.learning_rate`, which imports a backend.
LR_SCHEDULERS = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial".split()

_RATE = Number(min=0, min_open=True, max=1e6)

# Options whose defaults depend on the model (`keras_sd.pipeline.defaults`), with their types and help texts.
_FOLLOWS_MODEL = {
    "max_train_steps": (COUNT, "Optimizer updates in the whole run."),
    "train_batch_size": (COUNT, "Images in a batch, summed over all devices."),
    "learning_rate": (
        _RATE,
        "Peak learning rate. By default a fifth of AdamW's with lion, and 1 with prodigy.",
    ),
    "lr_scheduler": (
        click.Choice(LR_SCHEDULERS),
        "Learning rate after the warm-up: constant, or falling to 0 at the last update.",
    ),
    "lr_warmup_steps": (FROM_ZERO, "Updates over which the learning rate rises linearly from 0."),
    "adam_beta2": (DECAY, OPTIONS["adam_beta2"].text),
    "ema_decay": (DECAY, "Largest decay of the exponential moving average (EMA) of the weights."),
    "guidance_scale": (NOT_NEGATIVE, "Guidance scale of sample images; 1 or less: no guidance."),
}


max_train_samples_option = click.option(
    "--max-train-samples",
    type=COUNT,
    help="Train on so many images at most, which --seed chooses; with --streaming on the first ones.",
)

seed_option = click.option(
    "--seed",
    default=0,
    type=click.IntRange(0, 2**32 - 1),
    help="Seed of weights, data order, noise and timesteps.",
)

mixed_precision_option = click.option(
    "--mixed-precision",
    default="auto",
    type=click.Choice(["auto", "no", "fp16", "bf16"]),
    help="Precision of the layers. `auto`: bf16 on a GPU or TPU that supports it, otherwise no (float32).",
)


def model_option(method, name, text=None):
    """Return a click option whose value is None until `prepare` has looked up the model's default."""
    kind, usual_text = _FOLLOWS_MODEL[name]
    value = usual(method)[name]
    shown = f"{value:g}" if isinstance(value, float) else value
    flag = f"--{name.replace('_', '-')}"
    return click.option(
        flag, type=kind, help=text or usual_text, show_default=f"the model's own; usually {shown}"
    )


def run_options(method, *, without=(), **defaults):
    """Return a decorator that adds the options of every method.

    Args:
        method: its name in `keras_sd.pipeline.defaults`.
        without: names of the options that the method does not have.
        defaults: option name -> default, where it differs.
    """

    def option(flag, default, text, **more):
        name = flag.split("/")[0].lstrip("-").replace("-", "_")
        return name, click.option(flag, default=defaults.get(name, default), help=text, **more)

    def follows_model(name):
        return name, model_option(method, name)

    options = [
        ("config_file", config_file_option),
        option("--output-dir", None, "Run folder: checkpoints, logs, sample images, and the trained model."),
        option(
            "--dataset-name",
            None,
            "`emoji`, `openmoji`, OWNER/NAME on the hub, parquet, arrow or tar files, or a name of "
            "TensorFlow Datasets (TFDS). By default `emoji`, unless another model is given.",
        ),
        option("--train-data-dir", None, "Folder of training images, instead of --dataset-name."),
        ("max_train_samples", max_train_samples_option),
        *framing_options(flips=defaults.get("random_flip", False)),
        follows_model("max_train_steps"),
        ("num_train_epochs", epochs_option),
        follows_model("train_batch_size"),
        option("--gradient-accumulation-steps", 1, "Batches per optimizer update.", type=COUNT),
        follows_model("learning_rate"),
        follows_model("lr_scheduler"),
        follows_model("lr_warmup_steps"),
        option(
            "--lr-num-cycles", None, "How often cosine_with_restarts falls to 0; by default once.", type=COUNT
        ),
        option("--lr-power", None, "Exponent of polynomial; by default 1, which is linear.", type=POSITIVE),
        *optimizer_options(lambda name: model_option(method, name)).items(),
        option(
            "--max-grad-norm", 1.0, "Clip gradients to this global norm; 0: no clipping.", type=NOT_NEGATIVE
        ),
        follows_model("ema_decay"),
        ("mixed_precision", mixed_precision_option),
        option("--jit-compile/--no-jit-compile", True, "Compile the training step with XLA."),
        option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            False,
            "Recompute activations in the backward pass: less memory, about a third more time.",
        ),
        option(
            "--post-hoc-ema",
            None,
            "Keep snapshots of two averages of the weights with each checkpoint, for `keras-sd ema`; costs "
            "two copies of the weights. Snapshots are in float16, or float32 if that follows.",
            type=click.Choice(["float16", "float32"]),
            is_flag=False,
            flag_value="float16",
        ),
        option("--offload-ema/--no-offload-ema", False, "Keep the EMA weights in host memory."),
        ("seed", seed_option),
        (
            "checkpointing_steps",
            click.option(
                "--checkpointing-steps",
                "--save-every-n-steps",
                default=500,
                type=COUNT,
                help="Save a checkpoint every N updates.",
            ),
        ),
        ("checkpointing_epochs", saving_epochs_option),
        option("--checkpoints-total-limit", 2, "Number of latest checkpoints to keep.", type=COUNT),
        option("--resume-from-checkpoint", None, "Continue from `latest` or from this checkpoint folder."),
        option("--evaluation-steps", 1000, "Sample and measure every N updates; 0: never.", type=FROM_ZERO),
        option(
            "--report-to",
            "tensorboard",
            "Where figures and sample images go beside the run folder: tensorboard, wandb, both separated by "
            "a comma, all or none.",
        ),
        option("--tracker-project-name", None, "Project on wandb; by default keras-sd."),
        option("--wandb-run-name", None, "Name of the run on wandb; by default that of the run folder."),
        option("--sample-at-first", False, "Sample and measure before the first update, too.", is_flag=True),
        option(
            "--distribution",
            None,
            "Train on several devices (JAX). `data` splits the batch, `model` the weights of large layers, "
            "`fsdp` the batch and all weights with the optimizer's state, `auto` is `data` if there are "
            "several devices. By default one device.",
            type=click.Choice(["auto", "data", "model", "fsdp"]),
        ),
        ("plan", plan_option),
        option("--coordinator", None, "HOST:PORT of process 0, if several processes train together."),
        option("--num-processes", None, "Number of processes that train together.", type=int),
        option("--process-id", None, "Index of this process, from 0.", type=int),
        option("--coordinator-timeout", 300, "Seconds to wait for the other processes.", type=COUNT),
    ]
    add_options = decorated(*(add for name, add in options if name not in without))

    def decorate(command):
        @functools.wraps(command)
        def checked(**values):
            _check_files()
            return command(**values)

        return add_options(checked)

    return decorate


def _check_files():
    """Raise UserError for a file that does not exist."""
    context = click.get_current_context()
    for parameter in context.command.params:
        flag, value = parameter.opts[0], context.params.get(parameter.name)
        if value is not None and parameter.type is FILE and not Path(value).is_file():
            fault = "not a plain file" if Path(value).exists() else "no such file"
            raise UserError(f"{flag} {value}: {fault}; correct the path")
        if value is not None and parameter.type is FILE_OR_FOLDER and not Path(value).exists():
            raise UserError(f"{flag} {value}: no such file or folder; correct the path")


def _enough_for_kid(context, parameter, count):
    if 0 < count < FEWEST_FOR_KID:
        raise UserError(f"--kid-images {count}: too few; give {FEWEST_FOR_KID} or more, or 0 for none")
    return count


def evaluation_options(num_inference_steps=20):
    """Return a decorator that adds the options of evaluations by KID."""
    return decorated(
        inference_steps_option(num_inference_steps),
        click.option(
            "--kid-images",
            default=100,
            type=FROM_ZERO,
            callback=_enough_for_kid,
            help="Images of each split that KID is measured on; 0: no KID.",
        ),
        click.option(
            "--kid",
            type=click.Choice(["kid_emoji", "kid_inception", "kid_inception_imagenet"]),
            default="kid_emoji",
            help="Network that KID and FID look through: the model's CLIP (of `ddim`, that of `emoji`), "
            "Inception v3 with the published weights of FID and KID, or with Keras' ImageNet weights at 75 "
            "pixels.",
        ),
        click.option(
            "--inception-weights",
            type=FILE,
            help="pt_inception-2015-12-05-6726825d.pth of --kid kid_inception. By default from torch hub's "
            "cache, downloaded if missing.",
        ),
    )


def inference_steps_option(default):
    return click.option(
        "--num-inference-steps", default=default, type=COUNT, help="Sampling steps of sample images."
    )
