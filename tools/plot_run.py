"""Plots the loss and the KID of a training run: `python tools/plot_run.py RUN_FOLDER OUTPUT.png`."""

import json
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import replaced


def read_curves(path):
    """Read `metrics.jsonl` into name -> (steps, values)."""
    curves = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "time"}:
            curves.setdefault(name, []).append((record["step"], record[name]))
    return {name: np.array(points).T for name, points in curves.items()}


def smoothed(values, window):
    """Running mean over `window` values, as long as the values less one window."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


@click.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output")
@overwrite_option
def main(run_folder, output, overwrite):
    """Plot RUN_FOLDER's loss, and beside it whatever its evaluations measured, to OUTPUT."""
    place = check_output(output, ".png", overwrite=overwrite)
    curves = read_curves(run_folder / "logs" / "metrics.jsonl")
    steps, losses = curves.pop("loss")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    window = max(1, len(losses) // 60)
    left.plot(steps[window - 1 :], smoothed(losses, window), color="tab:blue")
    left.set(title=f"Loss, mean over {window} steps", xlabel="step", yscale="log")
    for name, (at, values) in sorted(curves.items()):
        right.plot(at, values, marker="o", markersize=3, label=name.replace("_", " "))
    right.set(title="Evaluations", xlabel="step", yscale="log")
    if curves:
        right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    with replaced(place.free()) as staging:
        figure.savefig(staging, dpi=150, format="png")


if __name__ == "__main__":
    run_command(main, "plot_run.py")
