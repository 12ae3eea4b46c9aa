"""The command that converts a model between formats, and verifies the result."""

import contextlib
import json
import tempfile
import warnings
from pathlib import Path

import click

from keras_sd import interruption, presets

# Whatever loads a backend is imported inside the command, after its options have been checked.
from keras_sd.cli.command import Command
from keras_sd.cli.model_options import DTYPES
from keras_sd.cli.outputs import check_output, check_writable
from keras_sd.errors import UserError
from keras_sd.files.writing import replaced_folder, write_json, write_text
from keras_sd.weights.diffusers_folder import check_folder_name

_SINGLE_FILE = ".safetensors"


@click.command(cls=Command)
@click.argument("source")
@click.argument("output")
@click.option(
    "--weights", default="ema", type=click.Choice(("ema", "raw")), help="Weights, if a file holds both."
)
@click.option("--variant", help="Variant of a folder's weight files, such as fp16. By default none.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Precision of the written weights. By default the source's."
)
@click.option(
    "--prediction-type",
    type=click.Choice(("epsilon", "v_prediction")),
    help="Quantity that the UNet predicts, if a single file does not say it.",
)
@click.option("--partial", is_flag=True, help="Accept missing and unknown weights, with a warning.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT; other files of a folder are kept.")
@click.option("--open-clip", is_flag=True, help="Write both CLIP encoders as a folder that open_clip opens.")
@click.option("--verify", is_flag=True, help="Compare the outputs of the result, of SOURCE and of diffusers.")
@click.option("--report", help="Verify, and write the whole comparison to this .json or .md file.")
def convert(source, output, dtype, partial, overwrite, open_clip, verify, report, **reading):
    """Convert SOURCE, a model or parts of one in any format, to OUTPUT.

    SOURCE is a preset, a hub id, a folder in diffusers' layout or of KerasCV's H5 files, or a single file.
    OUTPUT becomes a diffusers folder or, if it ends in .safetensors, a single file (as in A1111). With
    --verify the exit code is 1 if a difference is larger than its tolerance.

    \b
    keras-sd convert model.ckpt my-model --dtype float16 --verify
    """
    place = presets.find(source)
    output = check_place(output, place, overwrite)
    if open_clip and (verify or report is not None or _is_single_file(output)):
        raise UserError("--open-clip: writes a folder and compares nothing; leave out --verify and --report")
    if report is not None:
        report = check_output(report, (".json", ".md"), overwrite=overwrite)
    with interruption.phase("starting the backend"):
        from keras_sd.parity import compare as parity
        from keras_sd.pipeline.defaults import ModelDefaults
        from keras_sd.weights.loading import open_parts
        from keras_sd.weights.open_clip import WEIGHTS_NAME, write_open_clip
        from keras_sd.weights.readers import read_checkpoint

    notes = []
    with _warnings_printed(notes), interruption.phase(f"converting {source}"):
        checkpoint = read_checkpoint(place, **reading)
        defaults = ModelDefaults.load(place)
        opened = open_parts(checkpoint, partial=partial)
        written = _checkpoint_of(opened, checkpoint, dtype)
        for name, part in written.parts.items():
            click.echo(f"{name}: {_summary(part.tensors, dtype)}")
        tokenizer = opened.get("tokenizer")
        if open_clip:
            with replaced_folder(output) as folder:
                write_open_clip(folder / WEIGHTS_NAME, written, dtype, tokenizer and tokenizer.save)
            click.echo(output)
            return 0
        _write(output, written, tokenizer, dtype, defaults)
    click.echo(output)
    if not verify and report is None:
        return 0

    with interruption.phase(f"evaluating the parts of {source}"):
        held = _held_parts(written, output)
        source_outputs = {name: parity.part_outputs(name, opened[name]) for name in held}
    del opened
    with tempfile.TemporaryDirectory() as folder, interruption.phase(f"comparing {output} with {source}"):
        configs = _write_configs(Path(folder), written, tokenizer) if _is_single_file(output) else None
        del written
        result = parity.compare(source, checkpoint, source_outputs, output, configs, notes)
    if report is not None:
        _save_report(report.free(), result)
    click.echo(f"\n{result.to_markdown()}")
    return 0 if result.passes else 1


