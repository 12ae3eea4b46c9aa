"""Checks of arguments that people give: whole numbers, shares and seeds, told by their names."""

import numbers

import numpy as np

from keras_sd.errors import UserError

LARGEST_SEED = 2**64 - 1
"""As others have it; image i has the seed plus i, and 0 follows the largest one."""


def whole_number(name, value, least, most=None):
    """The value as an int.

    Raises:
        UserError: it is no whole number (3.0 and True are none), or out of range.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not is_whole or value < least or (most is not None and value > most):
        upwards = f"from {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} {value!r}: out of range; use a whole number {upwards}")
    return int(value)


def share(name, value, meaning="0 to 1"):
    """The value as a float.

    Args:
        meaning: what is said that the ends stand for.

    Raises:
        UserError: it is no number from 0 to 1.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not is_number or not 0 <= value <= 1:
        raise UserError(f"{name} {value!r}: out of range; use {meaning}")
    return float(value)


def checked_seed(seed):
    """The seed as an int.

    Raises:
        UserError: it is no whole number from 0 to `LARGEST_SEED`.
    """
    return whole_number("seed", seed, 0, LARGEST_SEED)


def image_seeds(seed, count):
    """The seed of each of `count` images, uint64 `(count,)`: `seed`, `seed` + 1, ...

    Raises:
        UserError: as `checked_seed`.
    """
    return np.uint64(checked_seed(seed)) + np.arange(count, dtype="uint64")
