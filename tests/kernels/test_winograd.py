"""Winograd's convolution against the sum in double precision, and where it is taken."""

import keras
import numpy as np
import pytest

from keras_sd import backend
from keras_sd.kernels import winograd
from keras_sd.models.layers import convolution


def exact(inputs, kernel):
    """The "same" convolution with a 3x3 kernel, in float64."""
    _, height, width, _ = inputs.shape
    padded = np.pad(inputs.astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, row : row + height, column : column + width] @ kernel[row, column].astype("float64")
        for row in range(3)
        for column in range(3)
    )


def example(height, width, channels, outputs):
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((2, height, width, channels), dtype="float32")
    kernel = generator.standard_normal((3, 3, channels, outputs), dtype="float32")
    return inputs, kernel / np.float32(np.sqrt(9 * channels))


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (6, 10, 5, 7), (4, 4, 64, 48)], ids=str)
def test_convolution_is_exact_to_rounding(shape):
    inputs, kernel = example(*shape)
    result = keras.ops.convert_to_numpy(winograd.convolve(inputs, kernel))
    np.testing.assert_allclose(result, exact(inputs, kernel), rtol=0, atol=3e-6)


def test_a_layer_takes_it_under_xla_and_gives_the_same(monkeypatch):
    inputs, kernel = example(128, 128, 160, 160)
    layer = convolution(160, 160)
    layer.kernel.assign(kernel)
    layer.bias.assign(np.arange(160))
    taken = []

    def recorded(*arguments):
        taken.append(arguments)
        return convolve(*arguments)

    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", recorded)
    outputs = [
        keras.ops.convert_to_numpy(backend.jit(layer, layer.variables, jit_compile)(inputs))
        for jit_compile in (True, False)
    ]
    assert len(taken) == 1
    for output in outputs:
        np.testing.assert_allclose(output, exact(inputs, kernel) + np.arange(160), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((126, 128, 160, 160), "float32"),
        ((129, 128, 160, 160), "float32"),
        ((128, 128, 3, 160), "float32"),
        ((128, 128, 160, 160), "bfloat16"),
    ],
    ids=["small", "odd", "narrow", "half precision"],
)
def test_other_convolutions_are_left_alone(shape, dtype):
    height, width, channels, outputs = shape
    answers = []

    def function(inputs):
        answers.append(
            winograd.is_faster(inputs, keras.KerasTensor((3, 3, channels, outputs)), (1, 1), "same")
        )
        return inputs

    backend.jit(function)(keras.ops.zeros((1, height, width, channels), dtype))
    assert answers == [False]
