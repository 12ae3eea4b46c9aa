"""Random initial values, drawn by NumPy: a backend would compile a program for each shape of weight.

Each draw takes its seed from Python's generator, as Keras' own initialisers do, so that
`keras.utils.set_random_seed` or `random.seed` gives the same weights every time, on every backend.
"""

import math
import random

import numpy as np
from keras import ops


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
