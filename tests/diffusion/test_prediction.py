"""The algebra of noise, velocity and sample predictions, and the loss weights over them."""

import numpy as np
import pytest

from keras_sd.diffusion import prediction

KINDS = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal_rate", [0.1, 0.6, 0.99])
def test_the_right_answer_gives_back_sample_and_noise(kind, signal_rate):
    sample, noise = np.random.default_rng(0).standard_normal((2, 3, 4))
    noise_rate = np.sqrt(1 - signal_rate**2)
    noisy = prediction.add_noise(sample, noise, signal_rate, noise_rate)
    answer = prediction.target(kind, sample, noise, signal_rate, noise_rate)
    found = prediction.to_sample_and_noise(kind, answer, noisy, signal_rate, noise_rate)
    np.testing.assert_allclose(found, (sample, noise), atol=1e-12)


def test_velocity_is_defined_where_nothing_but_noise_is_left():
    sample, noise = np.random.default_rng(0).standard_normal((2, 3, 4))
    answer = prediction.target("v_prediction", sample, noise, 0.0, 1.0)
    found = prediction.to_sample_and_noise("v_prediction", answer, noise, 0.0, 1.0)
    np.testing.assert_allclose(found, (sample, noise), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_the_sample_alike_for_every_kind(kind):
    """An error of the sample by 1 costs min(SNR, gamma), whatever it was predicted as."""
    ratio = np.array([0.01, 1.0, 4.9, 5.1, 100.0])
    noise_rate = np.sqrt(1 / (1 + ratio))
    signal_rate = np.sqrt(ratio / (1 + ratio))
    noise, noisy = 0.3, 0.7

    def answer(sample):
        noise = (noisy - signal_rate * sample) / noise_rate
        return prediction.target(kind, sample, noise, signal_rate, noise_rate)

    squared_error = np.square(answer(noise + 1.0) - answer(noise))
    weight = prediction.min_snr_weight(kind, ratio, gamma=5.0)
    np.testing.assert_allclose(weight * squared_error, np.minimum(ratio, 5.0), rtol=1e-12)
