"""The command that makes a model out of a checkpoint of a training run."""

import contextlib
import json
import shutil
from pathlib import Path

import click

# Whatever loads a backend is imported inside the command, after its options have been checked.
from keras_sd import config
from keras_sd.errors import UserError
from keras_sd.generate import DTYPES
from keras_sd.outputs import check_output_folder, overwrite_option


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint")
@click.argument("folder")
@click.option("--dtype", type=click.Choice(DTYPES), help="Precision to write; by default as the run would.")
@click.option(
    "--weights", default="ema", type=click.Choice(["ema", "raw"]), help="EMA weights, or those of the step."
)
@overwrite_option
def export(checkpoint, folder, dtype, weights, overwrite):
    """Write the model of CHECKPOINT, a run's checkpoint-N, to FOLDER, as the run does at its end.

    The base model is opened again as the run has opened it, and has to be the same.
    """
    checkpoint = Path(checkpoint).resolve()
    place = check_output_folder(folder, None, overwrite, is_own=_is_exported).resolve()
    run = read_run(checkpoint)
    from keras_sd.training.checkpoints import Checkpoints
    from keras_sd.training.run_folder import write_whole_folder

    loaded = Checkpoints(checkpoint.parent, {}).load(checkpoint)
    with _in_folder(run["directory"]):
        objective, write = _REBUILD[run["method"]](run["options"], loaded.config)
    _assign(objective, loaded.groups["ema" if weights == "ema" else "weights"], checkpoint)

    def write_model(staging):
        with _in_folder(run["directory"]):
            write(staging)
        if dtype is not None:
            _cast(staging, dtype)
        shutil.copyfile(checkpoint / "config.json", staging / _MARK)

    write_whole_folder(place, write_model)
    click.echo(folder)


_MARK = "trained.json"  # what the model was trained on, and the sign of a folder that was exported


def _is_exported(folder):
    return (folder / _MARK).is_file()


def read_run(checkpoint):
    """How the run of a checkpoint was started: its method, its options and the folder it was started in.

    Raises:
        UserError: it is no checkpoint of a training command.
    """
    from keras_sd.training.run_folder import DESCRIPTION

    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder; give RUN/checkpoint-N")
    path = checkpoint.parent / DESCRIPTION
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        method = run["method"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; give the checkpoint in the folder of a run that a training command has made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); resume the run, which writes it anew") from None
    if method not in _REBUILD:
        raise UserError(f"{path}: method {method!r} cannot be exported; known are {', '.join(_REBUILD)}")
    return run


def _in_folder(place):
    """Within the block, paths are meant from where the run was started, if that is still there."""
    return contextlib.chdir(place) if Path(place).is_dir() else contextlib.nullcontext()


def _assign(objective, tensors, checkpoint):
    """Gives an objective's variables the values that a checkpoint has for them, all of which must fit."""
    from keras_sd.weights.rules import parameter_paths

    variables = {parameter.name: parameter.variable for parameter in parameter_paths(objective)}
    for name, tensor in tensors.items():
        variable = variables.get(name)
        if variable is None or tuple(variable.shape) != tensor.shape:
            raise UserError(
                f"{checkpoint}: {name} {list(tensor.shape)} does not fit the model that its run "
                "names; see that its base model and configs are those of the run"
            )
        variable.assign(tensor)


def _cast(folder, dtype):
    """Writes all weights below a folder in another precision."""
    from keras_sd.weights.formats import read_safetensors, write_safetensors

    for path in folder.rglob("*.safetensors"):
        tensors = {name: array.copy() for name, array in read_safetensors(path).items()}
        write_safetensors(path, tensors, dtype)


def _open(options, identity, trained=(), adapt=None):
    """The pretrained pipeline of a run, after a comparison of its parts with those that the run has had."""
    from keras_sd.train_options import Run, find_model, open_pipeline
    from keras_sd.training.settings import Settings
    from keras_sd.weights.rules import weights_fingerprint

    name = options.get("pretrained_model_name_or_path")
    options = {**options, "unet_config": None, "jit_compile": False}
    run = Run(Settings("unused", train_batch_size=1), None, None, find_model(name), options)
    if trained:
        from keras_sd.finetune import open_with_loras

        pipeline, alpha, _ = open_with_loras(run, trained)
    else:
        pipeline, alpha = open_pipeline(run, adapt), None
    for part in ("vae", "text_encoder", "unet"):
        if identity.get(part) is not None and weights_fingerprint(getattr(pipeline, part)) != identity[part]:
            raise UserError(
                f"{name}: its {part} is not the one that the run has begun with; bring back the base model"
            )
    return pipeline, alpha


def _diffusion_objective(pipeline):
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.training.losses import DiffusionObjective

    schedule = NoiseSchedule(pipeline.scheduler_config)
    return DiffusionObjective(pipeline.unet, schedule, text_encoder=pipeline.text_encoder)


