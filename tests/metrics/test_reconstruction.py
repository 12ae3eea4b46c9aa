import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio


def test_constant_offset_has_a_closed_form():
    images = np.full((3, 4, 5, 3), 100, "uint8")
    # An error of e levels everywhere has MSE e²: 20 log10(255 / e) dB.
    expected = 20 * np.log10(255 / 10)
    assert peak_signal_to_noise_ratio(images, images - 10) == pytest.approx(expected, abs=1e-9)


def test_mean_is_over_the_ratios_of_the_images():
    images = np.zeros((2, 4, 4, 3), "uint8")
    reconstructions = images.copy()
    reconstructions[0] += 1
    reconstructions[1, 0, 0, 0] = 255  # one value of 48 wrong by the whole range: MSE 255² / 48
    expected = (20 * np.log10(255) + 10 * np.log10(48)) / 2
    assert peak_signal_to_noise_ratio(images, reconstructions) == pytest.approx(expected, abs=1e-9)


def test_order_of_dark_and_light_does_not_matter():
    # uint8 differences must not wrap round.
    dark, light = np.zeros((1, 2, 2, 3), "uint8"), np.full((1, 2, 2, 3), 255, "uint8")
    assert peak_signal_to_noise_ratio(dark, light) == peak_signal_to_noise_ratio(light, dark) == 0.0


def test_exact_reconstruction_is_infinite():
    images = np.ones((1, 2, 2, 3), "uint8")
    assert peak_signal_to_noise_ratio(images, images) == float("inf")


@pytest.mark.parametrize(
    "images, reconstructions",
    [
        (np.zeros((2, 4, 4, 3), "float32"), np.zeros((2, 4, 4, 3), "uint8")),
        (np.zeros((2, 4, 4, 3), "uint8"), np.zeros((3, 4, 4, 3), "uint8")),
        (np.zeros((0, 4, 4, 3), "uint8"), np.zeros((0, 4, 4, 3), "uint8")),
    ],
)
def test_unfit_images_are_refused(images, reconstructions):
    with pytest.raises(UserError):
        peak_signal_to_noise_ratio(images, reconstructions)
