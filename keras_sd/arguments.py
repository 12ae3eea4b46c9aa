"""Arguments: their types, checks of numbers, seeds, paths and images, and deprecated names."""

import functools
import math
import numbers
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from keras_sd.errors import UserError

Tensor: TypeAlias = Any
"""A tensor of the backend, or a NumPy array in its place."""

Images: TypeAlias = npt.NDArray[np.uint8]
"""uint8 `(n, height, width, 3)`, and one image `(height, width, 3)` where a docstring says so."""

Floats: TypeAlias = npt.NDArray[np.floating]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LARGEST_SEED = 2**64 - 1
"""The largest seed, as in other programs. Image i has the seed plus i; 0 follows the largest seed."""

MOST_IMAGES = 10**5
"""The largest number of images of one call; more are a mistake and would exhaust the memory at once."""

LONGEST_SIDE = 16384
"""The largest side of an image in pixels; more are a mistake and would exhaust the memory."""

_LONGEST_SHOWN = 200


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return the value as an int.

    Raises:
        UserError: it is not an int (3.0 and True are not accepted), or out of range.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not is_whole or value < least or (most is not None and value > most):
        upwards = f"from {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} {shown(value)}: out of range; use a whole number {upwards}")
    return int(value)


def real_number(
    name: str, value: Any, fits: Callable[[float], bool] = math.isfinite, meaning: str = "a finite number"
) -> float:
    """Return the value as a float.

    Args:
        fits: whether a finite number is in the range.
        meaning: the range, for the message.

    Raises:
        UserError: it is not a finite number (True and "1" are not accepted), or out of range.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not fits(number):
        raise UserError(f"{name} {shown(value)}: out of range; use {meaning}")
    return number


def checked_path(name: str, value: Any) -> Path:
    """Return the name of a file, a folder or a model as a `Path`.

    Raises:
        UserError: it is no text or path, is empty (`Path` would take the folder where the program runs), or
            holds characters that no file's name has.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UserError(f"{name} {shown(value)}: not a name; give a str or a pathlib.Path")
    if not text.strip():
        raise UserError(f"{name}: empty; give a name")
    try:
        is_valid = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{name} {shown(value)}: no name of a file; correct it")
    return Path(text)


def checked_images(name: str, images: Any, *shapes: str, floats: bool = False) -> npt.NDArray[Any]:
    """Return images as an array.

    Args:
        shapes: the accepted shapes, such as "(n, height, width, 3)". A word is any length from 1.
        floats: whether finite floats are accepted too, not only uint8.

    Raises:
        UserError: the type or the shape is another one, or a number is not finite.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:
        raise UserError(f"{name}: of several sizes; give images of one size") from error
    is_float = floats and array.dtype.kind == "f"
    if not (is_float or array.dtype == np.uint8) or not any(_has_shape(array, shape) for shape in shapes):
        accepted = f"{'uint8 or floats' if floats else 'uint8'} of shape {' or '.join(shapes)}"
        raise UserError(f"{name} of type {array.dtype} and shape {array.shape}: give {accepted}")
    if is_float and not np.isfinite(array).all():
        raise UserError(f"{name}: not all numbers are finite; give images without NaN or infinity")
    return array


def _has_shape(array, shape):
    words = shape.strip("()").split(", ")
    return len(words) == array.ndim and all(
        length == int(word) if word.isdigit() else length > 0
        for word, length in zip(words, array.shape, strict=True)
    )


def switch(name: str, value: Any) -> bool:
    """Return the value as a bool.

    Raises:
        UserError: it is neither True nor False ("no", 0 and None are not accepted).
    """
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} {shown(value)}: no switch; give True or False")
    return bool(value)


def switch_or_none(name: str, value: Any) -> bool | None:
    """Return the value as a bool, or None as it is.

    Raises:
        UserError: it is neither True nor False nor None.
    """
    return None if value is None else switch(name, value)


def float_array(name: str, values: Any, *shape: int | None) -> Floats:
    """Return numbers, an array or a tensor of the backend, as a float32 array.

    Args:
        shape: the lengths of the axes; None is any length from 1.

    Raises:
        UserError: they are no real numbers, or have another shape.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        kind = array.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"{name} of type {kind}: not real numbers; give an array of float32")
    wanted = ", ".join("any" if length is None else str(length) for length in shape)
    if not _has_shape(array, wanted):
        raise UserError(f"{name} of shape {array.shape}: does not fit the model; give ({wanted})")
    return array.astype("float32", copy=False)


def shown(value: object) -> str:
    """Return a representation of any value on one line, truncated if it is long."""
    try:
        text = repr(value[: 2 * _LONGEST_SHOWN] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # more digits than Python prints, or too many nested lists
        return "(too long to show)"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def share(name: str, value: Any, meaning: str = "0 to 1") -> float:
    """Return the value as a float.

    Args:
        meaning: the range in the message, with the meaning of its ends.

    Raises:
        UserError: it is not a number from 0 to 1.
    """
    return real_number(name, value, lambda number: 0 <= number <= 1, meaning)


def checked_seed(seed: object) -> int:
    """Return the seed as an int.

    Raises:
        UserError: it is not an int from 0 to `LARGEST_SEED`.
    """
    return whole_number("seed", seed, 0, LARGEST_SEED)


def image_seeds(seed: object, count: int) -> npt.NDArray[np.uint64]:
    """Return the seed of each of `count` images, uint64 `(count,)`: `seed`, `seed` + 1, ...

    Raises:
        UserError: as `checked_seed`.
    """
    return np.uint64(checked_seed(seed)) + np.arange(count, dtype="uint64")


def checked_rescale(rescale: Any) -> float:
    """Return the factor of guidance rescaling; raise a `UserError` unless it is from 0 to 1."""
    return share("guidance_rescale", rescale, "0 (none) to 1")


def checked_interval(interval: Any) -> tuple[float, float]:
    """Return the guidance interval (start, end), as shares of the steps.

    Raises:
        UserError: it is not a pair of shares with start < end.
    """
    try:
        start, end = (share("guidance_interval", each) for each in interval)
    except (TypeError, ValueError):  # not a pair, or not of numbers
        start = end = 0
    if not start < end:
        raise UserError(
            f"guidance_interval {shown(interval)}: not a part of the steps; use two fractions such as "
            "(0, 0.75)"
        )
    return start, end


def first_step(strength: Any, num_inference_steps: int) -> int:
    """Return the number of steps that a strength skips at the beginning.

    Raises:
        UserError: the strength is not a number above 0 and up to 1, or leaves no step.
    """
    whole_number("num_inference_steps", num_inference_steps, 1)
    real_number("strength", strength, lambda number: 0 < number <= 1, "more than 0, up to 1")
    made = int(num_inference_steps * strength)
    if made < 1:
        least = math.ceil(1000 / num_inference_steps) / 1000
        raise UserError(
            f"strength {shown(strength)}: leaves none of {num_inference_steps} steps; use {least:g} or more"
        )
    return num_inference_steps - made


def formerly(**names: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make a function take keyword arguments by the names that they had before, with a warning.

    Args:
        names: former name -> present name.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            for old in names.keys() & options.keys():
                new, title = names[old], function.__name__
                if new in options:
                    raise TypeError(f"{title}() got {new}, and {old}, which is its former name")
                warnings.warn(f"{title}(): {old} is now called {new}", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*arguments, **options)

        return call

    return decorate
