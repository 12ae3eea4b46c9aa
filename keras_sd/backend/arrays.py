"""Conversion between NumPy arrays and the tensors and variables of the backend."""

import keras
import numpy as np

from keras_sd.backend import compat

# The alignment in bytes that TensorFlow's kernels require of memory that is not their own.
_ALIGNMENT = 64


def to_numpy(variable):
    """Return a variable or tensor as a NumPy array; this process must have all of its shards."""
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.backend() == "tensorflow" or value.is_fully_addressable or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    whole = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def aligned_copy(array, axes, dtype):
    """Return a contiguous copy of a NumPy array with its axes in another order, fit for `to_tensor`."""
    transposed, dtype = array.transpose(axes), np.dtype(dtype)
    memory = np.empty(transposed.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + transposed.size * dtype.itemsize].view(dtype).reshape(transposed.shape)
    # 64 columns at a time stay in the processor's cache, which makes it two to three times as fast.
    is_reordered = not transposed.flags.c_contiguous
    parts = (
        [np.s_[..., start : start + 64] for start in range(0, copy.shape[-1], 64)] if is_reordered else [...]
    )
    with np.errstate(over="ignore"):  # callers check for infinity
        for part in parts:
            np.copyto(copy[part], transposed[part], casting="unsafe")
    return copy


def to_tensor(copy):
    """Return a tensor of an array from `aligned_copy`, on the same memory if the backend allows it."""
    if keras.backend.backend() == "tensorflow" and copy.dtype.kind == "f" and copy.size:
        return compat.shared_tensor(copy)
    return keras.ops.convert_to_tensor(copy)
