"""Training the UNet on captioned images from the command line: fine-tuning, or from scratch."""

import click

from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.train.fine_tuning import captioned_options, part_fingerprints, train_on_captions
from keras_sd.cli.train.options import FILE, FILE_OR_FOLDER, run_options
from keras_sd.cli.train.preparation import open_pipeline, prepare


@click.command("text-to-image", cls=Command)
@run_options("text-to-image", output_dir="runs/text-to-image")
@captioned_options("text-to-image")
@click.option("--from-scratch", is_flag=True, help="Train a new UNet with random initial weights.")
@click.option("--unet-config", type=FILE, help="config.json of the new UNet; by default the emoji model's.")
@click.option(
    "--pretrained-vae",
    type=FILE_OR_FOLDER,
    help="Folder of a `vae` run's model, instead of the pretrained VAE.",
)
@click.option(
    "--pretrained-clip",
    type=FILE_OR_FOLDER,
    help="Folder of a `clip` run's model, instead of the pretrained CLIP.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="Quantity that the UNet predicts. By default the pretrained model's.",
)
def text_to_image(**options):
    """Train the whole UNet on captioned images: fine-tune it, or train a new one from scratch."""
    refuse_unused(["unet_config"], options["from_scratch"], "without --from-scratch")
    run = prepare("text-to-image", options, variant="from scratch" if options["from_scratch"] else None)
    pipeline = open_pipeline(run)
    identity = part_fingerprints(pipeline, *([] if options["from_scratch"] else ["unet"]))
    if train_on_captions(run, pipeline, pipeline.text_encoder, identity=identity, export=pipeline.save):
        run.print_next_command()
