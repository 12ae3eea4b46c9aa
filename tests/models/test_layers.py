"""Layers and their gradients against float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sd.models.layers import GroupNormalization, LayerNormalization


def normalized(inputs, gamma, beta, groups, silu):
    """Group normalisation of `(n, height, width, c)`, or without groups layer normalisation, in float64."""
    n, height, width, channels = inputs.shape
    grouped = inputs.reshape((n, height * width, groups, -1) if groups else (n, height, width, channels))
    axes = (1, 3) if groups else 3
    centred = grouped - grouped.mean(axes, keepdims=True)
    normal = centred / np.sqrt(grouped.var(axes, keepdims=True) + 1e-5)
    outputs = normal.reshape(inputs.shape) * gamma + beta
    return outputs / (1 + np.exp(-outputs)) if silu else outputs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_normalization_is_exact_far_from_zero(mean, dtype):
    """Sums of squares alone would leave little of a variance of 1 beside a mean of 300."""
    generator = np.random.default_rng(0)
    inputs = (mean + generator.standard_normal((2, 16, 16, 12))).astype(dtype)
    expected = normalized(inputs.astype("float64"), np.ones(12), np.zeros(12), groups=4, silu=False)
    outputs = keras.ops.convert_to_numpy(GroupNormalization(12, groups=4, dtype=dtype)(inputs))
    tolerance = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("groups, silu", [(4, False), (4, True), (None, False)])
def test_gradients_of_normalization_are_those_of_differences(groups, silu, dtype):
    generator = np.random.default_rng(0)
    # In float64, and representable in half precision.
    inputs = (2 + generator.standard_normal((2, 5, 3, 12))).astype("float16").astype("float64")
    gamma, beta, weights = 1 + generator.random(12), generator.random(12), generator.random(inputs.shape)
    layer = (
        GroupNormalization(12, groups, silu=silu, dtype=dtype)
        if groups
        else LayerNormalization(12, dtype=dtype)
    )
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec((None, *inputs.shape[1:]), dtype)])
    def gradients(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs)
            loss = tf.reduce_sum(tf.cast(outputs, "float32") * weights.astype("float32"))
        return outputs, tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])

    outputs, found = gradients(tf.cast(inputs, dtype))
    tolerance = {"float32": 1e-5, "float16": 5e-3}[dtype]
    arguments = [inputs, gamma, beta]
    np.testing.assert_allclose(outputs, normalized(*arguments, groups, silu), atol=tolerance)
    for number, gradient in enumerate(found):
        gradient = gradient.numpy().astype("float64")
        for direction in (gradient, generator.standard_normal(gradient.shape)):
            ahead, behind = (
                [value + step * direction if i == number else value for i, value in enumerate(arguments)]
                for step in (1e-5, -1e-5)
            )
            rise = ((normalized(*ahead, groups, silu) - normalized(*behind, groups, silu)) * weights).sum()
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert scale > 1e-2
            assert abs(rise / 2e-5 - (gradient * direction).sum()) < tolerance * scale
