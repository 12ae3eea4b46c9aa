"""LoRA on the command line: its training command, and the options of methods that train LoRA weights."""

import hashlib
from pathlib import Path

import click

from keras_sd.cli.command import Command, decorated
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.fine_tuning import (
    captioned_options,
    text_encoder_options,
    train_on_captions,
    trained_parts,
)
from keras_sd.cli.train.lora_ranks import ranks_of_file_option, take_ranks_of_file
from keras_sd.cli.train.opening import image_size_of, open_pipeline
from keras_sd.cli.train.optimizer import block_rates_option
from keras_sd.cli.train.options import FILE_OR_FOLDER, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.errors import UserError
from keras_sd.training.adapter_settings import ADAPTERS, AdapterSettings

RANK = click.IntRange(1, 16_384)
OF_LORA = (
    *("rank", "lora_alpha", "conv_rank", "conv_alpha", "adapter", "lokr_factor", "use_dora", "use_rslora"),
    *("rank_by_block", "alpha_by_block", "lora_weights", "dim_from_weights", "trigger_words"),
)
"""Names of the options that `rank_options` adds."""


def rank_options(rank):
    """Return a decorator that adds the options of LoRA and its relatives, with this default rank."""
    return decorated(
        click.option("--rank", default=rank, type=RANK, help="Rank of the LoRA matrices."),
        click.option(
            "--lora-alpha", type=POSITIVE, help="LoRA is scaled by alpha / rank. By default the rank."
        ),
        click.option(
            "--conv-rank",
            type=RANK,
            help="Rank for 3x3 convolutions of residual blocks, down- and upsampling (LoCon). By default "
            "those of residual blocks have --rank with --lora-layers all, and others no update.",
        ),
        click.option("--conv-alpha", type=POSITIVE, help="Alpha of --conv-rank. By default that rank."),
        click.option(
            "--rank-by-block",
            help="Ranks in blocks, 0 for no update, such as `mid_block=16 down_blocks.0=0 text_encoder=4`. A "
            "block is the beginning of layers' names; the longest counts.",
        ),
        click.option("--alpha-by-block", help="Alphas in blocks, such as `mid_block=8`."),
        click.option(
            "--adapter",
            default="lora",
            type=click.Choice(list(ADAPTERS)),
            help="`lora`; or `lokr`, Kronecker products, in files of kohya's format only.",
        ),
        click.option(
            "--lokr-factor",
            type=click.IntRange(1, 2**16),
            help="Divisor of the layers' widths for lokr. By default near the square root of each.",
        ),
        click.option("--use-dora", is_flag=True, help="Train the lengths of the weights' rows, too (DoRA)."),
        click.option("--use-rslora", is_flag=True, help="Scale by alpha / sqrt(rank) (rsLoRA)."),
        click.option(
            "--lora-weights",
            type=FILE_OR_FOLDER,
            help="Begin from this LoRA, of the same layers, kind, rank and alpha.",
        ),
        ranks_of_file_option,
        click.option(
            "--trigger-word",
            "trigger_words",
            multiple=True,
            help="Word of prompts that the files name as the LoRA's; may be repeated.",
        ),
    )


def low_rank_options(*, rank, layers):
    """Return a decorator that adds all options of LoRA, with these defaults."""
    return decorated(
        rank_options(rank),
        click.option(
            "--lora-layers",
            default=layers,
            type=click.Choice(["attention", "all"]),
            help="`attention`: its projections. `all`: linear layers and the residual blocks' convolutions.",
        ),
    )


