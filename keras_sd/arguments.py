"""Checks of arguments that people give: whole numbers, shares and seeds, told by their names."""

import math
import numbers

import numpy as np

from keras_sd.errors import UserError

LARGEST_SEED = 2**64 - 1
"""As others have it; image i has the seed plus i, and 0 follows the largest one."""

MOST_IMAGES = 10**5
"""More of one call are a slip: a list of as many names would fill the memory before anything is made."""

LONGEST_SIDE = 16384
"""Pixels of a side; more are a slip, and would fill the memory."""

_LONGEST_SHOWN = 100


def whole_number(name, value, least, most=None):
    """Return the value as an int.

    Raises:
        UserError: it is no whole number (3.0 and True are none), or out of range.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not is_whole or value < least or (most is not None and value > most):
        upwards = f"from {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} {shown(value)}: out of range; use a whole number {upwards}")
    return int(value)


def shown(value):
    """Return a value on one line, its end left out where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes out no number of thousands of digits
        text = "of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def share(name, value, meaning="0 to 1"):
    """Return the value as a float.

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
    """Return the seed as an int.

    Raises:
        UserError: it is no whole number from 0 to `LARGEST_SEED`.
    """
    return whole_number("seed", seed, 0, LARGEST_SEED)


def image_seeds(seed, count):
    """Return the seed of each of `count` images, uint64 `(count,)`: `seed`, `seed` + 1, ...

    Raises:
        UserError: as `checked_seed`.
    """
    return np.uint64(checked_seed(seed)) + np.arange(count, dtype="uint64")


def checked_interval(interval):
    """Return the two shares of the steps between which there is guidance.

    Raises:
        UserError: they are no two shares, or no step lies between them.
    """
    try:
        start, end = (share("guidance_interval", each) for each in interval)
    except (TypeError, ValueError):  # no pair, or none of shares
        start = end = 0
    if not start < end:
        raise UserError(
            f"guidance_interval {interval!r}: no part of the steps; use two shares such as (0, 0.75)"
        )
    return start, end


def first_step(strength, num_inference_steps):
    """Return how many of the steps a strength leaves out.

    Raises:
        UserError: the strength is no number above 0 up to 1, or makes no step.
    """
    whole_number("num_inference_steps", num_inference_steps, 1)
    if not isinstance(strength, numbers.Real) or isinstance(strength, bool) or not 0 < strength <= 1:
        raise UserError(f"strength {strength!r}: out of range; use more than 0, up to 1")
    made = int(num_inference_steps * strength)
    if made < 1:
        least = math.ceil(1000 / num_inference_steps) / 1000
        raise UserError(
            f"strength {strength}: makes none of {num_inference_steps} steps; use {least:g} or more"
        )
    return num_inference_steps - made
