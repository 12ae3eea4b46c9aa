"""Gradients of convolutions as GEMM against sums in double precision, and where they are taken."""

import numpy as np
import pytest
from keras import ops

from keras_sd import backend
from keras_sd.kernels import gemm_gradients
from tests.programs import run_python


def exact(inputs, kernel, upstream):
    """Both gradients of `sum(convolution * upstream)`, in float64."""
    rows, columns, channels, _ = kernel.shape
    edges = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    padded, upstream = np.pad(inputs.astype("float64"), edges), upstream.astype("float64")
    height, width = inputs.shape[1:3]
    by_inputs, by_kernel = np.zeros_like(padded), np.zeros(kernel.shape)
    for row in range(rows):
        for column in range(columns):
            place = (slice(None), slice(row, row + height), slice(column, column + width))
            by_inputs[place] += upstream @ kernel[row, column].astype("float64").T
            by_kernel[row, column] = np.einsum("nijc,nijk->ck", padded[place], upstream)
    inside = by_inputs[:, rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    return inside.reshape(-1, height, width, channels), by_kernel


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((2, 4, 6), (3, 3)), ((1, 1, 1), (3, 3)), ((2, 3, 5), (1, 1)), ((2, 4, 6), (3, 1)), ((1, 5, 7), (5, 3))],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1], ids=["by the inputs", "by the kernel"])
def test_gradients_are_exact_to_rounding(shape, sizes, place):
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((*shape, 10), dtype="float32")
    kernel = generator.standard_normal((*sizes, 10, 7), dtype="float32") / np.float32(10)
    upstream = generator.standard_normal((*shape, 7), dtype="float32")

    def function(one):
        arguments = [inputs, kernel]
        arguments[place] = one
        outputs = gemm_gradients.convolve(*(ops.convert_to_tensor(argument) for argument in arguments))
        return ops.sum(outputs * upstream)

    _, gradient = backend.value_and_gradient(function, ops.convert_to_tensor([inputs, kernel][place]))
    expected = exact(inputs, kernel, upstream)[place]
    assert gradient.shape == expected.shape
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), expected, rtol=0, atol=1e-5)


SCRIPT = """if True:
    import numpy as np
    from keras import ops
    from keras_sd import backend
    from keras_sd.kernels import gemm_gradients
    from keras_sd.models.layers import convolution
    taken = []
    convolve = gemm_gradients.convolve
    gemm_gradients.convolve = lambda *arguments: taken.append(arguments) or convolve(*arguments)
    for layer, shape, takes in (
        (convolution(8, 64), (1, 8, 8, 8), True),
        (convolution(8, 64), (1, 8, 9, 8), False),
        (convolution(8, 64), (2, 4, 8, 8), True),
        (convolution(8, 64, 2), (1, 4, 4, 8), False),
        (convolution(8, 64, 2, strides=2), (1, 4, 4, 8), False),
    ):
        generator = np.random.default_rng(0)
        inputs = ops.convert_to_tensor(generator.standard_normal(shape, dtype="float32"))
        square_sum = lambda one: ops.sum(ops.square(layer(one)))
        program = backend.jit(lambda one: backend.value_and_gradient(square_sum, one), layer.variables)
        value, gradient = map(ops.convert_to_numpy, program(inputs))
        assert bool(taken) == takes, shape
        taken.clear()
        direction = generator.standard_normal(shape, dtype="float32")
        nearby = [float(square_sum(inputs + step * direction)) for step in (1e-2, -1e-2)]
        slope = (nearby[0] - nearby[1]) / 2e-2
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-3, atol=1e-2)
"""


@pytest.mark.parametrize("name", ["tensorflow", "jax"])
def test_layers_take_them_where_the_kernel_is_large(name):
    run_python(["-c", SCRIPT], name)
