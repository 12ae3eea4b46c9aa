"""Convolution by im2col: one matrix multiplication (GEMM), for JAX on a CPU.

On maps of 8x8 and less, convolutions in JAX's XLA reach 20 to 50 GFLOP/s, its GEMM 60 to 160 (two cores). In
TensorFlow's XLA convolutions are as fast as GEMM. On larger maps, copying the patches costs what GEMM saves.
"""

import math

import keras
from keras import ops

from keras_sd import backend

# From measurements on two cores, on batches of 1 to 32.
_SMALL_MAP = 64
_FEW_ROWS, _MOST_ROWS = 256, 1024
_LEAST_CHANNELS = 256


def pays(inputs, kernel, strides, padding):
    """Return whether `convolve` takes these arguments and is the faster way."""
    is_slow = keras.backend.backend() == "jax" and backend.compiles_for_processor(inputs)
    size, is_dense = kernel.shape[0], strides == (1, 1)
    if not is_slow or inputs.dtype != "float32":
        return False
    if padding == "same" and not (is_dense and size % 2):
        return False
    if size == 1 and is_dense:
        return True
    batch, *lengths, channels = inputs.shape
    if padding == "valid":
        lengths = [(length - size) // stride + 1 for length, stride in zip(lengths, strides, strict=True)]
    positions = math.prod(lengths)
    rows = batch * positions
    is_small = rows <= _FEW_ROWS or (positions <= _SMALL_MAP and rows <= _MOST_ROWS)
    return is_small and channels >= _LEAST_CHANNELS


def convolve(inputs, kernel, strides, padding):
    """Return the convolution of inputs `(n, h, w, c)` with a kernel `(size, size, c, k)`: `(n, h', w', k)`.

    Args:
        strides: of rows and columns.
        padding: "valid", or "same" for strides of 1 and an odd size.
    """
    size, _, channels, outputs = kernel.shape
    if padding == "same" and size > 1:
        edge = (size // 2, size // 2)
        inputs = ops.pad(inputs, ((0, 0), edge, edge, (0, 0)))
    ends = [length - size + 1 for length in inputs.shape[1:3]]
    windows = [
        inputs[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row in range(size)
        for column in range(size)
    ]
    windows = ops.concatenate(windows, axis=-1)
    products = ops.matmul(
        ops.reshape(windows, (-1, size * size * channels)), ops.reshape(kernel, (-1, outputs))
    )
    return ops.reshape(products, (*windows.shape[:3], outputs))
