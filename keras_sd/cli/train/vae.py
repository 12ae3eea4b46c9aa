"""Training a VAE from the command line: from nothing, or going on with one."""

import click

from keras_sd import config
from keras_sd.cli.command import Command
from keras_sd.cli.option_types import NOT_NEGATIVE
from keras_sd.cli.train.options import COUNT, FILE, FILE_OR_FOLDER, refuse_unused, run_options
from keras_sd.cli.train.preparation import defaults_from, prepare, read_config
from keras_sd.data.emoji import architecture
from keras_sd.errors import UserError


@click.command(cls=Command)
@run_options("vae", output_dir="runs/vae")
@click.option("--vae-config", type=FILE, help="config.json of the autoencoder; the emoji model's by default.")
@click.option(
    "--kl-weight",
    default=3e-4,
    show_default=True,
    type=NOT_NEGATIVE,
    help="Weight of the divergence per latent number.",
)
@click.option("--random-crop", type=COUNT, help="Side of the squares trained on; whole images by default.")
@click.option("--pretrained-vae", type=FILE_OR_FOLDER, help="Folder of an autoencoder to go on with.")
@click.option("--decoder-only", is_flag=True, help="Keep its latents as they are; only decode them better.")
def vae(vae_config, kl_weight, random_crop, pretrained_vae, decoder_only, **options):
    """Train the autoencoder that encodes images to latents."""
    if decoder_only and not pretrained_vae:
        raise UserError("--decoder-only: there are no latents yet; name an autoencoder with --pretrained-vae")
    refuse_unused(["vae_config"], not pretrained_vae, "with --pretrained-vae")
    refuse_unused(["kl_weight"], not decoder_only, "with --decoder-only")
    run = prepare(
        "vae",
        options,
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
    source, held_out, repeats = run.sources(autoencoder.config.sample_size)
    train_autoencoder(
        run.settings,
        autoencoder,
        source,
        held_out,
        repeats=repeats,
        kl_weight=kl_weight,
        random_crop=random_crop,
        decoder_only=decoder_only,
    )
