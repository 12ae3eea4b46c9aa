"""Floating-point operations of a traced program: its matrix multiplications and convolutions.

XLA's own count takes each loop's body once, and leaves out what kernels of other compilers do. This one goes
through the traced program, where all of it is still there, and is the same for every device.
"""

import math
from typing import Any

import numpy as np


def operations_of(jaxpr: Any) -> int:
    """Return the operations of a `jax.core.Jaxpr`, a multiplication and an addition counting as two.

    A loop of unknown length counts once, and of the branches of a condition the largest. A kernel of Pallas
    counts as what its own estimate says.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "pallas_call":
        estimate = parameters["cost_estimate"]
        return 0 if estimate is None else estimate.flops
    if name == "cond":
        return max(map(operations_of, parameters["branches"]))
    times = parameters["length"] if name == "scan" else 1
    return times * sum(operations_of(inner) for inner in _programs_in(parameters))


def _programs_in(parameters):
    for name, value in parameters.items():
        # The rules of gradients are no part of the program.
        if name not in ("fwd_jaxpr_thunk", "bwd") and hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value


def _of_convolution(equation):
    """Return the operations of a convolution without those on padding and on the zeros of dilation."""
    kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    parameters = equation.params
    numbers = parameters["dimension_numbers"]
    pairs = 1
    for axis in range(len(output) - 2):
        pairs *= _positions(
            equation.invars[0].aval.shape[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            output[numbers.out_spec[2 + axis]],
            parameters["window_strides"][axis],
            parameters["padding"][axis][0],
            parameters["lhs_dilation"][axis],
            parameters["rhs_dilation"][axis],
        )
    batch, features = output[numbers.out_spec[0]], output[numbers.out_spec[1]]
    # A batch in groups: each output feature sees the examples of one group.
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * pairs


def _positions(inputs, kernel, outputs, stride, padding, input_dilation, kernel_dilation):
    """Return how many pairs of an output and a kernel position meet an input, along one axis."""
    place = np.arange(outputs)[:, None] * stride + np.arange(kernel) * kernel_dilation - padding
    is_inside = (place >= 0) & (place <= (inputs - 1) * input_dilation) & (place % input_dilation == 0)
    return int(is_inside.sum())
