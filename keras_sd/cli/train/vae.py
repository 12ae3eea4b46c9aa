"""The command that trains a VAE: a new one, or a pretrained one further."""

import click

from keras_sd import config
from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.option_types import NOT_NEGATIVE
from keras_sd.cli.train.data_options import dataset_config_option, source_options
from keras_sd.cli.train.options import COUNT, FILE, FILE_OR_FOLDER, run_options
from keras_sd.cli.train.preparation import defaults_from, prepare, read_config
from keras_sd.data.emoji import architecture
from keras_sd.errors import UserError


@click.command(cls=Command)
@run_options("vae", output_dir="runs/vae", random_flip=True)
@source_options(captions=False)
@dataset_config_option
@click.option("--vae-config", type=FILE, help="config.json of a new VAE; by default the emoji model's.")
@click.option(
    "--kl-weight", default=3e-4, type=NOT_NEGATIVE, help="Weight of the KL divergence per latent value."
)
@click.option(
    "--crop-size",
    type=COUNT,
    help="Side in pixels of random squares of the resized images to train on. By default whole images.",
)
@click.option("--pretrained-vae", type=FILE_OR_FOLDER, help="Folder of a VAE to train further.")
@click.option(
    "--decoder-only", is_flag=True, help="Train the decoder only, so that latents stay as they are."
)
def vae(vae_config, kl_weight, crop_size, pretrained_vae, decoder_only, **options):
    """Train the autoencoder (VAE) that encodes images to latents."""
    if decoder_only and not pretrained_vae:
        raise UserError("--decoder-only: there are no latents yet; name an autoencoder with --pretrained-vae")
    refuse_unused(["vae_config"], not pretrained_vae, "with --pretrained-vae")
    refuse_unused(["kl_weight"], not decoder_only, "with --decoder-only")
    run = prepare(
        "vae",
        options | {"crop_size": crop_size},
        variant=None if pretrained_vae else "from scratch",
        defaults_from=pretrained_vae or defaults_from(vae_config),
        need_captions=False,
    )
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.autoencoder import train_autoencoder
    from keras_sd.training.trainer import PRECISIONS
    from keras_sd.weights.loading import load_part

    if pretrained_vae:
        autoencoder = load_part(pretrained_vae, "vae", PRECISIONS[run.settings.mixed_precision])
    else:
        autoencoder = AutoencoderKL(read_config(vae_config, config.VAEConfig, architecture.EMOJI_VAE))
    sizes = autoencoder.config
    source, held_out, repeats = run.sources(sizes.sample_size, sizes.downsampling)
    train_autoencoder(
        run.settings,
        autoencoder,
        source,
        held_out,
        repeats=repeats,
        kl_weight=kl_weight,
        crop_size=crop_size,
        decoder_only=decoder_only,
    )
