"""Training the UNet on captioned images from the command line: fine-tuning, or from scratch."""

import click

from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.train.alignment import alignment_of, alignment_options, check_alignment
from keras_sd.cli.train.fine_tuning import (
    captioned_options,
    part_fingerprints,
    text_encoder_options,
    train_on_captions,
    trained_parts,
    zero_snr_option,
)
from keras_sd.cli.train.opening import find_part, open_pipeline
from keras_sd.cli.train.optimizer import block_rates_option
from keras_sd.cli.train.options import FILE, run_options
from keras_sd.cli.train.preparation import prepare


@click.command("text-to-image", cls=Command)
@run_options("text-to-image", output_dir="runs/text-to-image")
@captioned_options("text-to-image")
@text_encoder_options("Train the text encoder too.")
@block_rates_option
@alignment_options
@click.option("--from-scratch", is_flag=True, help="Train a new UNet with random initial weights.")
@click.option("--unet-config", type=FILE, help="config.json of the new UNet; by default the emoji model's.")
@click.option(
    "--pretrained-vae",
    help="Model whose VAE replaces the pretrained one, such as a `vae` run's: preset, hub id, folder or "
    "file.",
)
@click.option(
    "--pretrained-clip",
    help="Model whose CLIP replaces the pretrained one, such as a `clip` run's: preset, hub id, folder or "
    "file.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="Quantity that the UNet predicts. By default the pretrained model's.",
)
@zero_snr_option
def text_to_image(**options):
    """Train the whole UNet on captioned images: fine-tune it, or train a new one from scratch.

    \b
    python -m keras_sd.train text-to-image --pretrained-model-name-or-path sd-1.5 --train-data-dir images
    """
    refuse_unused(["unet_config"], options["from_scratch"], "without --from-scratch")
    refuse_unused(["learning_rate_by_block"], not options["from_scratch"], "with --from-scratch")
    check_alignment(options)
    for name, part in (("pretrained_vae", "vae"), ("pretrained_clip", "text_encoder")):
        if options[name]:
            find_part(options[name], part)
    run = prepare(
        "text-to-image",
        options,
        variant="from scratch" if options["from_scratch"] else None,
        identity={
            "alignment_weight": options["alignment_weight"],
            "train_text_encoder": options["train_text_encoder"],
        },
    )
    pipeline = open_pipeline(run)
    alignment = alignment_of(pipeline, options)
    known = [name for name in trained_parts(options) if name != "unet" or not options["from_scratch"]]
    identity = part_fingerprints(pipeline, *known)
    identity |= {"train_text_encoder": True} if options["train_text_encoder"] else {}
    frozen = None if options["train_text_encoder"] else pipeline.text_encoder
    trained = {"identity": identity, "alignment": alignment, "export": pipeline.save}
    if train_on_captions(run, pipeline, frozen, **trained):
        run.print_next_command()
