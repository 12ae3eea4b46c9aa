"""The beginning of a training command: checks, settings and images.

`prepare` checks the options, the run folder, the images and the model's location before it loads a backend,
so that errors appear within seconds.
"""

import dataclasses
import sys
import warnings
from pathlib import Path

from keras_sd import interruption, presets
from keras_sd.cli.command import is_given, refuse_unused
from keras_sd.cli.train.caching import caching_of
from keras_sd.cli.train.data_options import (
    apply_config,
    caption_identity,
    configured_source,
    print_notes,
    reading_of,
    refuse_drawn_captions,
)
from keras_sd.cli.train.diffusion import diffusion_of
from keras_sd.cli.train.epochs import check_epochs, images_of_epoch, updates_of_epochs
from keras_sd.cli.train.framing import check_framing, check_small_images
from keras_sd.cli.train.kid import check_kid, open_inception
from keras_sd.cli.train.masks import refuse_masks
from keras_sd.cli.train.optimizer import check_learning_rate, choose_optimizer, optimizer_defaults
from keras_sd.cli.train.options import OF_EVALUATIONS
from keras_sd.cli.train.prompts import prompts_of
from keras_sd.cli.train.resumption import check_resumed, check_same_data, check_same_model
from keras_sd.cli.train.run import Run
from keras_sd.cli.train.schedule import check_schedule, chosen_schedule, scheduler_of
from keras_sd.cli.train.validation import choose_validation, split_source, warn_of_other_evaluations
from keras_sd.errors import UserError, require
from keras_sd.pipeline.defaults import ModelDefaults
from keras_sd.training.optimizer_options import TITLES

_DATA = ("dataset_config", "train_data_dir", "dataset_name")


def prepare(
    method,
    options,
    *,
    variant=None,
    defaults_from=None,
    need_captions=True,
    scheduler_config=None,
    used=(),
    identity=None,
    images=None,
    counts_repeats=None,
):
    """Check a run before long work, and start its backend.

    Args:
        method, variant: names in `keras_sd.pipeline.defaults`.
        options: of the command; defaults that depend on the model are filled in.
        defaults_from: folder of the model whose defaults are used. For methods with a pretrained model it is
            that model, unless a new UNet of another config is trained.
        need_captions: whether images need captions.
        scheduler_config: the noise schedule, if it is not the pretrained model's.
        used: options of evaluations that the method also uses elsewhere.
        identity: JSON values, derived from the options, that a checkpoint to resume must share.
        images: how many images an epoch shows, if the method reads its own.
        counts_repeats: `counts_repeats(source)` tells whether repeats count; None if they always do.

    Returns:
        `Run`.

    Raises:
        UserError: an option, the run folder, the images or the model's location is wrong.
    """
    from keras_sd.data.sources import own_repeats
    from keras_sd.training.rendezvous import check_processes
    from keras_sd.training.run_folder import claim_output_dir

    require("array_record", "grain", "tensorboard")
    is_planned = options["plan"] is not None
    if "cache_latents" in options:
        caching_of(options)
    if "timestep_sampling" in options:
        diffusion_of(options)
    idle = [name for name in OF_EVALUATIONS if name not in used]
    refuse_unused(idle, options["evaluation_steps"], "with --evaluation-steps 0")
    if "kid" in options:
        check_kid(options)
    prompts_of(options)
    _check_trackers(options)
    apply_config(options)
    choose_optimizer(options)
    if "train_text_encoder" in options:
        refuse_unused(["text_encoder_lr"], options["train_text_encoder"], "without --train-text-encoder")
    check_epochs(options)
    refuse_unused({"coordinator_timeout"}, options["coordinator"] is not None, "without --coordinator")
    processes = {name: options[name] for name in ("coordinator", "num_processes", "process_id")}
    if not is_planned:
        check_processes(options["distribution"], **processes)
    identity = caption_identity(options) | (identity or {})
    check_framing(method, options)
    # Only process 0 locks the folder; which one that is, is known later.
    checkpoint = None
    if not is_planned:
        checkpoint = claim_output_dir(
            options["output_dir"], options["resume_from_checkpoint"], lock=options["distribution"] is None
        )
        interruption.set_run_folder(options["output_dir"], options["resume_from_checkpoint"])
    source, held_out = _check_sources(options, need_captions)
    if "alpha_mask" not in options:
        refuse_masks(source, options, method)
    if method in ("clip", "lcm"):
        refuse_drawn_captions(options, source, method)
    model = None
    if options.get("pretrained_model_name_or_path"):
        model = presets.find(options["pretrained_model_name_or_path"], weights=not is_planned)
        scheduler_config = scheduler_of(model)
        if options.get("unet_config") is None:
            defaults_from = model
    defaults = ModelDefaults.load(defaults_from) if defaults_from else ModelDefaults()
    relative_step = bool(options["adafactor_relative_step"])
    own = optimizer_defaults(options["optimizer"], defaults.training(method, variant), relative_step)
    for name, value in own.items():
        if name in options and options[name] is None:
            options[name] = value
    counts_repeats = counts_repeats is None or counts_repeats(source)
    if images is None and source is not None:
        images = images_of_epoch(source, own_repeats(source) if counts_repeats else None)
    options.update(updates_of_epochs(options, images, checkpoint))
    choose_validation(options)
    if not relative_step:
        check_learning_rate(options)
        _check_warmup(options)
    if scheduler_config is not None:
        check_schedule(scheduler_config, options)
    check_small_images(source, options, model)
    with interruption.phase("starting the backend"):
        settings = settings_of(options)
    if checkpoint is not None:
        check_resumed(checkpoint, method, settings, options, identity)
        check_same_data(checkpoint, source, options)
        schedule = scheduler_config and chosen_schedule(scheduler_config, options)
        check_same_model(checkpoint, model, schedule, options)
        warn_of_other_evaluations(options)
    inception = open_inception(options)
    _print_summary(method, settings, source, options)
    parts = settings, source, held_out, model, options, checkpoint, counts_repeats
    return Run(*parts, inception=inception)


