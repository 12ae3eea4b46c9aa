import numpy as np
import pytest
from skimage.metrics import structural_similarity as skimage_ssim

from keras_sd.errors import UserError
from keras_sd.metrics.reconstruction import (
    ReconstructionFigures,
    edge_energy,
    edge_energy_ratio,
    edge_error,
    peak_signal_to_noise_ratio,
    reconstruction_figures,
    structural_similarity,
)


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


@pytest.fixture(scope="module")
def pairs():
    """Images of different noise, and blurred ones beside them."""
    generator = np.random.default_rng(0)
    smooth = generator.integers(0, 256, (4, 6, 5, 3)).repeat(4, axis=1).repeat(4, axis=2)
    images = np.clip(smooth + generator.normal(0, 20, smooth.shape), 0, 255).astype("uint8")
    blurred = (images.astype("float64") + np.roll(images, 1, axis=1) + np.roll(images, 1, axis=2)) / 3
    return images, np.round(blurred).astype("uint8")


def test_structural_similarity_is_that_of_scikit_image(pairs):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    options |= {"data_range": 255, "channel_axis": -1}
    expected = np.mean([skimage_ssim(one, other, **options) for one, other in zip(*pairs, strict=True)])
    assert structural_similarity(*pairs) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9
    assert structural_similarity(pairs[0], pairs[0]) == 1.0


def test_structural_similarity_needs_a_window():
    images = np.zeros((1, 10, 12, 3), "uint8")
    with pytest.raises(UserError, match="12 x 10 pixels: smaller than its window; give 11 pixels or more"):
        structural_similarity(images, images)


def test_edge_energy_of_a_step_and_of_a_ramp():
    step = np.zeros((1, 4, 8, 3), "uint8")
    step[:, :, 4:] = 80
    # One of eight columns has a difference of 80.
    assert edge_energy(step) == 80**2 / 8
    row = np.array([0, 0, 0, 20, 60, 80, 80, 80], "uint8")
    ramp = np.broadcast_to(row[:, None], step.shape)
    assert edge_energy_ratio(step, ramp) == (20**2 + 40**2 + 20**2) / 80**2
    assert edge_energy(step.swapaxes(1, 2)) == edge_energy(step)


def test_flat_images_do_not_rule_the_ratio(pairs):
    images, blurred = pairs
    flat = np.full_like(images, 9)
    assert edge_energy_ratio(np.concatenate([images, flat]), np.concatenate([blurred, flat])) == (
        pytest.approx(edge_energy_ratio(images, blurred), abs=1e-12)
    )
    assert edge_energy_ratio(flat, flat) == 1.0 and edge_energy_ratio(flat, images) == float("inf")
    # Sets of other numbers and sizes compare by their means.
    assert edge_energy_ratio(images, np.concatenate([images, images])) == pytest.approx(1.0, abs=1e-12)


def test_figures_of_an_evaluation(pairs):
    images, blurred = pairs
    figures = reconstruction_figures(images, blurred)
    expected = {
        "psnr": peak_signal_to_noise_ratio(images, blurred),
        "ssim": structural_similarity(images, blurred),
        "edge_energy": edge_energy(blurred) / edge_energy(images),
    }
    assert figures == pytest.approx(expected, rel=1e-12)
    in_batches = ReconstructionFigures()
    for part in (slice(0, 1), slice(1, None)):
        in_batches.update(images[part], blurred[part])
    assert in_batches.result() == pytest.approx(expected, rel=1e-12)
    assert 0.2 < figures["edge_energy"] < 0.8
    assert reconstruction_figures(images[:, :8], blurred[:, :8]).keys() == {"psnr", "edge_energy"}


def test_edge_error_of_a_lost_edge():
    step = np.zeros((1, 2, 4, 3), "uint8")
    step[:, :, 2:] = 60
    # A third of the horizontal differences is wrong by 60, no vertical one.
    assert edge_error(step, np.zeros_like(step)) == pytest.approx(10)