@click.command(cls=Command)
@run_options("lora", output_dir="runs/lora")
@captioned_options("lora")
@low_rank_options(rank=8, layers="attention")
@text_encoder_options("Train LoRA weights of the text encoder too.")
@block_rates_option
def lora(**options):
    """Fine-tune the UNet on captioned images by LoRA, saved as a small file.

    \b
    python -m keras_sd.train lora --pretrained-model-name-or-path sd-1.5 --train-data-dir images
    """
    take_ranks_of_file(options)
    trained = trained_parts(options)
    run = prepare("lora", options, identity=low_rank_identity(options, trained))
    pipeline, identity = open_with_loras(run, trained)
    finished = train_on_captions(
        run,
        pipeline,
        None if options["train_text_encoder"] else pipeline.text_encoder,
        identity={"method": "lora", **identity},
        export=lora_export(run, pipeline, trained, [run.source]),
    )
    if finished:
        run.print_next_command("--lora")


def open_with_loras(run, names):
    """Return the pretrained pipeline with LoRA added to the named parts, and `low_rank_identity`."""
    identity = low_rank_identity(run.options, names)
    file = run.options.get("lora_weights")

    def adapt(parts):
        from keras_sd.training.lora import add_updates, assign_updates

        models = {name: parts[name] for name in names}
        add_updates(models, adapter_settings_of(run.options))
        if file and run.checkpoint is None:  # a checkpoint has all weights that are trained
            assign_updates({name: parts[name] for name in ("unet", "text_encoder")}, file)

    return open_pipeline(run, adapt), identity


def lora_export(run, pipeline, names, sources):
    """Return `export(folder)`, which writes the LoRA of a run; keep what its header says in the run folder.

    Args:
        names: of the trained parts.
        sources: the sources of training images.
    """
    from keras_sd import backend
    from keras_sd.files.writing import write_json
    from keras_sd.training.lora import save_lora
    from keras_sd.training.lora_metadata import METADATA, training_metadata

    metadata = training_metadata(
        adapter_settings_of(run.options),
        pipeline.unet,
        pipeline.scheduler_config.prediction_type,
        run.resolution(image_size_of(pipeline)),
        run.options | {"mixed_precision": run.settings.mixed_precision},
        sources,
        names,
    )
    if not backend.process_index() and backend.plan() is None:
        write_json(Path(run.options["output_dir"]) / METADATA, metadata)
    models = {name: getattr(pipeline, name) for name in names}
    return lambda folder: save_lora(folder, models, metadata)


def adapter_settings_of(options):
    """Return the `AdapterSettings` of a command's options.

    Raises:
        UserError: they are out of range or do not belong together.
    """
    return AdapterSettings(
        rank=options["rank"],
        alpha=options["lora_alpha"],
        layers=options.get("lora_layers") or "attention",
        rank_by_block=_by_block(options, "rank_by_block", int),
        alpha_by_block=_by_block(options, "alpha_by_block", float),
        **{name: options.get(name) or None for name in ("conv_rank", "conv_alpha", "lokr_factor")},
        adapter=options.get("adapter") or "lora",
        use_dora=bool(options.get("use_dora")),
        use_rslora=bool(options.get("use_rslora")),
    )


def _by_block(options, name, kind):
    """Return a dictionary of block -> number from entries BLOCK=NUMBER between spaces."""
    blocks = {}
    for text in (options.get(name) or "").split():
        block, equals, number = text.partition("=")
        try:
            value = kind(number)
        except ValueError:
            equals = ""  # refused below
        if not block or not equals:
            title = "RANK" if kind is int else "ALPHA"
            raise UserError(f"{name}: {text} is no BLOCK={title}; write for example mid_block=4")
        if block in blocks:
            raise UserError(f"{name}: {block} is given twice; leave one out")
        blocks[block] = value
    return blocks


def low_rank_identity(options, names):
    """Return the LoRA settings that a checkpoint records and a resumed run must share."""
    identity = adapter_settings_of(options).identity()
    file = options.get("lora_weights")
    return {
        **identity,
        "lora_layers": options.get("lora_layers"),
        "trained": list(names),
        **({"lora_weights": _hash_of(file)} if file else {}),
    }


def _hash_of(path):
    """Return the SHA-256 of a LoRA's file."""
    from keras_sd.weights.lora_files import lora_file

    file = lora_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a LoRA")
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
