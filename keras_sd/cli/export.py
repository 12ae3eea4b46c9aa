"""The command that writes the model of a training run's checkpoint."""

import contextlib
import json
import shutil
from pathlib import Path

import click
from typing_extensions import TypedDict

from keras_sd import interruption
from keras_sd.cli.command import Command
from keras_sd.cli.model_options import DTYPES
from keras_sd.cli.outputs import check_output_folder, overwrite_option

# Whatever loads a backend is imported inside the command, after its options have been checked.
from keras_sd.cli.train.main import train
from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, read_json, shape_fault, shown
from keras_sd.weights.safetensors_files import (
    converted,
    read_metadata,
    read_safetensors,
    write_safetensors,
)

_MARK = "trained.json"  # the config of the training, and the sign of a folder that this command wrote
# So begin the names of trained weights that are no part of a written model.
_OF_TRAINING_ALONE = ("alignment_projection.", "discriminator.")


@click.command(cls=Command)
@click.argument("checkpoint")
@click.argument("folder")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Precision of the written weights. By default the run's."
)
@click.option(
    "--weights",
    default="ema",
    type=click.Choice(["ema", "raw"]),
    help="EMA or raw weights of the checkpoint.",
)
@overwrite_option
def export(checkpoint, folder, dtype, weights, overwrite):
    """Write the model of CHECKPOINT (RUN/checkpoint-N) to FOLDER, as the run does at its end.

    The base model of the run must still be where it was, and unchanged.

    \b
    keras-sd export runs/lora/checkpoint-500 my-lora
    """
    given, checkpoint = checkpoint, Path(checkpoint).resolve()
    place = check_output_folder(folder, None, overwrite, is_own=is_exported).resolve()
    if not checkpoint.is_dir():
        raise UserError(f"{given}: no such checkpoint folder; give RUN/checkpoint-N")
    if (checkpoint / "run.json").is_file():
        raise UserError(f"{given}: is a run, not a checkpoint; give one of it, RUN/checkpoint-N")
    with interruption.phase(f"opening {given}"):
        read_run(checkpoint.parent)
        from keras_sd.training.checkpoints import Checkpoints

        loaded = Checkpoints(checkpoint.parent, {}).load(checkpoint)
    tensors = loaded.groups["ema" if weights == "ema" else "weights"]
    export_weights(checkpoint.parent, checkpoint / "config.json", tensors, place, dtype, given)
    click.echo(folder)


def export_weights(run_folder, config_path, tensors, place, dtype, source):
    """Write the model of a run with these weights.

    Args:
        run_folder: the run folder, resolved.
        config_path: `config.json` of a checkpoint or a snapshot of the run.
        tensors: name -> array of all trained weights.
        place: the folder to write, checked and resolved.
        dtype: precision of the written weights; None for the run's.
        source: where the weights are from, for messages.
    """
    run = read_run(run_folder)
    _check_is_apart(place, run_folder)
    with interruption.phase(f"opening {source}"):
        from keras_sd.cli.rebuild import rebuild
        from keras_sd.training.run_folder import write_whole_folder

        with _in_folder(run["directory"]):
            objective, write = rebuild(
                run["method"], run["options"], read_json(config_path, largest=64 * MIB)
            )
    tensors = {name: array for name, array in tensors.items() if not name.startswith(_OF_TRAINING_ALONE)}
    _assign(objective, tensors, source)

    def write_model(staging):
        with _in_folder(run["directory"]):
            write(staging)
        if dtype is not None:
            _cast(staging, dtype)
        shutil.copyfile(config_path, staging / _MARK)

    with interruption.phase(f"writing {place}"):
        write_whole_folder(place, write_model)


def is_exported(folder):
    """Return whether a folder was written by `export_weights`."""
    return (folder / _MARK).is_file()


def _check_is_apart(place, run_folder):
    """Raise UserError if a path is one of a run's checkpoints, or inside one."""
    from keras_sd.training.checkpoints import MANIFEST, POSITION
    from keras_sd.training.run_folder import DESCRIPTION, is_checkpoint_name

    for each in (place, *place.parents):
        is_checkpoint = (each / MANIFEST).is_file() and (each / POSITION).is_file()
        in_run = each.parent == run_folder or (each.parent / DESCRIPTION).is_file()
        if is_checkpoint or (in_run and is_checkpoint_name(each.name)):
            raise UserError(f"{place}: is in the place of a checkpoint; choose a folder outside of the run")


class _Options(dict):
    """The options in a `run.json`; looking up a missing one raises UserError."""

    def __missing__(self, name):
        raise _damaged(f"option {name} is missing")


def _damaged(fault):
    return UserError(f"run.json: is damaged ({fault}); resume the run, which writes it anew")


class RunDescription(TypedDict):
    """The shape of `run.json`."""

    method: str
    directory: str
    options: dict


def read_run(run_folder):
    """Return how a run was started: its method, options and working directory.

    Raises:
        UserError: it is no run of a training command.
    """
    from keras_sd.training.run_folder import DESCRIPTION

    path = run_folder / DESCRIPTION
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
    if run["method"] not in train.commands:
        known = ", ".join(train.commands)
        raise UserError(f"{path}: method {shown(run['method'])} cannot be exported; known are {known}")
    options = run["options"]
    for parameter in train.commands[run["method"]].params:
        if parameter.name in options and not _fits(parameter, options[parameter.name]):
            raise _damaged(f"option {parameter.name} is {json.dumps(options[parameter.name])[:40]}")
    # The UNet's config is in the checkpoint, and nothing is computed.
    return {
        **run,
        "options": _Options(
            options | {"unet_config": None, "jit_compile": False, "output_dir": str(run_folder)}
        ),
    }


def _fits(parameter, value):
    """Return whether a JSON value is one that an option can have had."""
    if value is None:
        return parameter.to_info_dict().get("default") is None
    if parameter.multiple:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if isinstance(parameter.type, click.Path):  # converting would look for the file
        return isinstance(value, str)
    try:
        converted = parameter.type.convert(value, parameter, None)
    except (click.BadParameter, OverflowError, TypeError):
        return False
    is_whole = type(value) is int and type(converted) is float
    return converted == value and (is_whole or type(converted) is type(value))


def _in_folder(place):
    """Return a context in which relative paths are meant from where the run was started, if it is there."""
    return contextlib.chdir(place) if Path(place).is_dir() else contextlib.nullcontext()


def _assign(objective, tensors, checkpoint):
    """Assign a checkpoint's tensors to the objective's variables.

    Raises:
        UserError: a tensor fits no variable.
    """
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
    """Convert all weights below a folder to another precision."""
    from keras_sd.weights.lora_writing import with_hashes

    for path in folder.rglob("*.safetensors"):
        tensors = {name: converted(name, array, dtype) for name, array in read_safetensors(path).items()}
        metadata = read_metadata(path)
        if "sshs_model_hash" in metadata:  # of a LoRA
            metadata = with_hashes(tensors, metadata)
        write_safetensors(path, tensors, metadata=metadata)
