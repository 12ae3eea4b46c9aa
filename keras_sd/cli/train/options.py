"""What the training commands share: their options, the checks of these, and what they open.

`prepare` checks a run before it loads a backend: its options, its folder, its images, its model's place. What
is at fault is told within seconds.
"""

import dataclasses
import functools
import sys
import warnings
from pathlib import Path

import click

from keras_sd import config, interruption, presets
from keras_sd.cli.option_types import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, Number
from keras_sd.data.emoji import architecture
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError, require
from keras_sd.pipeline.defaults import ModelDefaults, usual

FEWEST_FOR_KID = 4  # images in a set: two in each half
SMALL_IMAGE = 128  # pixels; of images up to this size, evaluations draw more and show them enlarged


DECAY = Number(min=0, max=1, max_open=True)
# Looked for when the command runs, as its documentation may be read where they are not.
FILE, FILE_OR_FOLDER = click.Path(dir_okay=False), click.Path()

# What an evaluation alone uses.
_OF_EVALUATIONS = (
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


def decorated(*options):
    """One decorator that adds all of these options, in this order."""

    def decorate(command):
        return functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)

    return decorate


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


@dataclasses.dataclass
class Run:
    """What `prepare` has found.

    Attributes:
        settings: `trainer.Settings`.
        source, held_out: the images to train on and those held out (empty if there are none), checked, but
            not yet of the size that they are trained at (`source.at_size`); None where a method has its own.
        model: path of the pretrained model, or None.
        options: of the command, with all values.
    """

    settings: object
    source: object
    held_out: object
    model: Path | None
    options: dict

    def sources(self, image_size):
        """The training images and the held-out ones at a size, and how often an epoch shows each."""
        source = self.source.at_size(image_size)
        held_out = self.held_out.at_size(image_size) if self.held_out else ()
        return source, held_out, source.repeats() if hasattr(source, "repeats") else None


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
):
    """Checks a run and starts its backend; whatever a user can mend is told before long work.

    Args:
        method, variant: in `keras_sd.pipeline.defaults`.
        options: of the command. Those that follow the model are filled in.
        defaults_from: folder of the model whose values the options follow; that of the pretrained model, for
            methods that open one, unless its UNet begins anew by another config.
        need_captions: whether images need captions.
        scheduler_config: of the noise schedule, where it is not the pretrained model's.
        used: options of evaluations that the method also uses otherwise.
        identity: JSON values that follow from the options and that a checkpoint to resume must share.

    Returns:
        `Run`.
    """
    from keras_sd.training.run_folder import claim_output_dir

    require("grain", "tensorboard")
    idle = [name for name in _OF_EVALUATIONS if name not in used]
    refuse_unused(idle, options["evaluation_steps"], "with --evaluation-steps 0")
    # Of several processes the first one takes the folder, once they know which that is.
    claim_output_dir(
        options["output_dir"], options["resume_from_checkpoint"], lock=options["distribution"] is None
    )
    source, held_out = _check_sources(options, need_captions)
    model = None
    if options.get("pretrained_model_name_or_path"):
        model = find_model(options["pretrained_model_name_or_path"])
        scheduler_config = _scheduler_of(model)
        if options.get("unet_config") is None:
            defaults_from = model
    defaults = ModelDefaults.load(defaults_from) if defaults_from else ModelDefaults()
    for name, value in defaults.training(method, variant).items():
        if name in options and options[name] is None:
            options[name] = value
    _check_warmup(options)
    if scheduler_config is not None:
        _check_schedule(scheduler_config, options)
    with interruption.phase("starting the backend"):
        settings = settings_of(options)
    _check_resumed(settings, identity or {})
    _tell(method, settings, source, options)
    return Run(settings, source, held_out, model, options)


def _check_resumed(settings, identity):
    """Refuses a checkpoint of other options before images are encoded; the run itself compares all."""
    from keras_sd.training.checkpoints import check_same_run
    from keras_sd.training.run_folder import find_checkpoint
    from keras_sd.training.settings import MAY_CHANGE

    if settings.resume_from_checkpoint is not None:
        folder = find_checkpoint(settings.output_dir, settings.resume_from_checkpoint)
        known = {name: value for name, value in settings.identity().items() if name not in MAY_CHANGE}
        check_same_run(folder, identity | known)


def find_model(name):
    """The file or folder of a model named on the command line."""
    return Path(name) if Path(name).is_file() else presets.find(name)


def _scheduler_of(model):
    """The noise schedule's config of a model's folder; the usual one of a single file, which brings none."""
    path = model / "scheduler" / "scheduler_config.json"
    return SchedulerConfig.load(path) if path.is_file() else SchedulerConfig()


def _check_schedule(scheduler_config, options):
    if options.get("prediction_type"):
        scheduler_config = dataclasses.replace(scheduler_config, prediction_type=options["prediction_type"])
    NoiseSchedule(scheduler_config).check_learnable()
    steps, most = options["num_inference_steps"], scheduler_config.num_train_timesteps
    if steps > most:
        raise UserError(f"--num-inference-steps {steps}: the model has {most} timesteps; give fewer")


def _check_warmup(options):
    warmup, steps = options["lr_warmup_steps"], options["max_train_steps"]
    if warmup > steps / 2:
        warnings.warn(
            f"the learning rate rises over {warmup} of {steps} steps; give a shorter --lr-warmup-steps",
            stacklevel=3,
        )


