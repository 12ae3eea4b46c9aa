"""Reads the figures of a training run, and finds what is wrong with it. No backend is needed."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json, read_json

ERROR = "_standard_error"
_START_OF_NEW = 0.8  # loss of a network that predicts nothing yet: noise and velocity have variance 1
_FEW_STEPS = 50  # of fewer steps little can be said
_LEAST_FALL = 1e-3  # of the loss of a run that learns, as a share; its images and noise are always the same


class _Record(TypedDict):
    step: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """The values of one figure, and the steps they belong to; both float64 `(n,)`."""

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass
class RunCurves:
    """The figures of a run.

    Attributes:
        name: of the run folder.
        curves: name of a figure -> `Curve`.
        is_fine_tuning: whether a pretrained network is trained; None if the folder does not say.
        has_weights: whether losses are weighted by timestep, so that their size says nothing.
    """

    name: str
    curves: dict[str, Curve]
    is_fine_tuning: bool | None = None
    has_weights: bool = False


def read_run(folder: Path) -> RunCurves:
    """Read `logs/metrics.jsonl` and `run.json` of a run folder; the run may still be going on.

    Raises:
        UserError: it is no run folder, has logged nothing yet, or a line is damaged.
    """
    from keras_sd.training.run_folder import DESCRIPTION

    path = folder / "logs" / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a training run")
    if not path.is_file():
        raise UserError(f"{folder}: no run folder, as logs/metrics.jsonl is missing; give one")
    curves = {name: Curve(*map(np.array, points)) for name, points in _read(path).items()}
    if not curves:
        raise UserError(f"{path}: has no figures yet; wait for the first steps of the run")
    run = RunCurves(folder.resolve().name, curves)
    if (folder / DESCRIPTION).is_file():
        described = read_json(folder / DESCRIPTION)
        options = described.get("options")
        options = options if isinstance(options, dict) else {}
        methods = ("text-to-image", "lora", "dreambooth", "textual-inversion")
        run.is_fine_tuning = described.get("method") in methods and not options.get("from_scratch")
        run.has_weights = bool(options.get("snr_gamma") or options.get("debiased_estimation"))
    return run


def _read(path):
    """Return name -> (steps, values) of the file's numbers, in the order of its lines."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()  # is being written
    found = {}
    for number, line in enumerate(lines, start=1):
        record = parse_json(line, f"{path}, line {number}", _Record, remedy="remove the line")
        for name, value in record.items():
            if name in ("step", "time"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{path}, line {number}: {name} is not a number; remove the line")
            steps, values = found.setdefault(name, ([], []))
            steps.append(float(record["step"]))
            values.append(float(value))
    return found


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the running mean over `window` values, as long as the values less one window."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def window_of(count: int) -> int:
    """Return the number of steps that a curve of so many is smoothed over."""
    return max(1, min(count // 4, max(10, count // 50)))


def findings(run: RunCurves) -> list[str]:
    """Return what looks wrong with a run, each in a line; none for a good one."""
    found = [
        check(run) for check in (_not_finite, _diverged, _spikes, _wrong_target, _overfits, _stuck, _still)
    ]
    return [line for line in found if line]


def _not_finite(run):
    for name, curve in run.curves.items():
        bad = curve.steps[~np.isfinite(curve.values)]
        if len(bad):
            return f"{name} is not finite from step {bad[0]:.0f} on"
    return None


def _diverged(run):
    loss = run.curves.get("loss")
    if loss is None or len(loss.values) < _FEW_STEPS:
        return None
    smooth = smoothed(loss.values, window_of(len(loss.values)))
    lowest = int(np.argmin(smooth))
    if smooth[-1] > 1.5 * smooth[lowest] and smooth[-1] > smooth[0]:
        step = loss.steps[lowest]
        return (
            f"diverges: the mean loss is {smooth[-1]:.3g}, and was {smooth[lowest]:.3g} near step "
            f"{step:.0f}; lower the learning rate"
        )
    return None


def _spikes(run):
    norms = run.curves.get("gradient_norm")
    if norms is None or len(norms.values) < _FEW_STEPS:
        return None
    usual = np.median(norms.values)
    count = int(np.sum(norms.values > 20 * usual))
    if count > len(norms.values) / 200:
        return f"spikes: the gradient norm of {count} steps is over 20 times the usual {usual:.3g}"
    return None


def _wrong_target(run):
    curve = run.curves.get("validation_loss_train_raw", run.curves.get("loss"))
    if curve is None or not run.is_fine_tuning or run.has_weights:
        return None
    start = float(np.mean(curve.values[: 1 if curve is not run.curves.get("loss") else 10]))
    if start > _START_OF_NEW:
        return (
            f"starts at a loss of {start:.3g}, like a network that knows nothing; see that the prediction "
            "type is the model's, unless it has never seen images of this kind"
        )
    return None


def _overfits(run):
    held, train = (run.curves.get(f"validation_loss_{part}_ema") for part in ("held_out", "train"))
    if held is None or train is None or len(held.values) < 3:
        return None
    lowest = int(np.argmin(held.values))
    rise = held.values[-1] - held.values[lowest]
    # Both have the same images and noise, so a standard error of the whole mean would hide a true rise.
    fell = train.values[lowest] - train.values[-1]
    if lowest < len(held.values) - 1 and rise > 0.02 * held.values[lowest] and fell > 0:
        return (
            f"overfits: the held-out loss is lowest at step {held.steps[lowest]:.0f} and has risen by "
            f"{rise / held.values[lowest]:.1%} since; use the checkpoint there, or more images"
        )
    return None


def _stuck(run):
    curve = run.curves.get("validation_loss_train_raw")
    if curve is None or len(curve.values) < 3 or curve.steps[-1] < _FEW_STEPS:
        return None
    start, end = curve.values[0], curve.values[-1]
    if end > (1 - _LEAST_FALL) * start and math.isfinite(end):
        return (
            f"does not learn: the loss on fixed training images is {end:.4g}, and was {start:.4g} at step "
            f"{curve.steps[0]:.0f}"
        )
    return None


def _still(run):
    estimate = run.curves.get("prodigy_d")
    if estimate is None or len(estimate.values) < 2 or (estimate.values != estimate.values[0]).any():
        return None
    return (
        f"hardly learns: Prodigy's estimate d is still {estimate.values[0]:.1g} after "
        f"{len(estimate.values)} steps; train longer, without a warm-up, or give a larger prodigy-d0"
    )
