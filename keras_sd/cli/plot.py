"""The command that draws what training runs have logged."""

import sys
from pathlib import Path

import click

from keras_sd.cli.command import Command
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.errors import UserError, require
from keras_sd.files.writing import replaced


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@output_option("RUN/plot.png")
def plot(runs, output, overwrite):
    """Plot the losses, rates and evaluations of RUN, a run folder, as one PNG; several are compared.

    What looks wrong with a run stands above the panels.

    \b
    keras-sd plot runs/lora runs/other --output runs.png
    """
    from keras_sd.training.run_curves import findings, read_run

    folders = [Path(run) for run in runs]
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise UserError("RUN: a run folder is named twice; name each once")
    require("matplotlib")
    read = [read_run(folder) for folder in folders]
    place = check_output(output, ".png", default=folders[0] / "plot.png", overwrite=overwrite)
    from keras_sd.training.run_plot import draw

    for run in read:
        for line in findings(run):
            print(f"{run.name}: {line}", file=sys.stderr)
    path = place.free()
    with replaced(path) as staging:
        draw(read, staging)
    click.echo(path)
