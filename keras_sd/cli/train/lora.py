"""LoRA on the command line: its training command, and the options of methods that train low-rank updates."""

import click

from keras_sd.cli.command import Command, decorated
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.fine_tuning import captioned_options, train_on_captions
from keras_sd.cli.train.options import run_options
from keras_sd.cli.train.preparation import open_pipeline, prepare

RANK = click.IntRange(1, 16_384)


def rank_options(rank):
    """Rank and alpha of low-rank updates, with this rank by default."""
    return decorated(
        click.option("--rank", default=rank, show_default=True, type=RANK, help="Rank of the updates."),
        click.option(
            "--lora-alpha", type=POSITIVE, help="Updates are scaled by alpha / rank; the rank by default."
        ),
    )


def low_rank_options(*, rank, layers):
    """The options of low-rank updates, with these values by default."""
    return decorated(
        rank_options(rank),
        click.option(
            "--lora-layers",
            default=layers,
            show_default=True,
            type=click.Choice(["attention", "all"]),
            help="Projections of attention, or all linear layers and the residual blocks' convolutions.",
        ),
    )


@click.command(cls=Command)
@run_options("lora", output_dir="runs/lora")
@captioned_options("lora")
@low_rank_options(rank=8, layers="attention")
@click.option("--train-text-encoder", is_flag=True, help="Low-rank updates for the text encoder too.")
def lora(**options):
    """Teach a model by low-rank updates (LoRA), kept in a small file beside it."""
    trained = ("unet", "text_encoder") if options["train_text_encoder"] else ("unet",)
    run = prepare("lora", options, identity=low_rank_identity(options, trained))
    from keras_sd.training.lora import save_lora

    pipeline, alpha, identity = open_with_loras(run, trained)
    models = {name: getattr(pipeline, name) for name in trained}
    train_on_captions(
        run,
        pipeline,
        None if options["train_text_encoder"] else pipeline.text_encoder,
        identity={"method": "lora", **identity},
        export=lambda folder: save_lora(folder, models, alpha),
    )


def open_with_loras(run, names):
    """The pretrained model whose named parts have low-rank updates, their alpha, and what a checkpoint of
    them must share with a run: `(pipeline, alpha, identity)`."""
    identity = low_rank_identity(run.options, names)
    rank, alpha, layers = (identity[name] for name in ("rank", "lora_alpha", "lora_layers"))

    def adapt(parts):
        from keras_sd.training.lora import add_lora

        for name in names:
            add_lora(parts[name], rank, alpha, everywhere=layers == "all")

    return open_pipeline(run, adapt), alpha, identity


def low_rank_identity(options, names):
    """What options say of the low-rank updates of the named parts, as a checkpoint of them keeps it."""
    rank, alpha, layers = (options.get(name) for name in ("rank", "lora_alpha", "lora_layers"))
    alpha = rank if alpha is None else alpha
    return {"rank": rank, "lora_alpha": alpha, "lora_layers": layers, "trained": list(names)}
