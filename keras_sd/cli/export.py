"""The command that makes a model out of a checkpoint of a training run."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import click
from typing_extensions import TypedDict

from keras_sd import config, interruption, presets
from keras_sd.cli.command import Command
from keras_sd.cli.model_options import DTYPES
from keras_sd.cli.outputs import check_output_folder, overwrite_option

# Whatever loads a backend is imported inside the command, after its options have been checked.
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, shape_fault, shown


@click.command(cls=Command, context_settings={"show_default": True})
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
    _check_is_apart(place, checkpoint.parent)
    with interruption.phase(f"opening {checkpoint}"):
        from keras_sd.training.checkpoints import Checkpoints
        from keras_sd.training.run_folder import write_whole_folder

        loaded = Checkpoints(checkpoint.parent, {}).load(checkpoint)
        if loaded.config.get("method", run["method"]) != run["method"]:
            raise _misfit("method", loaded.config["method"], run["method"])
        with _in_folder(run["directory"]):
            objective, write = _REBUILD[run["method"]](run["options"], loaded.config)
    _assign(objective, loaded.groups["ema" if weights == "ema" else "weights"], checkpoint)

    def write_model(staging):
        with _in_folder(run["directory"]):
            write(staging)
        if dtype is not None:
            _cast(staging, dtype)
        shutil.copyfile(checkpoint / "config.json", staging / _MARK)

    with interruption.phase(f"writing {folder}"):
        write_whole_folder(place, write_model)
    click.echo(folder)


_MARK = "trained.json"  # what the model was trained on, and the sign of a folder that was exported


def _is_exported(folder):
    return (folder / _MARK).is_file()


def _check_is_apart(place, run_folder):
    """Raises UserError if a place is one of a run's checkpoints, or inside one."""
    from keras_sd.training.checkpoints import MANIFEST, POSITION
    from keras_sd.training.run_folder import DESCRIPTION, is_checkpoint_name

    for each in (place, *place.parents):
        is_there = (each / MANIFEST).is_file() and (each / POSITION).is_file()
        in_run = each.parent == run_folder or (each.parent / DESCRIPTION).is_file()
        if is_there or (in_run and is_checkpoint_name(each.name)):
            raise UserError(f"{place}: is in the place of a checkpoint; choose a folder outside of the run")


class _Options(dict):
    """The options in a `run.json`; one that lacks and is needed is told."""

    def __missing__(self, name):
        raise _damaged(f"option {name} is missing")


def _damaged(fault):
    return UserError(f"run.json: is damaged ({fault}); resume the run, which writes it anew")


def _misfit(name, there, here):
    return UserError(
        f"run.json: {name} is {json.dumps(here)}, but the checkpoint was trained with {json.dumps(there)}; "
        "resume the run from it, which writes run.json anew"
    )


def _check_same(identity, values):
    """Raises UserError if values of a run's options are others than those that a checkpoint keeps."""
    for name, value in values.items():
        if name in identity and identity[name] != value:
            raise _misfit(name, identity[name], value)


def _check_config(identity, name, rebuilt):
    """The same for the config of a network or of a schedule."""
    if name in identity and type(rebuilt).from_dict(identity[name]) != rebuilt:
        raise UserError(
            f"run.json: gives another {name} than the checkpoint was trained with; bring back the base model "
            "and the options of the run"
        )


class RunDescription(TypedDict):
    """The shape of `run.json`."""

    method: str
    directory: str
    options: dict


def read_run(checkpoint):
    """How the run of a checkpoint was started: its method, its options and the folder it was started in.

    Raises:
        UserError: it is no checkpoint of a training command.
    """
    from keras_sd.training.run_folder import DESCRIPTION

    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder; give RUN/checkpoint-N")
    path = checkpoint.parent / DESCRIPTION
    absent = "give the checkpoint in the folder of a run that a training command has made"
    run = read_json(path, absent=absent, remedy="resume the run, which writes it anew")
    version = run.get("version")
    if type(version) is not int or version != 1:
        raise UserError(
            f"{path}: version {shown(version)} is not supported, only 1; export with a newer keras_sd"
        )
    fault = shape_fault(run, RunDescription)
    if fault:
        raise _damaged(fault)
    if run["method"] not in _REBUILD:
        raise UserError(
            f"{path}: method {shown(run['method'])} cannot be exported; known are {', '.join(_REBUILD)}"
        )
    return {**run, "options": _checked_options(run["method"], run["options"])}


def _checked_options(method, options):
    from keras_sd.cli.train.main import train

    for parameter in train.commands[method].params:
        if not _fits(parameter, options.get(parameter.name)):
            raise _damaged(f"option {parameter.name} is {json.dumps(options[parameter.name])[:40]}")
    return _Options(options)


def _fits(parameter, value):
    """Whether a JSON value is one that an option can have had."""
    if value is None:
        return True
    if parameter.multiple:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if isinstance(parameter.type, click.types.BoolParamType):
        return isinstance(value, bool)
    if isinstance(parameter.type, click.types.IntParamType):
        kinds = (int,)
    elif isinstance(parameter.type, click.types.FloatParamType):
        kinds = (int, float)
    else:
        kinds = (str,)
    if type(value) not in kinds:
        return False
    if isinstance(parameter.type, click.Path):
        return True  # which might be sought
    try:
        parameter.type.convert(value, parameter, None)
    except (click.BadParameter, OverflowError):
        return False
    return True


