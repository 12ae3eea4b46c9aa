"""Layers against float64."""

import keras
import numpy as np
import pytest

from keras_sd.models.layers import GroupNormalization


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_normalization_is_exact_far_from_zero(mean, dtype):
    """Sums of squares alone would leave little of a variance of 1 beside a mean of 300."""
    generator = np.random.default_rng(0)
    inputs = (mean + generator.standard_normal((2, 16, 16, 12))).astype(dtype)
    grouped = inputs.astype("float64").reshape(2, -1, 4, 3)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    outputs = keras.ops.convert_to_numpy(GroupNormalization(12, groups=4, dtype=dtype)(inputs))
    tolerance = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(outputs, expected.reshape(inputs.shape), rtol=0, atol=tolerance)
