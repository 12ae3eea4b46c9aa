"""Convolution by im2col: one matrix multiplication (GEMM), for small maps on a CPU.

In JAX's XLA, convolutions on maps of 8x8 and less are slower than GEMM; in TensorFlow's XLA they are as fast.
Without XLA, TensorFlow gives convolutions to oneDNN, which brings the kernel into a layout of its own in each
call. Where the kernel is much larger than the map, that takes longer than the convolution.
On larger maps, copying the patches takes the time that GEMM saves.
"""

import math

import keras
from keras import ops

from keras_sd import backend

# JAX: up to 1024 rows of the matrix from maps of up to 8x8, up to 256 rows from any map, and layers from 256
# channels. With 1280 channels on maps of 8x8, GEMM reached 114 to 153 GFLOP/s where convolutions reached 33
# to 52, and their gradients by the inputs 121 in place of 15 (2 cores of a Xeon, docs/results.md). On an EPYC
# the forward pass takes 0.64 of the convolution's processor time with 64 rows, 0.80 with 256, 1.04 with 1024
# and 1.18 with 2048; 0.99 with 256 rows from 16x16 and 1.29 with 1024; at 256 rows 1.00 with 512 channels,
# 1.16 with 256 and 1.46 with 64 (benchmarks/kernels.md, `python tools/bench_kernels.py`).
_SMALL_MAP = 8 * 8
_FEW_ROWS, _MOST_ROWS = 256, 1024
_LEAST_CHANNELS = 256

# TensorFlow without XLA: wide layers up to these rows, others up to 64 rows (benchmarks/kernels.md).
_ONEDNN_ROWS = {"bfloat16": 512, "float32": 2048}
_ONEDNN_FEW_ROWS = 64
_ONEDNN_CHANNELS, _ONEDNN_FEW_CHANNELS = 1280, 512


def is_faster(inputs, kernel, strides, padding):
    """Return whether `convolve` accepts these arguments and is faster than the backend's convolution."""
    sizes, is_dense = tuple(kernel.shape[:2]), strides == (1, 1)
    if padding == "same" and not (is_dense and all(size % 2 for size in sizes)):
        return False
    batch, *lengths, channels = inputs.shape
    if not all(
        isinstance(length, int) for length in lengths
    ):  # they may be unknown while a program is traced
        return False
    if padding == "valid":
        lengths = [
            (length - size) // stride + 1
            for length, size, stride in zip(lengths, sizes, strides, strict=True)
        ]
    positions = math.prod(lengths)
    rows = batch * positions if isinstance(batch, int) else None
    if keras.backend.backend() == "tensorflow":
        return rows is not None and _is_faster_than_onednn(inputs, rows, channels, kernel.shape[-1])
    if inputs.dtype != "float32" or not backend.compiles_for_processor(inputs):
        return False
    if sizes == (1, 1) and is_dense:
        return True
    if rows is None:
        return False
    is_small = rows <= _FEW_ROWS or (positions <= _SMALL_MAP and rows <= _MOST_ROWS)
    return is_small and channels >= _LEAST_CHANNELS


def _is_faster_than_onednn(inputs, rows, channels, outputs):
    if not backend.runs_by_onednn(inputs):
        return False
    most_rows = _ONEDNN_ROWS.get(keras.backend.standardize_dtype(inputs.dtype), 0)
    fewest = min(channels, outputs)
    if fewest < _ONEDNN_CHANNELS:
        most_rows = min(most_rows, _ONEDNN_FEW_ROWS)
    return rows <= most_rows and fewest >= _ONEDNN_FEW_CHANNELS


def convolve(inputs, kernel, strides, padding):
    """Return the convolution of `(n, h, w, c)` with a kernel `(rows, columns, c, k)`: `(n, h', w', k)`.

    Args:
        strides: of rows and columns.
        padding: "valid", or "same" for strides of 1 and odd sizes.
    """
    *sizes, channels, outputs = kernel.shape
    windows = windows_of(inputs, sizes, strides, padding)
    products = ops.matmul(
        ops.reshape(windows, (-1, math.prod(sizes) * channels)), ops.reshape(kernel, (-1, outputs))
    )
    return ops.reshape(products, (-1, *windows.shape[1:3], outputs))


def windows_of(inputs, sizes, strides=(1, 1), padding="same"):
    """Return the windows of `(n, h, w, c)` for a kernel of these sizes: `(n, h', w', rows * columns * c)`.

    Args:
        strides, padding: as in `convolve`.
    """
    if padding == "same" and max(sizes) > 1:
        edges = [(size // 2, size // 2) for size in sizes]
        inputs = ops.pad(inputs, ((0, 0), *edges, (0, 0)))
    ends = [length - size + 1 for length, size in zip(inputs.shape[1:3], sizes, strict=True)]
    windows = [
        inputs[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row in range(sizes[0])
        for column in range(sizes[1])
    ]
    return ops.concatenate(windows, axis=-1)
