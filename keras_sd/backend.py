"""All that depends on the Keras backend."""

import keras
import numpy as np

# What TensorFlow's kernels take for granted of memory that is not their own.
_ALIGNMENT = 64


def jit(function, variables=(), jit_compile=True):
    """Compiles a pure function of tensors by XLA; it is traced once for each set of input shapes.

    Args:
        function: takes and returns nests of tensors (or NumPy arrays); None stands for itself.
        variables: the Keras variables that it reads. Their values are inputs of the program, not
            constants in it: an assignment is seen by the next call and compiles nothing.
        jit_compile: False leaves XLA out on TensorFlow; JAX always compiles by it.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Variables are captured by reference.
        return tf.function(function, jit_compile=jit_compile, autograph=False)

    import jax

    variables = list(variables)

    @jax.jit
    def program(values, *inputs):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*inputs)

    def call(*inputs):
        return program([variable.value for variable in variables], *inputs)

    return call


def aligned_copy(array, axes, dtype):
    """A contiguous copy of a NumPy array with its axes in another order, fit for `to_tensor`."""
    transposed, dtype = array.transpose(axes), np.dtype(dtype)
    memory = np.empty(transposed.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + transposed.size * dtype.itemsize].view(dtype).reshape(transposed.shape)
    with np.errstate(over="ignore"):  # infinity, which whoever wants finite numbers will find
        np.copyto(copy, transposed, casting="unsafe")
    return copy


def to_tensor(copy):
    """A tensor of what `aligned_copy` gave, on the same memory where the backend allows it."""
    if keras.backend.backend() == "tensorflow" and copy.dtype.kind == "f" and copy.size:
        import tensorflow as tf

        return tf.experimental.dlpack.from_dlpack(copy.__dlpack__())
    return keras.ops.convert_to_tensor(copy)
