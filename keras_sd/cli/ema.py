"""The command that makes the model of an average whose length is chosen after the run."""

import warnings
from pathlib import Path

import click

from keras_sd import interruption
from keras_sd.cli.command import Command
from keras_sd.cli.export import export_weights, is_exported
from keras_sd.cli.model_options import DTYPES
from keras_sd.cli.option_types import COUNT, Number
from keras_sd.cli.outputs import check_output_folder, overwrite_option

_FAR = 0.05  # distance from which on an average is not what was asked for


@click.command(cls=Command)
@click.argument("run")
@click.argument("folder")
@click.option(
    "--sigma-rel",
    required=True,
    type=Number(min=0, min_open=True),
    help="Length of the average: its standard deviation as a share of the training, 0.005 to 0.28.",
)
@click.option(
    "--step", type=COUNT, help="Step where the average ends, of a snapshot. By default the last one."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Precision of the written weights. By default the run's."
)
@overwrite_option
def ema(run, folder, sigma_rel, step, dtype, overwrite):
    """Write the model of RUN with an average of any length to FOLDER, as the run writes its own.

    The run has to be trained with --post-hoc-ema (Karras et al., 2024).

    \b
    keras-sd ema runs/lora my-lora --sigma-rel 0.1
    """
    from keras_sd.training.post_hoc_ema import Snapshots, gamma_of

    place = check_output_folder(folder, None, overwrite, is_own=is_exported).resolve()
    gamma_of(sigma_rel)
    run = Path(run).resolve()
    snapshots = Snapshots(run)
    snapshot = snapshots.folder(step)
    with interruption.phase(f"averaging the snapshots of {run}"):
        tensors, distance = snapshots.average(sigma_rel, step)
    if distance > _FAR:
        warnings.warn(
            f"--sigma-rel {sigma_rel:g}: the snapshots give an average whose weights are {distance:.0%} off; "
            "choose a length closer to those that are kept, 0.05 and 0.1, or train with more checkpoints",
            stacklevel=2,
        )
    export_weights(run, snapshot / "config.json", tensors, place, dtype, snapshot)
    click.echo(folder)
