"""The commands on LoRA files: merge several, change the rank of one, or extract one from two models."""

from pathlib import Path

import click

from keras_sd import interruption, presets
from keras_sd.cli.command import HELP_SETTINGS, Command, refuse_unused
from keras_sd.cli.convert import check_place
from keras_sd.cli.model_options import DTYPES, path_and_weight
from keras_sd.cli.option_types import Number
from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.errors import UserError
from keras_sd.progress import Progress

_SUFFIX = ".safetensors"
_RANK = click.IntRange(1, 2**20)

_dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), help="Precision of the written weights. By default float32."
)


def _ratio_option(text):
    return click.option("--sv-ratio", type=Number(min=1), help=text)


_KEPT = "Keep the singular values that are at least the largest divided by this, in each layer."


@click.group(context_settings=HELP_SETTINGS)
def lora():
    """Merge, resize and extract LoRA files."""


@lora.command(cls=Command)
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:WEIGHT]...")
@click.option(
    "--output", required=True, help="File of the merged LoRA; with --model, folder or file of a model."
)
@click.option("--model", help="Merge into this model: preset, hub id, diffusers folder, or single file.")
@click.option("--rank", type=_RANK, help="Largest rank of the result. By default the sum of theirs.")
@_ratio_option(_KEPT)
@_dtype_option
@overwrite_option
def merge(loras, output, model, rank, sv_ratio, dtype, overwrite):
    """Merge LoRAs, each with a weight, into one LoRA or into a model.

    Their factors are put side by side, which is exact; --rank and --sv-ratio then give the closest LoRA of a
    lower rank. Every kind of LoRA merges into a model, LoRA and LoCon into one file, in kohya's format.

    \b
    keras-sd lora merge ink.safetensors:0.8 cat.safetensors:0.5 --output both.safetensors --rank 16
    keras-sd lora merge ink.safetensors:0.8 --model emoji --output merged
    """
    given = [path_and_weight(text, "") for text in loras]
    for path, _ in given:
        if not Path(path).exists():
            raise UserError(f"{path}: no such LoRA; give a file, or a folder that holds one")
    if model is not None:
        refuse_unused(("rank", "sv_ratio"), False, "with --model")
        return _merge_into_model(given, model, output, dtype, overwrite)
    place = check_output(output, _SUFFIX, overwrite=overwrite)
    from keras_sd.weights import lora_arithmetic as arithmetic
    from keras_sd.weights.lora_writing import write_kohya

    with interruption.phase("merging LoRAs"):
        files = [(arithmetic.read_plain_lora(path), weight) for path, weight in given]
        updates = arithmetic.summed(files)
        if rank is not None or sv_ratio is not None:
            updates, _ = _reduced(updates, arithmetic.Truncation(rank, sv_ratio))
        metadata = arithmetic.common_metadata([file for file, _ in files], updates)
        write_kohya(place.free(), updates, dtype, metadata)
    click.echo(place.path)
    return None


def _merge_into_model(given, model, output, dtype, overwrite):
    place = check_place(output, presets.find(model), overwrite)
    from keras_sd.cli.model_options import open_model

    pipeline = open_model(model)
    with interruption.phase(f"merging into {model}"):
        for number, (path, weight) in enumerate(given, start=1):
            pipeline.load_lora(path, name=str(number), weight=weight)  # no prompt calls it by a name
        pipeline.save(place, dtype=dtype)
    click.echo(place)


