"""Random initial values, drawn by NumPy: a backend would compile a program for each shape of weight.

Each draw takes its seed from Python's generator, as Keras' own initialisers do. So after
`keras.utils.set_random_seed` or `random.seed` the weights are always the same, on every backend.
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
    """Return an initialiser of values between `-limit` and `limit`."""

    def draw(shape, dtype=None):
        values = _generator().random(shape, "float32")
        values -= 0.5
        values *= 2 * limit
        return ops.convert_to_tensor(values, dtype)

    return draw


def normal(standard_deviation):
    """Return an initialiser of normally distributed values with mean 0."""

    def draw(shape, dtype=None):
        values = _generator().standard_normal(shape, "float32")
        values *= standard_deviation
        return ops.convert_to_tensor(values, dtype)

    return draw


def glorot_uniform(shape, dtype=None):
    """Return uniform values for a kernel, within the limit of Glorot and Bengio (2010)."""
    *window, inputs, outputs = shape
    limit = math.sqrt(6 / (math.prod(window) * (inputs + outputs)))
    return uniform(limit)(shape, dtype)


class Deferred:
    """An initialiser that returns the tensor of `load()`, or the values of another initialiser.

    Attributes:
        initializer: the other initialiser.
        load: a function without arguments, or None.
    """

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)
        self.load = None

    def __call__(self, shape, dtype=None):
        if self.load is None:
            return self.initializer(shape, dtype=dtype)
        load, self.load = self.load, None  # frees the array, which the backend may have copied
        return load()


@contextlib.contextmanager
def deferring():
    """Give every weight of `models.layers` that is created inside the block a `Deferred`.

    In a `keras.StatelessScope` initialisers are called at its end only, so `load` can be set before. Other
    threads are not affected.

    Yields:
        A dictionary from the `id` of each variable to its `Deferred`.
    """
    token = _deferred.set({})
    try:
        yield _deferred.get()
    finally:
        _deferred.reset(token)


def deferred_weights():
    """Return the dictionary of this thread's `deferring()` block, or None outside of one."""
    return _deferred.get()