def _is_single_file(output):
    return output.suffix == _SINGLE_FILE


def check_place(output, source, overwrite):
    """Return the output's path, after checking that it can be written and replaces nothing that is needed."""
    path = Path(output)
    check_writable(path)
    if not path.is_dir():
        check_folder_name(path)
    here, origin = path.resolve(), Path(source).resolve()
    if here == origin or here in origin.parents or (path.exists() and origin in here.parents):
        raise UserError(f"{path}: belongs to the source; choose another place")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another place, or replace it with --overwrite")
    if _is_single_file(path):
        return check_output(output, _SINGLE_FILE, overwrite=overwrite).path
    if path.is_file():
        raise UserError(f"{path}: is a file; name a folder or a {_SINGLE_FILE} file")
    check_writable(path / "model_index.json")
    return path


@contextlib.contextmanager
def _warnings_printed(notes):
    """Print warnings in one line each, and append them to `notes`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            notes.append(" ".join(str(warning.message).split()))
            click.echo(f"warning: {notes[-1]}", err=True)


def _checkpoint_of(opened, source, dtype):
    """Return the `Checkpoint` of opened parts; without a `dtype`, each tensor has the source's precision."""
    from keras_sd.weights.checkpoint import Checkpoint
    from keras_sd.weights.loading import model_part

    parts = {}
    for name, read in source.parts.items():
        parts[name] = model_part(name, opened[name], opened.get("clip_head"))
        if dtype is None:
            parts[name] = parts[name]._replace(tensors=_in_types_of(read.tensors, parts[name].tensors))
    scheduler, low_res = (opened.get(name) for name in ("scheduler_config", "low_res_scheduler_config"))
    return Checkpoint(parts, scheduler and scheduler.to_dict(), low_res and low_res.to_dict("DDPMScheduler"))


def _in_types_of(source, tensors):
    from keras_sd.weights.old_names import canonical_name

    types = {canonical_name(name): array.dtype for name, array in source.items()}
    return {
        name: array.astype(types.get(canonical_name(name), array.dtype), copy=False)
        for name, array in tensors.items()
    }


def _summary(tensors, dtype):
    """Return the number of tensors and parameters and the written precision, as text."""
    count = sum(array.size for array in tensors.values())
    types = [dtype] if dtype else sorted({array.dtype.name for array in tensors.values()})
    return f"{len(tensors)} tensors, {count:,} parameters, {' and '.join(types)}"


def _held_parts(checkpoint, output):
    """Return the names of the parts that the output's format can hold."""
    return [name for name in checkpoint.parts if not (_is_single_file(output) and name == "image_encoder")]


def _write(output, checkpoint, tokenizer, dtype, defaults):
    from keras_sd.weights.diffusers_folder import write_folder
    from keras_sd.weights.single_file import write_single_file

    if not _is_single_file(output):
        write_folder(output, checkpoint, tokenizer and tokenizer.save, dtype, write_more=defaults.save)
        return
    defaults.warn_of_loss(output)
    for name in checkpoint.parts.keys() - _held_parts(checkpoint, output):
        warnings.warn(f"{output}: has no place for the {name.replace('_', ' ')}", stacklevel=2)
    write_single_file(output, checkpoint, dtype, tokenizer)


def _write_configs(folder, checkpoint, tokenizer):
    """Write a diffusers folder without weights: the configs and the tokenizer, which a single file lacks."""
    from keras_sd.weights.diffusers_folder import INDEX

    for name, part in checkpoint.parts.items():
        (folder / name).mkdir()
        write_json(folder / name / "config.json", part.config)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    # diffusers opens a text encoder only as a part of a pipeline.
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    write_json(folder / INDEX, index)
    return folder


def _save_report(path, report):
    if path.suffix.lower() == ".md":
        text = f"# {report.source} as {report.output}, {report.date}\n\n{report.to_markdown(None)}"
    else:
        text = json.dumps(report.to_dict(), indent=2)
    write_text(path, text + "\n")