@lora.command(cls=Command)
@click.argument("path", metavar="LORA")
@click.argument("output")
@click.option("--rank", type=_RANK, help="Largest rank of the result.")
@_ratio_option(_KEPT)
@_dtype_option
@overwrite_option
def resize(path, output, rank, sv_ratio, dtype, overwrite):
    """Write LORA with a lower rank to OUTPUT: the closest one, by singular values.

    \b
    keras-sd lora resize ink.safetensors small.safetensors --rank 4
    keras-sd lora resize ink.safetensors small.safetensors --sv-ratio 10
    """
    if rank is None and sv_ratio is None:
        raise UserError("--rank: missing; give it, or --sv-ratio")
    if not Path(path).exists():
        raise UserError(f"{path}: no such LoRA; give a file, or a folder that holds one")
    place = check_output(output, _SUFFIX, overwrite=overwrite)
    from keras_sd.weights import lora_arithmetic as arithmetic
    from keras_sd.weights.lora_writing import write_kohya

    with interruption.phase(f"resizing {path}"):
        file = arithmetic.read_plain_lora(path)
        updates, error = _reduced(file.updates, arithmetic.Truncation(rank, sv_ratio))
        write_kohya(place.free(), updates, dtype, arithmetic.common_metadata([file], updates))
    click.echo(f"{place.path}: {_ranks(updates)}, relative error {error:.1%}")


@lora.command(cls=Command)
@click.argument("base")
@click.argument("tuned")
@click.argument("output")
@click.option("--rank", type=_RANK, help="Largest rank of linear layers. By default 64, or --sv-ratio alone.")
@click.option("--conv-rank", type=_RANK, help="Largest rank of 3x3 convolutions. By default --rank.")
@_ratio_option(_KEPT)
@_dtype_option
@overwrite_option
def extract(base, tuned, output, rank, conv_rank, sv_ratio, dtype, overwrite):
    """Write the LoRA that makes the model TUNED from BASE to OUTPUT.

    Both are a preset, a hub id, a diffusers folder or a single file. The LoRA is that of the largest singular
    values of the differences; changes of biases and normalisation have no place in it.

    \b
    keras-sd lora extract sd15.safetensors fine-tuned.safetensors difference.safetensors --rank 32
    """
    rank = 64 if rank is None and sv_ratio is None else rank
    places = [presets.find(model) for model in (base, tuned)]
    place = check_output(output, _SUFFIX, overwrite=overwrite)
    with interruption.phase("starting"):
        from keras_sd.weights import lora_arithmetic as arithmetic
        from keras_sd.weights.lora_writing import write_kohya
        from keras_sd.weights.readers import read_checkpoint

    with interruption.phase(f"extracting a LoRA from {tuned}"):
        models = [
            {name: part.tensors for name, part in read_checkpoint(found).parts.items()} for found in places
        ]
        linear, convolutions = (arithmetic.Truncation(most, sv_ratio) for most in (rank, conv_rank or rank))
        updates, left_out = arithmetic.extract_lora(*models, linear, convolutions, _shown("extracting"))
    if not updates:
        raise UserError(f"{tuned}: is the same as {base} in all layers of a LoRA; give another model")
    if left_out:
        click.echo(
            f"warning: {len(left_out)} tensors that a LoRA has no place for differ, too, the first is "
            f"{left_out[0]}",
            err=True,
        )
    metadata = arithmetic.common_metadata([arithmetic.LoraFile(updates, {})], updates)
    write_kohya(place.free(), updates, dtype, metadata)
    click.echo(f"{place.path}: {_ranks(updates)}")


def _reduced(updates, truncation):
    """Return updates of a lower rank, and the relative error of all of them together."""
    from keras_sd.weights.lora_arithmetic import reduced, relative_error

    results, error, length = {}, 0.0, 0.0
    for name in _shown("resizing")(list(updates)):
        results[name] = reduced(updates[name], truncation)
        own_error, own_length = relative_error(results[name], updates[name])
        error, length = error + own_error, length + own_length
    return results, (error / length) ** 0.5 if length else 0.0


def _shown(description):
    """Return a function that iterates over a list and shows how far it is, if it takes long."""

    def iterate(layers):
        with Progress(description, len(layers), "layers", delay=2.0) as progress:
            for layer in layers:
                yield layer
                progress.update(1)

    return iterate


def _ranks(updates):
    """Return the number of updates and their ranks, as text."""
    ranks = [len(update.down) for update in updates.values()]
    told = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    return f"{len(ranks)} layers, {told}"