def _in_folder(place):
    """Within the block, paths are meant from where the run was started, if that is still there."""
    return contextlib.chdir(place) if Path(place).is_dir() else contextlib.nullcontext()


def _assign(objective, tensors, checkpoint):
    """Gives an objective's variables the values that a checkpoint has for them, all of which must fit."""
    from keras_sd.models.parameters import parameter_paths

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
    from keras_sd.cli.train.preparation import Run, open_pipeline
    from keras_sd.training.settings import Settings
    from keras_sd.weights.rules import weights_fingerprint

    name = options["pretrained_model_name_or_path"]
    if name is None:
        raise _damaged("option pretrained_model_name_or_path is null")
    options = _Options({**options, "unet_config": None, "jit_compile": False})
    run = Run(Settings("unused", train_batch_size=1), None, None, presets.find(name), options)
    if trained:
        from keras_sd.cli.train.lora import open_with_loras

        pipeline, alpha, _ = open_with_loras(run, trained)
    else:
        pipeline, alpha = open_pipeline(run, adapt), None
    for part in ("vae", "text_encoder", "unet"):
        if identity.get(part) is not None and weights_fingerprint(getattr(pipeline, part)) != identity[part]:
            raise UserError(
                f"{name}: its {part} is not the one that the run has begun with; bring back the base model"
            )
    _check_same(identity, {key: options[key] for key in ("seed", "train_text_encoder") if key in options})
    _check_config(identity, "model", pipeline.unet.config)
    _check_config(identity, "schedule", pipeline.scheduler_config)
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
    from keras_sd.cli.train.lora import low_rank_identity
    from keras_sd.training.lora import save_lora

    if "rank" not in identity:
        raise _misfit("rank", None, options["rank"])
    _check_same(identity, low_rank_identity(options, trained))
    pipeline, alpha = _open(options, identity, trained)
    models = {name: getattr(pipeline, name) for name in trained}
    return _diffusion_objective(pipeline), lambda folder: save_lora(folder, models, alpha)


def _textual_inversion(options, identity):
    from keras import ops

    from keras_sd.models.tokenizer import vector_names
    from keras_sd.training.textual_inversion import initial_vectors, save_embedding

    token, count = options["placeholder_token"], options["num_vectors"]
    _check_same(identity, {"tokens": vector_names(token, count)})
    pipeline, _ = _open(options, identity)
    pipeline.add_tokens({token: initial_vectors(pipeline, count)})
    learned = pipeline.text_encoder.embeddings.learned_embedding.embeddings
    return (
        _diffusion_objective(pipeline),
        lambda folder: save_embedding(folder, token, ops.convert_to_numpy(learned)),
    )


def _vae(options, identity):
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.autoencoder import measure_scale
    from keras_sd.training.losses import AutoencoderObjective
    from keras_sd.weights.diffusers_folder import write_part
    from keras_sd.weights.loading import load_part
    from keras_sd.weights.rules import torch_state

    _check_same(identity, {"decoder_only": options["decoder_only"]})
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
    from keras_sd.data.sources import load_source

    folder = options["train_data_dir"]
    place = Path(folder) if folder else options["dataset_name"] or "emoji"
    return load_source(place, "train", image_size, need_captions)


def _clip(options, identity):
    from keras_sd.cli.train.clip import new_text_encoder
    from keras_sd.models.image_encoder import ImageEncoder
    from keras_sd.training.contrastive import save_clip
    from keras_sd.training.losses import ContrastiveObjective
    from keras_sd.weights.loading import load_clip

    image_config = config.ImageEncoderConfig.from_dict(identity["image_model"])
    if options["frozen_text_encoder"]:
        parts = load_clip(options["frozen_text_encoder"])
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    else:
        tokens = options["tokenizer_folder"]
        source = None if tokens else _source(options, image_config.image_size, need_captions=True)
        tokenizer, text_encoder = new_text_encoder(options["text_config"], tokens, source)
    _check_config(identity, "text_model", text_encoder.config)
    objective = ContrastiveObjective(text_encoder, ImageEncoder(image_config))
    return objective, lambda folder: save_clip(folder, objective, tokenizer)


def _ddim(options, identity):
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.unet import UNet
    from keras_sd.training.losses import DiffusionObjective
    from keras_sd.training.pixel_ddim import save_model

    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    scheduler = _schedule(identity, "schedule")
    return (
        DiffusionObjective(unet, NoiseSchedule(scheduler)),
        lambda folder: save_model(folder, unet, scheduler),
    )


def _super_resolution(options, identity):
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline.upscaler import Upscaler
    from keras_sd.training.losses import DiffusionObjective

    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    schedules = [_schedule(identity, name) for name in ("schedule", "low_res_schedule")]
    return DiffusionObjective(unet, NoiseSchedule(schedules[0])), Upscaler(unet, *schedules).save


def _schedule(identity, name):
    """The schedule of a run, which no file describes."""
    return dataclasses.replace(SchedulerConfig.from_dict(identity[name]), published=None)


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
