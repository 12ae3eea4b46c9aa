"""Precision policies: what they set, and that they end."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.layers import GroupNormalization
from keras_sd.models.precision import POLICIES, ComputedInFloat32, dtype_policy
from tests import tiny


@pytest.mark.parametrize("name", POLICIES)
def test_models_are_made_in_the_policy_and_the_old_one_comes_back(name):
    before = keras.config.dtype_policy()
    with pytest.raises(RuntimeError), dtype_policy(name):
        layer = GroupNormalization(8, 4)
        raise RuntimeError
    assert keras.config.dtype_policy() == before
    assert layer.compute_dtype == name.removeprefix("mixed_")
    assert layer.gamma.dtype == ("float32" if name.startswith("mixed") else name)


@pytest.mark.parametrize("name", ["float8", "int8", None])
def test_unknown_names(name):
    with pytest.raises(UserError, match=r"^dtype .*: unknown; use float32, float16"):
        with dtype_policy(name):
            pass


def test_half_precision_weights_in_a_float32_computation():
    with dtype_policy(ComputedInFloat32("float16")):
        layer = keras.layers.Dense(1, kernel_initializer="ones")
    outputs = layer(np.full((1, 8), 60000.0, "float32"))
    assert layer.kernel.dtype == "float16" and ops.convert_to_numpy(outputs)[0, 0] == 480000.0


def test_moments_are_those_of_float32():
    inputs = np.random.default_rng(0).uniform(50000, 60000, (2, 4, 6, 8)).astype("float16")
    with dtype_policy("float16"):
        outputs = ops.convert_to_numpy(GroupNormalization(8, 4)(inputs))
    groups = inputs.astype("float64").reshape(2, 24, 4, 2).transpose(0, 2, 1, 3).reshape(2, 4, 48)
    expected = (groups - groups.mean(-1, keepdims=True)) / groups.std(-1, keepdims=True)
    expected = expected.reshape(2, 4, 24, 2).transpose(0, 2, 1, 3).reshape(2, 4, 6, 8)
    np.testing.assert_allclose(outputs, expected, atol=2e-3)


@pytest.mark.parametrize(("policy", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_image_encoder_in_half_precision_is_near(policy, tolerance):
    exact = tiny.randomize(ImageEncoder(tiny.IMAGE_ENCODER), scale=0.2)
    with dtype_policy(policy):
        model = tiny.randomize(ImageEncoder(tiny.IMAGE_ENCODER), scale=0.2)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
    for function in ("__call__", "features"):
        outputs, expected = (
            getattr(model, function)(images),
            ops.convert_to_numpy(getattr(exact, function)(images)),
        )
        assert outputs.dtype == "float32"
        assert 0 < np.abs(ops.convert_to_numpy(outputs) - expected).max() / expected.std() < tolerance
