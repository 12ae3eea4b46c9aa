"""Initial values: drawn as asked, and the same again after the same seed."""

import random

import numpy as np
import pytest
from keras import ops

from keras_sd.models.initializers import glorot_uniform, normal, uniform
from keras_sd.models.unet import UNet
from tests import tiny


def values(initializer, shape, dtype="float32"):
    return ops.convert_to_numpy(ops.cast(initializer(shape, dtype), "float32"))


def test_distributions():
    drawn = values(normal(0.3), (200, 300))
    assert drawn.std() == pytest.approx(0.3, rel=0.02) and abs(drawn.mean()) < 0.01
    drawn = values(uniform(0.3), (200, 300))
    assert -0.3 <= drawn.min() < -0.299 and 0.299 < drawn.max() <= 0.3
    assert drawn.std() == pytest.approx(0.3 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(30, 50), (3, 3, 30, 50)])
def test_kernels_follow_glorot_and_bengio(shape):
    fans = np.prod(shape[:-2]) * (30 + 50)
    assert values(glorot_uniform, shape).std() == pytest.approx((2 / fans) ** 0.5, rel=0.05)


def test_half_precision():
    assert glorot_uniform((4, 5), "bfloat16").dtype == "bfloat16"
    assert np.isfinite(values(normal(1.0), (4, 5), "float16")).all()


def test_a_seed_fixes_all_weights():
    models = []
    for seed in (1, 1, 2):
        random.seed(seed)
        models.append([ops.convert_to_numpy(variable) for variable in UNet(tiny.SD2_UNET).weights])
    first, again, other = models
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(first, other, strict=True))
    kernels = [array.ravel()[:8] for array in first if array.ndim == 4 and array.any()]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)
