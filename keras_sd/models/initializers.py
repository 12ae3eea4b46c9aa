"""Random initial values, drawn by NumPy: a backend would compile a program for each shape of weight.

Each draw takes its seed from Python's generator, as Keras' own initialisers do, so that
`keras.utils.set_random_seed` or `random.seed` gives the same weights every time, on every backend.
"""

import contextlib
import contextvars
import math
import random

import keras
import numpy as np
from keras import ops

_deferred = contextvars.ContextVar("deferred", default=None)


def _generator():
    return np.random.default_rng(random.getrandbits(64))


def uniform(limit):
    """An initialiser of values between `-limit` and `limit`."""

    def draw(shape, dtype=None):
        values = _generator().random(shape, "float32")
        values -= 0.5
        values *= 2 * limit
        return ops.convert_to_tensor(values, dtype)

    return draw


def normal(standard_deviation):
    """An initialiser of normally distributed values with mean 0."""

    def draw(shape, dtype=None):
        values = _generator().standard_normal(shape, "float32")
        values *= standard_deviation
        return ops.convert_to_tensor(values, dtype)

    return draw


def glorot_uniform(shape, dtype=None):
    """Uniform values of a kernel, of the size that Glorot and Bengio (2010) derive."""
    *window, inputs, outputs = shape
    limit = math.sqrt(6 / (math.prod(window) * (inputs + outputs)))
    return uniform(limit)(shape, dtype)


class Deferred:
    """An initialiser that gives the tensor that `load()` returns, or what another one draws.

    Attributes:
        initializer: the other one.
        load: a function without arguments, or None.
    """

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)
        self.load = None

    def __call__(self, shape, dtype=None):
        if self.load is None:
            return self.initializer(shape, dtype=dtype)
        load, self.load = self.load, None  # a backend with memory of its own needs the array no longer
        return load()


@contextlib.contextmanager
def deferring():
    """Make every weight of `models.layers` that is made inside start from a `Deferred`.

    In a `keras.StatelessScope` initialisers are called at its end, so that there is time to set `load`. Other
    threads make their weights as ever.

    Yields:
        A dictionary from the `id` of each variable to its `Deferred`.
    """
    token = _deferred.set({})
    try:
        yield _deferred.get()
    finally:
        _deferred.reset(token)


def deferred_weights():
    """Return the dictionary of the `deferring()` that is open in this thread, or None."""
    return _deferred.get()
