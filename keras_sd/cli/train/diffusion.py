"""The options of noise, timesteps and the loss, which the methods for diffusion models share."""

import dataclasses

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import FROM_ZERO, NOT_NEGATIVE, POSITIVE, Number

diffusion_options = decorated(
    click.option(
        "--snr-gamma", type=POSITIVE, help="Gamma of min-SNR loss weighting, usually 5. By default off."
    ),
    click.option(
        "--debiased-estimation",
        is_flag=True,
        help="Weight losses by 1 / sqrt(SNR), or by 1 / (SNR + 1) if velocity is predicted.",
    ),
    click.option(
        "--noise-offset",
        default=0.0,
        type=NOT_NEGATIVE,
        help="Scale of extra noise that is constant over a channel; usually 0.1. 0: none.",
    ),
    click.option(
        "--multires-noise-iterations",
        default=0,
        type=FROM_ZERO,
        help="Number of coarser and coarser noises that are added; usually 6 to 10. 0: none.",
    ),
    click.option(
        "--multires-noise-discount",
        type=Number(min=0, min_open=True, max=1),
        help="Weight of each coarser noise as a multiple of the finer one's. By default 0.3.",
    ),
    click.option(
        "--input-perturbation",
        default=0.0,
        type=NOT_NEGATIVE,
        help="Scale of extra noise on the input that is not in the target; usually 0.1. 0: none.",
    ),
    click.option(
        "--timestep-sampling",
        default="uniform",
        type=click.Choice(["uniform", "log_normal"]),
        help="Distribution of timesteps: all alike, or sigma log-normal, as in EDM.",
    ),
    click.option(
        "--log-sigma-mean",
        type=Number(min=-100, max=100),
        help="Mean of ln(sigma) with log_normal. By default -1.2.",
    ),
    click.option(
        "--log-sigma-std",
        type=POSITIVE,
        help="Standard deviation of ln(sigma) with log_normal. By default 1.2.",
    ),
)


def diffusion_of(options):
    """Return the `DiffusionSettings` of a command's options."""
    from keras_sd.training.diffusion_settings import DiffusionSettings

    names = [field.name for field in dataclasses.fields(DiffusionSettings)]
    return DiffusionSettings(**{name: options[name] for name in names})
