"""Classifier-free guidance on a real UNet."""

import keras
import numpy as np
import pytest

from keras_sd.diffusion.guidance import guided_prediction
from keras_sd.models.unet import UNet
from tests import tiny


class CountingUNet(UNet):
    """Remembers the batch size of each call."""

    def call(self, inputs):
        self.batches = [*getattr(self, "batches", []), inputs[0].shape[0]]
        return super().call(inputs)


@pytest.fixture(scope="module")
def unet():
    return tiny.randomize(CountingUNet(tiny.SD1_UNET))


def test_one_doubled_call_extrapolates_from_negative_to_positive(unet):
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 4, 4, 4)).astype("float32")
    context, negative = generator.standard_normal((2, 2, 8, 16)).astype("float32")
    timesteps = np.array([10.0, 900.0], "float32")
    positive = np.asarray(guided_prediction(unet, latents, timesteps, context))
    away = np.asarray(guided_prediction(unet, latents, timesteps, negative))
    assert np.abs(positive - away).max() > 1e-3
    unet.batches = []
    guided = keras.ops.convert_to_numpy(guided_prediction(unet, latents, timesteps, context, negative, 5.0))
    assert list(unet.batches) == [4]
    np.testing.assert_allclose(guided, away + 5 * (positive - away), atol=1e-5)
    for scale, expected in ((1.0, positive), (0.0, away)):
        guided = guided_prediction(unet, latents, timesteps, context, negative, scale)
        np.testing.assert_allclose(guided, expected, atol=1e-6)


def test_an_unconditional_unet_has_nothing_to_be_guided_by():
    unet = tiny.randomize(UNet(tiny.PIXEL_UNET))
    images, timesteps = np.ones((1, 8, 8, 3), "float32"), np.array([5.0], "float32")
    np.testing.assert_array_equal(guided_prediction(unet, images, timesteps), unet([images, timesteps]))
