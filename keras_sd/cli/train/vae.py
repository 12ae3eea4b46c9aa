"""The command that trains a VAE: a new one, or a pretrained one further."""

import warnings

import click

from keras_sd import config
from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.option_types import FROM_ZERO, NOT_NEGATIVE
from keras_sd.cli.train.data_options import dataset_config_option, source_options
from keras_sd.cli.train.opening import defaults_from, find_part, read_config
from keras_sd.cli.train.options import COUNT, FILE, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.data.emoji import architecture
from keras_sd.errors import UserError
from keras_sd.training.autoencoder_losses import AutoencoderLosses


@click.command(cls=Command)
@run_options("vae", output_dir="runs/vae", random_flip=True)
@source_options(captions=False)
@dataset_config_option
@click.option("--vae-config", type=FILE, help="config.json of a new VAE; by default the emoji model's.")
@click.option(
    "--kl-weight", default=3e-4, type=NOT_NEGATIVE, help="Weight of the KL divergence per latent value."
)
@click.option(
    "--perceptual-weight",
    default=0.0,
    type=NOT_NEGATIVE,
    help="Weight of the perceptual distance (LPIPS on the features of --perceptual-model); 0 leaves it out.",
)
@click.option(
    "--perceptual-model",
    help="Model whose CLIP image encoder has the features of --perceptual-weight: preset, hub id, folder or "
    "file.",
)
@click.option(
    "--adversarial-weight",
    default=0.0,
    type=NOT_NEGATIVE,
    help="Weight of a patch discriminator's verdict, times the adaptive weight of Esser et al. (2021), where "
    "0.5 to 0.8 is usual; 0 leaves it out.",
)
@click.option(
    "--adversarial-start",
    type=FROM_ZERO,
    help="Number of steps before the discriminator's verdict counts. It learns from the first step. "
    "[default: 0]",
)
@click.option(
    "--discriminator-width",
    type=COUNT,
    help="Channels of the discriminator's first convolution, a multiple of 8. [default: 64]",
)
@click.option(
    "--discriminator-depth",
    type=COUNT,
    help="Number of the discriminator's convolutions that halve the resolution. [default: 3]",
)
@click.option(
    "--crop-size",
    type=COUNT,
    help="Side in pixels of random squares of the resized images to train on. By default whole images.",
)
@click.option(
    "--pretrained-vae",
    help="VAE to train further: preset, hub id, folder or file of a model, or of a VAE alone.",
)
@click.option(
    "--decoder-only", is_flag=True, help="Train the decoder only, so that latents stay as they are."
)
def vae(vae_config, crop_size, pretrained_vae, decoder_only, perceptual_model, **options):
    """Train the autoencoder (VAE) that encodes images to latents.

    \b
    python -m keras_sd.train vae --train-data-dir images --resolution 64
    """
    if decoder_only and not pretrained_vae:
        raise UserError("--decoder-only: there are no latents yet; name an autoencoder with --pretrained-vae")
    refuse_unused(["vae_config"], not pretrained_vae, "with --pretrained-vae")
    refuse_unused(["kl_weight"], not decoder_only, "with --decoder-only")
    losses = _losses(options, perceptual_model)
    place = pretrained_vae and find_part(pretrained_vae, "vae")
    seen_by = perceptual_model and find_part(perceptual_model, "image_encoder")
    run = prepare(
        "vae",
        options | {"crop_size": crop_size},
        variant=None if pretrained_vae else "from scratch",
        defaults_from=place or defaults_from(vae_config),
        need_captions=False,
        identity={**losses.identity(), "random_crop": crop_size, "decoder_only": decoder_only},
    )
    start, end = losses.adversarial_start, run.settings.max_train_steps
    if start and start >= end:
        warnings.warn(
            f"--adversarial-start {start}: the run ends at step {end}, before the discriminator counts; give "
            "fewer steps, or train longer",
            stacklevel=2,
        )
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.autoencoder import train_autoencoder
    from keras_sd.training.trainer import PRECISIONS
    from keras_sd.weights.loading import load_part

    precision = PRECISIONS[run.settings.mixed_precision]
    if place:
        autoencoder = load_part(place, "vae", precision)
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
        losses=losses,
        image_encoder=seen_by and load_part(seen_by, "image_encoder", precision),
        crop_size=crop_size,
        decoder_only=decoder_only,
    )


def _losses(options, perceptual_model):
    """Take the `AutoencoderLosses` out of the options."""
    of_discriminator = ["adversarial_start", "discriminator_width", "discriminator_depth"]
    names = ["kl_weight", "perceptual_weight", "adversarial_weight", *of_discriminator]
    values = {name: options.pop(name) for name in names}
    refuse_unused(["perceptual_model"], values["perceptual_weight"], "without --perceptual-weight")
    refuse_unused(of_discriminator, values["adversarial_weight"], "without --adversarial-weight")
    if values["perceptual_weight"] and not perceptual_model:
        raise UserError(
            "--perceptual-weight: the distance needs features; name a model with --perceptual-model"
        )
    return AutoencoderLosses(**{name: value for name, value in values.items() if value is not None})
