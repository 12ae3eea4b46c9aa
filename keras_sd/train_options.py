"""What the training commands share: their options, and what these open."""

import functools
from pathlib import Path

import click

from keras_sd import config, presets
from keras_sd.errors import UserError

FEWEST_FOR_KID = 4  # pictures in a set: two in each half


def run_options(*, without=(), **defaults):
    """The options that every method has.

    Args:
        without: names of those that mean nothing to a method.
        defaults: replace default values by the option's name.
    """

    def option(flag, default, text, **more):
        name = flag.split("/")[0].lstrip("-").replace("-", "_")
        default = defaults.get(name, default)
        return name, click.option(flag, default=default, show_default=True, help=text, **more)

    options = [
        option("--output-dir", None, "Run folder: checkpoints, logs, samples and, at the end, the model."),
        option("--dataset-name", "emoji", "`emoji`, `openmoji` or the name of a TFDS data set."),
        option("--train-data-dir", None, "Folder of images; takes the place of --dataset-name."),
        option("--max-train-steps", 1000, "Updates of the weights."),
        option("--train-batch-size", 32, "Images in a batch."),
        option("--gradient-accumulation-steps", 1, "Batches in one update."),
        option("--learning-rate", 1e-3, "Highest learning rate."),
        option(
            "--lr-scheduler", "cosine", "Course after the warm-up.", type=click.Choice(["cosine", "constant"])
        ),
        option("--lr-warmup-steps", 100, "Updates over which the learning rate rises from 0."),
        option("--adam-beta1", 0.9, "Decay of the first moment."),
        option("--adam-beta2", 0.99, "Decay of the second moment."),
        option("--adam-weight-decay", 0.01, "Decoupled weight decay."),
        option("--max-grad-norm", 1.0, "Global norm at which gradients are clipped."),
        option("--ema-decay", 0.9999, "Largest decay of the averaged weights."),
        option(
            "--mixed-precision", "no", "Precision of the layers.", type=click.Choice(["no", "fp16", "bf16"])
        ),
        option("--jit-compile/--no-jit-compile", True, "Compile the step by XLA."),
        option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            False,
            "Compute activations again in the backward pass: less memory, about a third more time.",
        ),
        option("--offload-ema/--no-offload-ema", False, "Keep the averaged weights in host memory."),
        option("--seed", 0, "Seed of weights, order, noise and timesteps."),
        option("--checkpointing-steps", 500, "Updates between two checkpoints."),
        option("--checkpoints-total-limit", 2, "Checkpoints to keep."),
        option("--resume-from-checkpoint", None, "`latest` or a checkpoint folder."),
        option("--evaluation-steps", 1000, "Updates between two evaluations."),
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
        option("--coordinator-timeout", 300, "Seconds to wait for the others."),
    ]

    wanted = [add for name, add in options if name not in without]

    def decorate(command):
        return functools.reduce(lambda decorated, add: add(decorated), reversed(wanted), command)

    return decorate


def settings_of(options):
    """Makes the `Settings` of a command's options, spreads models over the devices and seeds the weights."""
    import dataclasses
    import random

    from keras_sd.training import distribution
    from keras_sd.training.trainer import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in options.items() if name in names})
    distribution.start(
        options["distribution"],
        settings.train_batch_size,
        coordinator=options["coordinator"],
        num_processes=options["num_processes"],
        process_id=options["process_id"],
        timeout=options["coordinator_timeout"],
    )
    # Keras' initialisers take their seeds from this generator. `keras.utils.set_random_seed` sets it too,
    # but imports TensorFlow, where it is installed, under every backend.
    random.seed(settings.seed)
    return settings


def sources_of(options, image_size, need_captions=True):
    """The training examples, the held-out ones (empty when there are none) and the repeats."""
    from keras_sd.data.datasets import available_splits, load_source

    name = options["train_data_dir"] or options["dataset_name"]
    source = load_source(name, "train", image_size, need_captions)
    held_out = ()
    if "validation" in available_splits(name):
        held_out = load_source(name, "validation", image_size, need_captions)
    return source, held_out, source.repeats() if hasattr(source, "repeats") else None


def example_sets(source, held_out, count):
    """The examples that KID is measured on, spread evenly over each split that has enough of them."""
    if 0 < count < FEWEST_FOR_KID:
        raise UserError(f"--kid-images {count}: too few; give {FEWEST_FOR_KID} or more, or 0 for none")
    splits = {"train": source, "held_out": held_out}
    return {
        name: evenly(split, count) for name, split in splits.items() if count and len(split) >= FEWEST_FOR_KID
    }


def evenly(sequence, count):
    """Up to `count` elements at equal distances."""
    count = min(count, len(sequence))
    return [sequence[index * len(sequence) // count] for index in range(count)]


def extractor_of(name):
    """The feature extractor of that KID; the choice offers no other names."""
    from keras_sd.loading import load_part
    from keras_sd.metrics.features import ClipFeatures, InceptionFeatures

    if name == "kid_inception":
        return InceptionFeatures(75)
    return ClipFeatures(load_part(presets.find("emoji"), "image_encoder"))


PARTS = ("tokenizer", "text_encoder", "image_encoder", "clip_head", "unet", "vae", "scheduler_config")


def open_pipeline(options, adapt=None):
    """The pretrained model, with those parts replaced that the options name or begin anew.

    Args:
        options: of the command.
        adapt: called with the parts, as a dictionary, before anything is compiled with them.
    """
    import dataclasses

    from keras_sd.loading import load_clip, load_part
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline import StableDiffusion
    from keras_sd.training.trainer import PRECISIONS

    vae_folder, clip_folder = options.get("pretrained_vae"), options.get("pretrained_clip")
    dtype = PRECISIONS[options["mixed_precision"]]
    parts = {}
    if not (vae_folder and clip_folder and options["from_scratch"]):
        name = options["pretrained_model_name_or_path"]
        source = name if Path(name).is_file() else presets.find(name)
        pretrained = StableDiffusion.load(source, dtype=dtype)
        parts = {name: getattr(pretrained, name) for name in PARTS}
    if vae_folder:
        parts["vae"] = load_part(vae_folder, "vae", dtype)
    if clip_folder:
        parts |= load_clip(clip_folder)
    if options.get("from_scratch"):
        parts["unet"] = UNet(read_config(options["unet_config"], config.UNetConfig, config.EMOJI_UNET))
        parts.setdefault("scheduler_config", config.EMOJI_SCHEDULER)
    if options.get("prediction_type"):
        parts["scheduler_config"] = dataclasses.replace(
            parts["scheduler_config"], prediction_type=options["prediction_type"]
        )
    if adapt is not None:
        adapt(parts)
    # What fits in training fits in sampling.
    return StableDiffusion(
        **parts, batch_size=options["train_batch_size"], jit_compile=options["jit_compile"]
    )


def read_config(path, config_class, default):
    return config_class.load(path) if path else default


def evaluation_options(num_inference_steps=20):
    """The options of methods that draw samples on their way, by default in so many steps."""

    def decorate(command):
        command = click.option(
            "--kid-images",
            default=100,
            show_default=True,
            help="Pictures of each split that KID compares; 0: none.",
        )(command)
        return click.option(
            "--num-inference-steps",
            default=num_inference_steps,
            show_default=True,
            help="Sampling steps of evaluations.",
        )(command)

    return decorate
