"""Averages of the weights whose length is chosen after the run (Karras et al., 2024, section 3).

A power-function average at time t gives the weights of time s a weight proportional to s ** gamma, so its
length is a share of the training, and it forgets the first weights by itself. The optimizer keeps two of
them, whose snapshots stay in the run folder. A linear combination of snapshots comes close to the average of
any other length: its coefficients are those whose sum of power functions is nearest to the wanted one.

A length is named by sigma_rel, the standard deviation of the power function as a share of the training.
"""

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keras_sd.errors import UserError
from keras_sd.training.slices import Sliced

SIGMAS = (0.05, 0.1)
"""sigma_rel of the two averages that are kept."""

FOLDER = "post-hoc-ema"
PREFIX = "post_hoc_"  # of the names of their groups of tensors
DTYPES = ("float16", "float32")
UPDATES = "updates"
_SHORTEST, _LONGEST = 0.005, 0.28  # a weight that is the same for all steps has 0.2887


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a power function by its relative standard deviation (algorithm 2).

    Raises:
        UserError: there is none for it.
    """
    if not _SHORTEST <= sigma_rel <= _LONGEST:
        raise UserError(
            f"sigma_rel {sigma_rel:g}: out of range; give {_SHORTEST:g} to {_LONGEST:g}, such as 0.1"
        )
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def group_of(sigma_rel: float) -> str:
    """Return the name of an average's tensors in a checkpoint and in a snapshot."""
    return f"{PREFIX}{sigma_rel:.3f}".rstrip("0")


class Profile(NamedTuple):
    """A power-function average: the number of updates it ends at, and its exponent."""

    updates: float
    gamma: float


def inner_product(first: Profile, second: Profile) -> float:
    """Return the integral of the product of two power functions, each of integral 1 (equation 123)."""
    ratio = first.updates / second.updates
    if ratio > 1:
        first, second, ratio = second, first, 1 / ratio
    # The earlier one ends the integral; powers of the times themselves would overflow.
    exponents = first.gamma + 1, second.gamma + 1
    return exponents[0] * exponents[1] / (sum(exponents) - 1) * ratio ** exponents[1] / first.updates


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[npt.NDArray[np.float64], float]:
    """Return the weight of each snapshot in the average that is nearest to the wanted one, and the distance.

    The distance is that of the two functions, as a share of the wanted function's norm.
    """
    products = np.array([[inner_product(one, other) for other in snapshots] for one in snapshots])
    with_wanted = np.array([inner_product(one, wanted) for one in snapshots])
    # Scaled, as snapshots early in a run have far larger norms.
    scale = 1 / np.sqrt(np.diag(products))
    solved, *_ = np.linalg.lstsq(products * np.outer(scale, scale), with_wanted * scale, rcond=1e-13)
    found = solved * scale
    norm = inner_product(wanted, wanted)
    distance = norm - 2 * found @ with_wanted + found @ products @ found
    return found, float(np.sqrt(max(distance, 0) / norm))


def narrowed(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the tensors of a snapshot, arrays or `slices.Sliced`, in the precision in which it is kept.

    Raises:
        UserError: a number is too large for it.
    """

    def narrow(name, array):
        with np.errstate(over="ignore"):
            array = np.asarray(array, "float32").astype(dtype)
        if not np.isfinite(array).all():
            raise UserError(f"post_hoc_ema {dtype}: {name} has a number too large for it; use float32")
        return array

    return {
        name: dataclasses.replace(
            tensor, parts=tuple((start, narrow(name, array)) for start, array in tensor.parts)
        )
        if isinstance(tensor, Sliced)
        else narrow(name, tensor)
        for name, tensor in tensors.items()
    }


class Snapshots:
    """The snapshots of a finished or a running training.

    Args:
        run_folder: the run folder.

    Attributes:
        steps: the steps of all snapshots that are whole, in order.

    Raises:
        UserError: there are none.
    """

    def __init__(self, run_folder: Path) -> None:
        from keras_sd.training.checkpoints import POSITION, Checkpoints
        from keras_sd.training.run_folder import children

        folder = run_folder / FOLDER
        if not run_folder.is_dir():
            raise UserError(f"{run_folder}: no such folder; give the folder of a training run")
        found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in children(folder)]
        self._checkpoints = Checkpoints(folder, {})
        self._folders = dict(sorted((int(name[1]), path) for name, path in found if name))
        self._position = POSITION
        if not self._folders:
            raise UserError(
                f"{run_folder}: has no snapshots of averages, which a run keeps with `post_hoc_ema`; give "
                "another run folder"
            )
        self._leave_out_later_ones(run_folder)
        self.steps = list(self._folders)

    def _leave_out_later_ones(self, run_folder: Path) -> None:
        """Leave out snapshots after the run's last checkpoint: they are of a branch that it has left."""
        from keras_sd.training.run_folder import children

        names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in children(run_folder)]
        last = max((int(name[1]) for name in names if name), default=None)
        later = [step for step in self._folders if last is not None and step > last]
        if not later:
            return
        warnings.warn(
            f"{run_folder}: its last checkpoint is of step {last}, so the snapshots of later steps are left "
            f"out, the first of step {later[0]}",
            stacklevel=3,
        )
        self._folders = {step: path for step, path in self._folders.items() if step not in later}
        if not self._folders:
            raise UserError(f"{run_folder}: has no snapshots up to its last checkpoint; train on")

    def folder(self, step: int | None) -> Path:
        """Return the folder of the snapshot of a step, None for the last one.

        Raises:
            UserError: there is no such snapshot.
        """
        if step is not None and step not in self._folders:
            shown = ", ".join(map(str, self.steps[-8:]))
            raise UserError(f"step {step}: has no snapshot; choose one of the last ones, {shown}")
        return self._folders[self.steps[-1] if step is None else step]

    def average(self, sigma_rel: float, step: int | None = None) -> tuple[dict[str, np.ndarray], float]:
        """Return the average of the trained weights of a length, and the distance of `coefficients`.

        Args:
            sigma_rel: the length.
            step: where the average ends, the step of a snapshot; None for the last one.

        Returns:
            Dictionary of name -> float32 array, and the distance.

        Raises:
            UserError: the length is out of range, or a snapshot is missing or damaged.
        """
        from safetensors import safe_open

        from keras_sd.files.json_files import read_json

        last = self.folder(step)
        gamma, kept, files = gamma_of(sigma_rel), [], []
        for path in list(self._folders.values())[: list(self._folders.values()).index(last) + 1]:
            try:
                self._checkpoints.check(path)
            except UserError as error:
                fault = str(error).rpartition(";")[0]
                raise UserError(f"{fault}; remove this folder, and the others are averaged") from error
            updates = read_json(path / self._position).get(UPDATES)
            if not isinstance(updates, int) or updates < 1:
                raise UserError(f"{path}: names no number of updates; remove it")
            for sigma in SIGMAS:
                kept.append(Profile(updates, gamma_of(sigma)))
                files.append(path / f"{group_of(sigma)}.safetensors")
        found, distance = coefficients(kept, Profile(kept[-1].updates, gamma))
        readers = [safe_open(file, framework="np") for file in files]
        average = {}
        for name in readers[-1].keys():  # noqa: SIM118 (not a dictionary)
            whole: Any = 0.0
            for reader, coefficient in zip(readers, found, strict=True):
                whole = whole + coefficient * reader.get_tensor(name).astype("float64")
            average[name] = whole.astype("float32")
        return average, distance
