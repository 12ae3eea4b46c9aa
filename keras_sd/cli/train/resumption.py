"""What forbids to resume a run, told before a model is opened.

`Checkpoints.resolve` compares everything once the trainer is made. What the options, the data set and the
configs of the model say is compared here; the weights of the model can only be compared when it is open.
"""

from keras_sd.cli.train.diffusion import diffusion_of
from keras_sd.cli.train.framing import framing_of, own_size_of
from keras_sd.errors import UserError


def check_resumed(checkpoint, method, settings, options, identity):
    """Raise UserError for a checkpoint of a run with other options.

    Args:
        checkpoint: its folder.
        method: the training method's name.
        settings: `trainer.Settings`.
        options: of the command, with the model's defaults filled in.
        identity: further JSON values that the checkpoint must share.
    """
    from keras_sd.training import post_hoc_ema
    from keras_sd.training.checkpoints import UNNAMED, check_same_run, groups_of, steps_and_examples
    from keras_sd.training.resuming import check_averages
    from keras_sd.training.settings import MAY_CHANGE

    step, _ = steps_and_examples(checkpoint)
    if step > settings.max_train_steps:
        raise UserError(
            f"max_train_steps {settings.max_train_steps}: {checkpoint} is of step {step}; give {step} or "
            "more, or resume from an earlier checkpoint"
        )
    known = {name: value for name, value in settings.identity().items() if name not in MAY_CHANGE}
    check_same_run(checkpoint, {"method": method})
    check_same_run(checkpoint, {"optimizer": settings.optimizer})  # first, as its options differ too
    check_same_run(checkpoint, UNNAMED | known | _of_options(options) | identity)
    if settings.post_hoc_ema:
        averages = list(map(post_hoc_ema.group_of, post_hoc_ema.SIGMAS))
        check_averages(checkpoint, groups_of(checkpoint), averages)


def _of_options(options):
    """Return the JSON values of options that several methods share, under their names in checkpoints."""
    values = {}
    if "timestep_sampling" in options:
        values |= diffusion_of(options).identity()
    if "proportion_empty_prompts" in options:
        values["caption_dropout"] = options["proportion_empty_prompts"]
    if "cache_dtype" in options:
        values["cache_dtype"] = options["cache_dtype"]
    return values


def check_same_data(checkpoint, source, options):
    """Raise UserError for a checkpoint of other images.

    Images that are too small are left out later, and change what is compared; then nothing is compared here.

    Args:
        source: the source of the run, not framed; None if the method reads its own.
    """
    from keras_sd.training.checkpoints import check_same_run

    if source is not None and options.get("on_bad_sample") != "skip":
        check_same_run(checkpoint, {"data": source.fingerprint()})


def check_same_model(checkpoint, model, schedule, options):
    """Raise UserError for a checkpoint of another network, noise schedule, size or crop.

    Args:
        model: path of the pretrained model, or None. A single file is compared when it is open.
        schedule: `SchedulerConfig` of the run, or None.
    """
    from keras_sd.config import UNetConfig
    from keras_sd.training.checkpoints import check_same_run
    from keras_sd.weights.readers import read_configs

    side = options["resolution"]
    is_folder = model is not None and model.is_dir()
    if is_folder and not options.get("from_scratch"):
        unet = read_configs(model).parts.get("unet")
        if unet is not None:
            check_same_run(checkpoint, {"model": UNetConfig.from_dict(unet.config).to_dict()})
        if not options.get("pretrained_vae"):  # which may have another factor
            side = side or own_size_of(model)
    if schedule is not None and not options.get("from_scratch") and (model is None or is_folder):
        check_same_run(checkpoint, {"schedule": schedule.noise_schedule()})
    if side:
        check_same_run(checkpoint, {"framing": framing_of(options, side).identity()})
