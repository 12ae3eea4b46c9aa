"""LoRA on the command line: its training command, and the options of methods that train LoRA weights."""

import click

from keras_sd.cli.command import Command, decorated
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.fine_tuning import (
    captioned_options,
    text_encoder_options,
    train_on_captions,
    trained_parts,
)
from keras_sd.cli.train.optimizer import block_rates_option
from keras_sd.cli.train.options import run_options
from keras_sd.cli.train.preparation import open_pipeline, prepare

RANK = click.IntRange(1, 16_384)


def rank_options(rank):
    """Return a decorator that adds rank and alpha of LoRA, with this default rank."""
    return decorated(
        click.option("--rank", default=rank, type=RANK, help="Rank of the LoRA matrices."),
        click.option(
            "--lora-alpha", type=POSITIVE, help="LoRA is scaled by alpha / rank. By default the rank."
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
    """Fine-tune the UNet on captioned images by LoRA, saved as a small file."""
    trained = trained_parts(options)
    run = prepare("lora", options, identity=low_rank_identity(options, trained))
    from keras_sd.training.lora import save_lora

    pipeline, alpha, identity = open_with_loras(run, trained)
    models = {name: getattr(pipeline, name) for name in trained}
    finished = train_on_captions(
        run,
        pipeline,
        None if options["train_text_encoder"] else pipeline.text_encoder,
        identity={"method": "lora", **identity},
        export=lambda folder: save_lora(folder, models, alpha),
    )
    if finished:
        run.print_next_command("--lora")


def open_with_loras(run, names):
    """Return the pretrained pipeline with LoRA added to the named parts, alpha, and `low_rank_identity`."""
    identity = low_rank_identity(run.options, names)
    rank, alpha, layers = (identity[name] for name in ("rank", "lora_alpha", "lora_layers"))

    def adapt(parts):
        from keras_sd.training.lora import add_lora

        for name in names:
            add_lora(parts[name], rank, alpha, everywhere=layers == "all")

    return open_pipeline(run, adapt), alpha, identity


def low_rank_identity(options, names):
    """Return the LoRA settings that a checkpoint records and a resumed run must share."""
    rank, alpha, layers = (options.get(name) for name in ("rank", "lora_alpha", "lora_layers"))
    alpha = rank if alpha is None else alpha
    return {"rank": rank, "lora_alpha": alpha, "lora_layers": layers, "trained": list(names)}