def _check_sources(options, need_captions):
    """The checked sources of training and held-out images; none where a method reads its own."""
    if "train_data_dir" not in options:
        return None, None
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.data.sources import available_splits, load_source

    folder, name = options["train_data_dir"], options.get("dataset_name")
    if folder and name:
        raise UserError(f"--train-data-dir {folder}: --dataset-name {name} is given too; leave one out")
    if not folder and not name:
        if options.get("pretrained_model_name_or_path", "emoji") != "emoji":
            raise UserError("--train-data-dir: missing; give a folder of images, or --dataset-name")
        options["dataset_name"] = name = "emoji"  # what the bundled model was trained on
    place = Path(folder) if folder else name
    source = load_source(place, "train", MINIMUM_SIDE, need_captions)
    held_out = ()
    if "validation" in available_splits(place):
        held_out = load_source(place, "validation", MINIMUM_SIDE, need_captions)
    return source, held_out


def settings_of(options):
    """Makes the `Settings` of a command's options, spreads models over the devices and seeds the weights."""
    import random

    from keras_sd import backend
    from keras_sd.training import distribution
    from keras_sd.training.run_folder import claim_output_dir
    from keras_sd.training.trainer import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in options.items() if name in names}
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
    if not backend.process_index():
        claim_output_dir(options["output_dir"], options["resume_from_checkpoint"])
    if automatic and backend.multiplies_bfloat16():
        settings = dataclasses.replace(settings, mixed_precision="bf16")
    settings.use_precision()
    # Keras' initialisers take their seeds from this generator. `keras.utils.set_random_seed` sets it too,
    # but imports TensorFlow, where it is installed, under every backend.
    random.seed(settings.seed)
    return settings


def _tell(method, settings, source, options):
    """Tells the values that decide a run, whoever has chosen them, in one line."""
    from keras_sd import backend

    if backend.process_index():
        return
    of_model = options.get("pretrained_model_name_or_path")
    told = [method + (f" of {of_model}" if of_model else "")]
    if source is not None:
        told.append(f"{len(source)} images of {options['train_data_dir'] or options['dataset_name']}")
    batch = f"batch size {settings.train_batch_size}"
    if settings.gradient_accumulation_steps > 1:
        batch += f" x {settings.gradient_accumulation_steps}"
    rate = f"learning rate {settings.learning_rate:g} ({settings.lr_scheduler}"
    told += [f"{settings.max_train_steps} steps", batch, f"{rate}, warm-up {settings.lr_warmup_steps})"]
    told += [f"EMA {settings.ema_decay:g}", f"mixed precision {settings.mixed_precision}"]
    print(f"training: {', '.join([*told, str(settings.output_dir)])}", file=sys.stderr, flush=True)


def example_sets(source, held_out, count):
    """The examples that KID is measured on, spread evenly over each split that has enough of them."""
    from keras_sd.data.sources import evenly

    splits = {"train": source, "held_out": held_out}
    return {
        name: evenly(split, count) for name, split in splits.items() if count and len(split) >= FEWEST_FOR_KID
    }


def extractor_of(name, jit_compile=True):
    """The feature extractor of that KID; the choice offers no other names."""
    from keras_sd.metrics.features import ClipFeatures, InceptionFeatures
    from keras_sd.weights.loading import load_part

    if name == "kid_inception":
        return InceptionFeatures(75, jit_compile=jit_compile)
    return ClipFeatures(load_part(presets.find("emoji"), "image_encoder"), jit_compile=jit_compile)


PARTS = ("tokenizer", "text_encoder", "image_encoder", "clip_head", "unet", "vae", "scheduler_config")


def open_pipeline(run, adapt=None):
    """The pretrained model, with those parts replaced that the options name or begin anew.

    Args:
        run: what `prepare` has found.
        adapt: called with the parts, as a dictionary, before anything is compiled with them.
    """
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline.stable_diffusion import StableDiffusion
    from keras_sd.training.trainer import PRECISIONS
    from keras_sd.weights.loading import load_clip, load_part

    options = run.options
    vae_folder, clip_folder = options.get("pretrained_vae"), options.get("pretrained_clip")
    dtype = PRECISIONS[run.settings.mixed_precision]
    parts, defaults = {}, None
    if not (vae_folder and clip_folder and options["from_scratch"]):
        with interruption.phase(f"opening {options['pretrained_model_name_or_path']}"):
            pretrained = StableDiffusion.load(run.model, dtype=dtype)
        parts = {name: getattr(pretrained, name) for name in PARTS}
        defaults = pretrained.defaults
    if vae_folder:
        parts["vae"] = load_part(vae_folder, "vae", dtype)
    if clip_folder:
        parts |= load_clip(clip_folder)
    if options.get("from_scratch"):
        parts["unet"] = UNet(read_config(options["unet_config"], config.UNetConfig, architecture.EMOJI_UNET))
        parts.setdefault("scheduler_config", architecture.EMOJI_SCHEDULER)
    if options.get("prediction_type"):
        parts["scheduler_config"] = dataclasses.replace(
            parts["scheduler_config"], prediction_type=options["prediction_type"]
        )
    if adapt is not None:
        adapt(parts)
    pipeline = StableDiffusion(**parts, defaults=defaults, jit_compile=options["jit_compile"])
    # Samples are drawn while all that training needs stays in memory.
    largest = 64 if image_size_of(pipeline) <= SMALL_IMAGE else 4
    pipeline.batch_size = min(run.settings.train_batch_size, largest)
    return pipeline


def image_size_of(pipeline):
    """The side of the images that a model is trained at."""
    return pipeline.unet.config.sample_size * pipeline.vae.config.downsampling


def read_config(path, config_class, default):
    return config_class.load(path) if path else default


def defaults_from(config_path):
    """The model whose values a small built-in network is trained with; None for one of a user's config."""
    return None if config_path else presets.find("emoji")