def _check_trackers(options):
    """Raise UserError for figures that cannot go where they should."""
    from keras_sd.training.trackers import check_wandb, checked_trackers

    trackers = checked_trackers(options["report_to"])
    of_wandb = ("tracker_project_name", "wandb_run_name")
    refuse_unused(of_wandb, "wandb" in trackers, "without --report-to wandb")
    if "wandb" in trackers and not options["process_id"]:  # process 0 reports
        check_wandb()


def _check_warmup(options):
    warmup, steps = options["lr_warmup_steps"], options["max_train_steps"]
    if warmup > steps and is_given("lr_warmup_steps"):
        raise UserError(f"--lr-warmup-steps {warmup}: more than the {steps} steps of the run; give fewer")
    if warmup > steps / 2:
        warnings.warn(
            f"the learning rate rises until step {warmup}, and the run ends at {steps}; give a shorter "
            f"warm-up, as --lr-warmup-steps {steps // 10}",
            stacklevel=3,
        )


def _check_sources(options, need_captions):
    """Return the checked sources of training and held-out images; None if a method reads its own."""
    if "train_data_dir" not in options:
        return None, None
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.data.sources import available_splits, load_source

    reading = reading_of(options)
    if options.get("dataset_config"):
        source, held_out = split_source(configured_source(options, need_captions), (), options)
        print_notes(source, options)
        return source, held_out
    folder, name = options["train_data_dir"], options.get("dataset_name")
    if folder and name:
        raise UserError(f"--train-data-dir {folder}: --dataset-name {name} is given too; leave one out")
    if not folder and not name:
        if options.get("pretrained_model_name_or_path", "emoji") != "emoji":
            raise UserError("--train-data-dir: missing; give a folder of images, or --dataset-name")
        options["dataset_name"] = name = "emoji"  # what the bundled model was trained on
    place = Path(folder) if folder else name
    source = load_source(place, "train", MINIMUM_SIDE, need_captions, **reading)
    print_notes(source, options)
    held_out = ()
    if not reading["streaming"]:
        reading["max_samples"] = None  # which are of training
    reading["masks"] = None
    if "validation" in available_splits(place, reading["config_name"], reading["streaming"]):
        held_out = load_source(place, "validation", MINIMUM_SIDE, need_captions, **reading)
        print_notes(held_out, options)
    source, held_out = split_source(source, held_out, options)
    if options.get("validation_split"):
        print_notes(source, options)
    return source, held_out


def settings_of(options):
    """Return the `Settings` of a command's options, after starting distribution and seeding the weights."""
    import random

    from keras_sd import backend
    from keras_sd.training import distribution
    from keras_sd.training.run_folder import claim_output_dir
    from keras_sd.training.trainer import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    # Those that neither the user nor the model has given keep the library's defaults.
    given = {name: value for name, value in options.items() if name in names and value is not None}
    automatic = given["mixed_precision"] == "auto"
    settings = Settings(**given | ({"mixed_precision": "no"} if automatic else {}))
    distribution.start(
        options["distribution"],
        settings.train_batch_size,
        coordinator=options["coordinator"],
        num_processes=options["num_processes"],
        process_id=options["process_id"],
        timeout=options["coordinator_timeout"],
    )
    if not backend.process_index() and options["plan"] is None:
        claim_output_dir(options["output_dir"], options["resume_from_checkpoint"])
    if automatic and backend.multiplies_bfloat16():
        settings = dataclasses.replace(settings, mixed_precision="bf16")
    settings.use_precision()
    # Keras' initializers take their seeds from this generator. `keras.utils.set_random_seed` seeds it too,
    # but imports TensorFlow under every backend.
    random.seed(settings.seed)
    return settings


def _print_summary(method, settings, source, options):
    """Print the main settings of a run in one line."""
    from keras_sd import backend

    if backend.process_index() or options["plan"] is not None:
        return
    of_model = options.get("pretrained_model_name_or_path")
    parts = [method + (f" of {of_model}" if of_model else "")]
    if source is not None:
        parts.append(f"{len(source)} images of {_name_of_data(options)}")
    batch = f"batch size {settings.train_batch_size}"
    if settings.gradient_accumulation_steps > 1:
        batch += f" x {settings.gradient_accumulation_steps}"
    rate = "relative steps"
    if settings.learning_rate is not None:
        rate = f"learning rate {settings.learning_rate:g} ({settings.lr_scheduler}, warm-up "
        rate += f"{settings.lr_warmup_steps})"
    if settings.text_encoder_lr is not None:
        rate += f", of the text encoder {settings.text_encoder_lr:g}"
    if settings.learning_rate_by_block is not None:
        rate += f", times {settings.learning_rate_by_block}"
    named = [] if settings.optimizer == "adamw" else [TITLES[settings.optimizer]]
    epochs = options["num_train_epochs"]
    length = f"{settings.max_train_steps} steps" + (f" ({epochs} epochs)" if epochs else "")
    parts += [length, batch, *named, rate]
    parts += [f"EMA {settings.ema_decay:g}", f"mixed precision {settings.mixed_precision}"]
    print(f"training: {', '.join([*parts, str(settings.output_dir)])}", file=sys.stderr, flush=True)


def _name_of_data(options):
    return next(options[name] for name in _DATA if options.get(name))
