"""Draws the figures of one training run, or of several, as one image."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_sd.training.run_curves import ERROR, Curve, RunCurves, findings, smoothed, window_of

_WIDTH, _HEIGHT = 5.2, 3.6  # of a panel, in inches
_SETS = {"held_out": "tab:red", "train": "tab:blue"}
_WEIGHTS = {"ema": ("EMA", "-"), "raw": ("raw", ":")}
_OF_STEPS = ("loss", "learning_rate", "gradient_norm")


def draw(runs: Sequence[RunCurves], path: Path) -> None:
    """Write a PNG of all panels that the runs have figures for.

    The loss and the validation loss of several runs are drawn in one panel, each run in a colour of its own
    and EMA weights alone; those of one run with raw weights and bins of the timestep.

    Args:
        runs: the runs, one or more.
        path: the file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(runs) if panel is not None]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    notes = [note for run in runs for note in _notes(run, len(runs) > 1)]
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(
            figsize=(_WIDTH * columns, _HEIGHT * rows + 0.2 * len(notes) + 0.3), layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, panel in zip(axes, panels, strict=False):
            panel(place)
            place.set_xlabel("step")
            if place.get_legend_handles_labels()[0]:
                place.legend(fontsize=7)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        title = ", ".join(run.name for run in runs)
        figure.suptitle("\n".join([title, *notes]), color="firebrick" if notes else "black", fontsize=9)
        figure.savefig(path, dpi=110, format="png")


def _notes(run, is_named):
    for line in findings(run):
        yield from textwrap.wrap(f"{run.name}: {line}" if is_named else line, 150)


def _panels(runs):
    """Return the functions that draw on axes, in order."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    yield _loss_panel(runs)
    if len(runs) == 1:
        yield _bins_panel(runs[0])
    yield _step_panel(runs, "learning_rate", "learning rate", "linear")
    yield _step_panel(runs, "gradient_norm", "gradient norm before clipping", "log")
    for group in _groups(names):
        yield _evaluation_panel(runs, group)


def _colours(runs):
    return [f"C{index % 10}" for index in range(len(runs))]


def _line(axes, curve, name, run, **options):
    """Draw a curve with the error bars of its standard error, if there is one."""
    errors = run.curves.get(f"{name}{ERROR}")
    bars = errors.values if errors is not None and len(errors.values) == len(curve.values) else None
    axes.errorbar(curve.steps, curve.values, bars, marker="o", markersize=3, capsize=2, **options)


def _loss_panel(runs):
    def panel(axes):
        axes.set_title("loss")
        shown, steps = [], []
        for run, colour in zip(runs, _colours(runs), strict=True):
            loss, label = run.curves.get("loss"), f"{run.name}: " if len(runs) > 1 else ""
            if loss is not None:
                if len(runs) == 1:
                    axes.plot(loss.steps, loss.values, color="0.4", alpha=0.2, linewidth=0.5)
                    steps.append(loss.values)
                shown.append(_mean_loss(axes, loss, colour if len(runs) > 1 else "0.4", f"{label}training"))
            for part, own in _SETS.items():
                for weights, (title, dashes) in _WEIGHTS.items():
                    name = f"validation_loss_{part}_{weights}"
                    curve = run.curves.get(name)
                    if curve is None or (len(runs) > 1 and weights == "raw"):
                        continue
                    shown.append(curve.values)
                    options = {"color": own, "linestyle": dashes}
                    if len(runs) > 1:
                        options = {"color": colour, "linestyle": "-" if part == "held_out" else "--"}
                    title = f"{label}{part.replace('_', '-')}, {title}"
                    _line(axes, curve, name, run, label=title, **options)
        _scale(axes, shown, steps)

    has_loss = any("loss" in run.curves or "validation_loss_train_ema" in run.curves for run in runs)
    return panel if has_loss else None


def _mean_loss(axes, loss, colour, label):
    """Draw the running mean of a loss, and return it."""
    window = window_of(len(loss.values))
    mean = smoothed(loss.values, window)
    axes.plot(
        loss.steps[window - 1 :], mean, color=colour, linewidth=1, label=f"{label}, mean of {window} steps"
    )
    return mean


def _scale(axes, curves, steps=()):
    """Show all of the curves, and nearly all single steps, on a logarithmic scale if they differ much.

    Args:
        curves: values that are certain, such as means.
        steps: values of single steps, a few of which may be far off.
    """
    values, single = (
        np.concatenate([np.zeros(0), *(one[np.isfinite(one) & (one > 0)] for one in parts)])
        for parts in (curves, steps)
    )
    values = np.concatenate([values, np.quantile(single, [0.005, 0.995])]) if len(single) else values
    if len(values):
        low, high = values.min(), values.max()
        axes.set_ylim(low / 1.1, high * 1.1)
        if high > 4 * low:
            axes.set_yscale("log")


def _bins_panel(run):
    part = "held_out" if "validation_loss_held_out_ema" in run.curves else "train"
    prefix = f"validation_loss_{part}_ema_timesteps_"
    names = [name for name in run.curves if name.startswith(prefix) and not name.endswith(ERROR)]

    def panel(axes):
        axes.set_title(f"{part.replace('_', '-')} loss by timestep, EMA")
        for index, name in enumerate(names):
            label = name.removeprefix(prefix).replace("_", " to ")
            _line(axes, run.curves[name], name, run, label=label, color=f"C{index % 10}")
        values = np.concatenate([run.curves[name].values for name in names])
        if np.nanmax(values) > 4 * np.nanmin(values) > 0:
            axes.set_yscale("log")

    return panel if names else None


def _step_panel(runs, name, title, scale):
    def panel(axes):
        axes.set_title(title)
        for run, colour in zip(runs, _colours(runs), strict=True):
            curve = run.curves.get(name)
            if curve is not None and len(curve.values):
                label = run.name if len(runs) > 1 else None
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, label=label)
        curves = [run.curves[name].values for run in runs if name in run.curves]
        peaks = [values.max(initial=0.0, where=np.isfinite(values)) for values in curves]
        differ = min(peaks) > 0 and max(peaks) > 10 * min(peaks)  # a small one would be a line at 0
        axes.set_yscale("log" if differ or (scale == "log" and max(peaks) > 0) else "linear")

    return panel if any(name in run.curves for run in runs) else None


def _groups(names):
    """Return the other figures, grouped by what they measure, such as kid_inception or clip_score."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in _OF_STEPS or name.startswith("validation_loss") or name.endswith(ERROR):
            continue
        kind = name
        for ending in ("_ema", "_raw", "_train", "_held_out"):
            kind = kind.removesuffix(ending)
        groups.setdefault(kind, []).append(name)
    return list(groups.values())


def _evaluation_panel(runs, group):
    def panel(axes):
        kind = group[0]
        for ending in ("_ema", "_raw", "_train", "_held_out"):
            kind = kind.removesuffix(ending)
        axes.set_title(kind.replace("_", " "))
        for run, colour in zip(runs, _colours(runs), strict=True):
            for name in group:
                curve = run.curves.get(name)
                if curve is None or (len(runs) > 1 and name.endswith("_raw")):
                    continue
                of_set = next((part for part in _SETS if f"_{part}" in name), None)
                # Of several runs, whose colours are their own, EMA weights alone are drawn.
                dashes = ":" if name.endswith("_raw") else "-"
                if len(runs) > 1 and of_set == "train":
                    dashes = "--"
                detail = name.removeprefix(kind).strip("_").replace("held_out", "held-out").replace("_", ", ")
                label = ", ".join(filter(None, (run.name if len(runs) > 1 else None, detail))) or None
                own = _SETS[of_set] if of_set and len(runs) == 1 else colour
                _evaluations(axes, curve, own, dashes, label)

    return panel


def _evaluations(axes: Any, curve: Curve, colour: str, dashes: str, label: str | None) -> None:
    axes.plot(
        curve.steps,
        curve.values,
        color=colour,
        linestyle=dashes,
        marker="o",
        markersize=3,
        linewidth=1,
        label=label,
    )
