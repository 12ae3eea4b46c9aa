"""Conversion between NumPy arrays and the tensors and variables of the backend."""

import contextlib
import functools
import math

import keras
import numpy as np

from keras_sd.backend import compat, planning

ALIGNMENT = 64
"""The alignment in bytes that TensorFlow's kernels require of memory that is not their own."""


def is_split(variable):
    """Return whether this process has no more than a part of a variable, and other processes the rest.

    While a process plans, no variable has values.
    """
    if planning.plan() is not None:
        return False
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.backend() == "tensorflow" or value.is_fully_addressable or value.is_fully_replicated:
        return False
    return sum(shard.data.size for shard in _own_shards(value)) < value.size


def to_numpy(variable):
    """Return a variable or tensor as a NumPy array.

    If its shards are in several processes, all of them have to call this: each gets the whole array. While a
    process plans, a variable has zeros.
    """
    if planning.plan() is not None and isinstance(variable, keras.Variable):
        return np.broadcast_to(np.zeros((), variable.dtype), variable.shape)
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.backend() == "tensorflow" or value.is_fully_addressable or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    if is_split(variable):
        return compat.gathered(value, tiled=True)
    whole = np.empty(value.shape, value.dtype)
    for shard in _own_shards(value):
        whole[shard.index] = shard.data
    return whole


def own_slices(variable):
    """Return what this process has to save of a variable that is split among processes.

    Returns:
        A list of (start along each axis, NumPy array); those of all processes make the whole.
    """
    shards = keras.ops.convert_to_tensor(variable).addressable_shards
    return [
        (tuple(part.start or 0 for part in shard.index), np.asarray(shard.data))
        for shard in shards
        if shard.replica_id == 0
    ]


def _own_shards(value):
    """Return the shards of a JAX array in this process, one of each part."""
    return list({str(shard.index): shard for shard in value.addressable_shards}.values())


def with_values_read(variables, compute):
    """Return `compute`, a function without arguments, with the values of all variables that it uses read now.

    On TensorFlow, for the branch of a condition: XLA copies a variable that is read in a branch, by an
    operation that StableHLO has no portable form of.
    """
    if keras.backend.backend() == "jax":
        return compute
    import tensorflow as tf

    state = [(variable, tf.convert_to_tensor(compat.current_value(variable))) for variable in variables]

    def computing():
        with keras.StatelessScope(state):
            return compute()

    return computing


@contextlib.contextmanager
def whole_on_host(variables, keep):
    """Inside the block, have variables whose shards are in several processes in the host's memory.

    They are gathered one after the other, so no device holds more than one whole.

    Args:
        variables: Keras variables; all processes have to name the same.
        keep: whether this process needs them.
    """
    with contextlib.ExitStack() as stack:
        for variable in variables:
            if is_split(variable):
                whole = to_numpy(variable)
                if keep:
                    stack.enter_context(compat.host_value(variable, whole))
        yield


def aligned_size(shape, dtype):
    """Return the bytes that an array takes in memory of `aligned_arrays`."""
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


def aligned_arrays(memory, shapes, dtypes):
    """Return arrays one after the other in memory, each fit for `to_tensor`.

    Args:
        memory: an array of bytes that begins at a multiple of `ALIGNMENT`, of the arrays' `aligned_size`.
    """
    arrays, start = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        stop = start + math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(memory[start:stop].view(dtype).reshape(shape))
        start += aligned_size(shape, dtype)
    return arrays


def aligned_memory(size):
    """Return an array of bytes, not initialised, that begins at a multiple of `ALIGNMENT`."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def copy_values(array, target):
    """Copy a NumPy array of any memory layout and type into a contiguous one of the same shape."""
    # 64 columns at a time stay in the processor's cache, which makes it two to three times as fast.
    is_reordered = not array.flags.c_contiguous
    parts = (
        [np.s_[..., start : start + 64] for start in range(0, target.shape[-1], 64)]
        if is_reordered
        else [...]
    )
    with np.errstate(over="ignore"):  # callers check for infinity
        for part in parts:
            np.copyto(target[part], array[part], casting="unsafe")


def copies(variables):
    """Return the values of Keras variables in memory of their own, which another program may be given."""
    values = [compat.current_value(variable) for variable in variables]
    if planning.plan() is not None:
        return values
    if keras.backend.backend() == "jax":
        return _copied_by_jax()(values)
    return [keras.ops.copy(value) for value in values]


@functools.cache
def _copied_by_jax():
    """Return one program for all values: JAX would compile a copy for each of a hundred shapes."""
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda values: [jnp.copy(value) for value in values])


def to_tensor(array):
    """Return a tensor of an array, on the same memory if the backend allows it and the array is aligned.

    Those of `aligned_arrays` are. Nothing else may write to the array afterwards.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.device_put(array, may_alias=True)
    # TensorFlow aborts the process when it computes with shared memory that is not aligned.
    if array.dtype.kind == "f" and array.size and array.ctypes.data % ALIGNMENT == 0:
        return compat.shared_tensor(array)
    return keras.ops.convert_to_tensor(array)
