"""Kernels that are decoded when their turn comes, on a CPU.

XLA for a CPU runs what depends on weights alone at the beginning of a program and holds all the results. For
kernels that are decoded from 8 bits, or from half precision, in which it does not multiply, this is the whole
model in float32, for a call of Stable Diffusion 1.5 some 4 GiB. An optimization barrier and XLA's schedule
for memory do not change it. What stands in a branch of a condition on the inputs waits for them.
"""

import math

from keras import ops

from keras_sd import backend

# A branch takes time to compile. In Stable Diffusion 1.5, kernels of this size hold 93 % of the UNet in 132
# of its 282 layers.
_LARGE = 2**20


def once_inputs_are_there(inputs, compute, variables, strides=(), padding="same"):
    """Return `compute()`, which depends on `inputs` and on weights; NaN where the first input is not finite.

    Args:
        inputs: the tensor to wait for, `(n, ..., channels)`.
        compute: a function without arguments.
        variables: all that `compute` reads, the kernel `(..., channels, outputs)` that is decoded first.
        strides, padding: of the window, if it is a convolution.
    """
    *size, _, outputs = variables[0].shape
    if math.prod(variables[0].shape) < _LARGE or not backend.is_traced_for_processor(inputs):
        return compute()
    first = ops.reshape(inputs, (-1,))[0]
    is_finite = ops.abs(first) < math.inf  # of which the compiler does not know that it always holds

    def undefined():
        steps = [
            slice(0, 1 - rows or None if padding == "valid" else None, step)
            for rows, step in zip(size, strides, strict=True)
        ]
        return ops.repeat(math.nan * inputs[(slice(None), *steps, ..., slice(0, 1))], outputs, axis=-1)

    return ops.cond(is_finite, backend.with_values_read(variables, compute), undefined)
