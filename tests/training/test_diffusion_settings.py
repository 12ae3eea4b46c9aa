"""Noise, timesteps and loss weights of training, against torch and against their distributions."""

import math

import numpy as np
import pytest

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing, enlarged
from tests.reference import run_reference

SCHEDULE = NoiseSchedule(SchedulerConfig())
SHAPE = (24, 40, 4)

ENLARGED = """
    from torch.nn.functional import interpolate

    for name, image in inputs.items():
        height, width = map(int, name.split())
        planes = image.permute(2, 0, 1)[None]
        planes = interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
        outputs[name] = planes[0].permute(1, 2, 0).contiguous()
"""


def test_coarse_noise_is_enlarged_as_in_torch(tmp_path):
    sizes = {(13, 9): (5, 4), (24, 40): (9, 17), (8, 8): (1, 1), (7, 16): (7, 1)}
    generator = np.random.default_rng(0)
    images = {
        f"{height} {width}": generator.standard_normal((*small, 4)).astype("float32")
        for (height, width), small in sizes.items()
    }
    expected = run_reference(ENLARGED, images, tmp_path)
    for name, image in images.items():
        np.testing.assert_allclose(enlarged(image, *map(int, name.split())), expected[name], atol=1e-5)


def noises(count=200, **settings):
    drawing = NoiseDrawing(DiffusionSettings(**settings), SCHEDULE)
    return np.stack([drawing.draw(np.random.default_rng(seed), SHAPE)["noise"] for seed in range(count)])


def test_white_noise_by_default():
    expected = np.random.default_rng(0).standard_normal(SHAPE, dtype="float32")
    np.testing.assert_array_equal(noises(1)[0], expected)


def test_noise_offset_moves_the_mean_of_a_channel():
    means = noises(noise_offset=0.5).mean(axis=(1, 2))
    assert abs(means.std() - math.hypot(0.5, 1 / math.sqrt(24 * 40))) < 0.05


def test_multiresolution_noise_is_correlated_over_long_distances():
    white, pyramid = noises(), noises(multires_noise_iterations=8, multires_noise_discount=0.6)
    np.testing.assert_allclose(pyramid.std(axis=(1, 2, 3)), 1, rtol=1e-4)

    def correlation(noise, distance):
        return (noise[:, :, distance:] * noise[:, :, :-distance]).mean()

    assert abs(correlation(white, 1)) < 0.01 and abs(correlation(white, 6)) < 0.01
    near, far = correlation(pyramid, 1), correlation(pyramid, 6)
    assert near > far > 0.02
    weaker = noises(multires_noise_iterations=8)  # the discount is 0.3 by default
    assert 0.02 < correlation(weaker, 1) < near


@pytest.mark.parametrize("zero_snr", [False, True])
def test_log_normal_timesteps(zero_snr):
    schedule = NoiseSchedule(SchedulerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr))
    settings = DiffusionSettings(timestep_sampling="log_normal", log_sigma_mean=-0.5, log_sigma_std=0.8)
    drawing, generator = NoiseDrawing(settings, schedule), np.random.default_rng(0)
    timesteps = np.array([drawing.timestep(generator) for _ in range(4000)])
    assert timesteps.min() >= 0 and timesteps.max() < 1000
    log_sigmas = np.log(schedule.noise_rates / schedule.signal_rates.clip(1e-9))[timesteps]
    assert abs(np.median(log_sigmas) + 0.5) < 0.05
    low, high = np.quantile(log_sigmas, (0.1587, 0.8413))
    assert abs((high - low) / 2 - 0.8) < 0.05


def test_far_values_become_the_first_and_the_last_timestep():
    for mean, timestep in ((-50.0, 0), (50.0, 999)):
        settings = DiffusionSettings(timestep_sampling="log_normal", log_sigma_mean=mean)
        assert NoiseDrawing(settings, SCHEDULE).timestep(np.random.default_rng(0)) == timestep


def test_a_run_is_identified_by_what_differs_from_the_defaults():
    assert DiffusionSettings().identity() == {"min_snr_gamma": None}
    settings = DiffusionSettings(5.0, noise_offset=0.1)
    assert settings.identity() == {"min_snr_gamma": 5.0, "noise_offset": 0.1}


@pytest.mark.parametrize(
    "values, line",
    [
        ({"snr_gamma": 0.0}, "snr_gamma 0.0: out of range; use more than 0, such as 5"),
        ({"snr_gamma": math.nan}, "snr_gamma nan: out of range; use "),
        ({"noise_offset": -0.1}, "noise_offset -0.1: out of range; use 0 or more"),
        ({"multires_noise_iterations": -1}, "multires_noise_iterations -1: out of range; use 2 or more"),
        ({"multires_noise_iterations": 1}, "multires_noise_iterations 1: out of range; use 2 or more, or 0"),
        (
            {"multires_noise_iterations": 4, "multires_noise_discount": 0.0},
            "multires_noise_discount 0.0: out of range; use a number above 0, up to 1",
        ),
        (
            {"multires_noise_discount": 0.5},
            "multires_noise_discount 0.5: has no effect without `multires_noise_iterations`; leave it out",
        ),
        (
            {"multires_noise_iterations": 4, "multires_noise_discount": 1.5},
            "multires_noise_discount 1.5: out of range; use a number above 0, up to 1",
        ),
        ({"log_sigma_std": 1.0}, "log_sigma_std 1.0: has no effect without `timestep_sampling='log_normal'`"),
        (
            {"timestep_sampling": "log_normal", "log_sigma_std": 0.0},
            "log_sigma_std 0.0: out of range; use more than 0",
        ),
        ({"timestep_sampling": "sigmoid"}, "timestep_sampling 'sigmoid': unknown; use uniform or log_normal"),
        (
            {"snr_gamma": 5.0, "debiased_estimation": True},
            "snr_gamma 5.0: `debiased_estimation=True` weights losses too; leave one out",
        ),
    ],
)
def test_bad_values_are_refused(values, line):
    with pytest.raises(UserError) as error:
        DiffusionSettings(**values)
    assert str(error.value).startswith(line)


def test_sample_prediction_has_no_debiased_weight():
    schedule = NoiseSchedule(SchedulerConfig(prediction_type="sample"))
    with pytest.raises(UserError, match="debiased_estimation: is not defined for prediction_type sample"):
        DiffusionSettings(debiased_estimation=True).weights(schedule)
