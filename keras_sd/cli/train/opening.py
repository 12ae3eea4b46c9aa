"""The pretrained model of a training run, and the configs of new parts."""

from keras_sd import config, interruption, presets
from keras_sd.cli.model_options import skipped_layers
from keras_sd.cli.train.schedule import chosen_schedule
from keras_sd.data.emoji import architecture
from keras_sd.training.rate_factors import check_blocks

SMALL_IMAGE = 128  # pixels; evaluations generate more images of at most this size, and enlarge them
PARTS = (
    *("tokenizer", "text_encoder", "image_encoder", "clip_head", "unet", "vae", "scheduler_config"),
    "low_res_scheduler_config",
)


def open_pipeline(run, adapt=None):
    """Open the pretrained model, and replace the parts that the options name or train from scratch.

    Args:
        run: the result of `preparation.prepare`.
        adapt: called with the dictionary of parts before anything is compiled with them.
    """
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline.stable_diffusion import StableDiffusion
    from keras_sd.training.clip_skip import skip_layers
    from keras_sd.training.trainer import PRECISIONS
    from keras_sd.weights.loading import load_clip, load_part

    options = run.options
    has_weights = options.get("plan") is None
    vae_folder, clip_folder = (
        options.get(name) and presets.find(options[name], weights=has_weights)
        for name in ("pretrained_vae", "pretrained_clip")
    )
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
    parts["scheduler_config"] = chosen_schedule(parts["scheduler_config"], options)
    if adapt is not None:
        adapt(parts)
    if options.get("clip_skip", 1) > 1:
        skip_layers(parts["text_encoder"], skipped_layers(parts["text_encoder"], options["clip_skip"]))
    if options.get("learning_rate_by_block"):
        check_blocks(parts["unet"], options["learning_rate_by_block"])
    pipeline = StableDiffusion(**parts, defaults=defaults, jit_compile=options["jit_compile"])
    # Sample images are generated while all that training needs stays in memory.
    largest = 64 if run.resolution(image_size_of(pipeline)) <= SMALL_IMAGE else 4
    pipeline.batch_size = min(run.settings.train_batch_size, largest)
    return pipeline


def find_part(name, part):
    """Return the path of a model that has a part, which is checked before anything is opened.

    Args:
        name: preset, hub id, or path of a model or of the part alone.
        part: "image_encoder", "text_encoder" or "vae".

    Raises:
        UserError: there is no such model, or it has no such part.
    """
    from keras_sd.weights.readers import read_part

    place = presets.find(name)
    read_part(place, part)
    return place


def image_size_of(pipeline):
    """Return the side of a model's training images, in pixels."""
    return pipeline.unet.config.sample_size * pipeline.vae.config.downsampling


def read_config(path, config_class, default):
    return config_class.load(path) if path else default


def defaults_from(config_path):
    """Return the folder of the emoji model, whose defaults suit the built-in configs; None for a user's."""
    return None if config_path else presets.find("emoji")