def _text_to_image(options, identity):
    def begin_anew(parts):
        from keras_sd.models.unet import UNet

        parts["unet"] = UNet(config.UNetConfig.from_dict(identity["model"]))

    pipeline, _ = _open(options, identity, adapt=begin_anew if options["from_scratch"] else None)
    return _diffusion_objective(pipeline), pipeline.save


def _lora(options, identity):
    return _low_rank(options, identity, _trained(options))


def _lcm(options, identity):
    return _low_rank(options, identity, ("unet",))


def _dreambooth(options, identity):
    if options["lora"]:
        return _low_rank(options, identity, _trained(options))
    pipeline, _ = _open(options, identity)
    return _diffusion_objective(pipeline), pipeline.save


def _trained(options):
    return ("unet", "text_encoder") if options["train_text_encoder"] else ("unet",)


def _low_rank(options, identity, trained):
    from keras_sd.training.lora import save_lora

    pipeline, alpha = _open(options, identity, trained)
    models = {name: getattr(pipeline, name) for name in trained}
    return _diffusion_objective(pipeline), lambda folder: save_lora(folder, models, alpha)


def _textual_inversion(options, identity):
    from keras import ops

    from keras_sd.training.textual_inversion import initial_vectors, save_embedding

    pipeline, _ = _open(options, identity)
    token, count = options["placeholder_token"], options["num_vectors"]
    pipeline.add_tokens({token: initial_vectors(pipeline, count)})
    learned = pipeline.text_encoder.embeddings.learned_embedding.embeddings
    return (
        _diffusion_objective(pipeline),
        lambda folder: save_embedding(folder, token, ops.convert_to_numpy(learned)),
    )


def _vae(options, identity):
    import dataclasses

    from keras_sd.loading import load_part
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.autoencoder import measure_scale
    from keras_sd.training.losses import AutoencoderObjective
    from keras_sd.weights.diffusers_folder import write_part
    from keras_sd.weights.rules import torch_state

    vae_config = config.VAEConfig.from_dict(identity["model"])
    if options["pretrained_vae"]:  # with --decoder-only a checkpoint holds a part of the weights
        vae = load_part(options["pretrained_vae"], "vae", "float32")
    else:
        vae = AutoencoderKL(vae_config)

    def write(folder):
        written = vae_config
        if not options["decoder_only"]:
            source = _source(options, vae_config.sample_size, need_captions=False)
            written = dataclasses.replace(vae_config, scaling_factor=measure_scale(vae, source))
        write_part(folder, "vae", written.to_dict(), torch_state(vae))

    return AutoencoderObjective(vae), write


def _source(options, image_size, need_captions):
    """The images that the run was trained on, which a part of its model is measured on."""
    from keras_sd.data.datasets import load_source

    folder = options["train_data_dir"]
    place = Path(folder) if folder else options["dataset_name"] or "emoji"
    return load_source(place, "train", image_size, need_captions)


def _clip(options, identity):
    from keras_sd.loading import load_clip
    from keras_sd.models.image_encoder import ImageEncoder
    from keras_sd.train_from_scratch import new_text_encoder
    from keras_sd.training.contrastive import save_clip
    from keras_sd.training.losses import ContrastiveObjective

    image_config = config.ImageEncoderConfig.from_dict(identity["image_model"])
    if options["frozen_text_encoder"]:
        parts = load_clip(options["frozen_text_encoder"])
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    else:
        tokens = options["tokenizer_folder"]
        source = None if tokens else _source(options, image_config.image_size, need_captions=True)
        tokenizer, text_encoder = new_text_encoder(options["text_config"], tokens, source)
    objective = ContrastiveObjective(text_encoder, ImageEncoder(image_config))
    return objective, lambda folder: save_clip(folder, objective, tokenizer)


def _ddim(options, identity):
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.unet import UNet
    from keras_sd.training.losses import DiffusionObjective
    from keras_sd.training.pixel_ddim import save_model

    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    scheduler = config.SchedulerConfig.from_dict(identity["schedule"])
    return (
        DiffusionObjective(unet, NoiseSchedule(scheduler)),
        lambda folder: save_model(folder, unet, scheduler),
    )


def _super_resolution(options, identity):
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.unet import UNet
    from keras_sd.training.losses import DiffusionObjective
    from keras_sd.upscaler import Upscaler

    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    schedules = [
        config.SchedulerConfig.from_dict(identity[name]) for name in ("schedule", "low_res_schedule")
    ]
    return DiffusionObjective(unet, NoiseSchedule(schedules[0])), Upscaler(unet, *schedules).save


# Method -> what opens its model again: (options, identity) -> (objective, `write(folder)`).
_REBUILD = {
    "text-to-image": _text_to_image,
    "lora": _lora,
    "lcm": _lcm,
    "dreambooth": _dreambooth,
    "textual-inversion": _textual_inversion,
    "vae": _vae,
    "clip": _clip,
    "ddim": _ddim,
    "super-resolution": _super_resolution,
}
