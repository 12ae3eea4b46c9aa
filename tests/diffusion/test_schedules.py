"""Noise schedules against diffusers' and against their definitions."""

import numpy as np
import pytest

from keras_sd.config import ConfigError
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from tests.reference import run_reference

CONFIGS = {
    "scaled_linear": {},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_terminal_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}

REFERENCE = """
from diffusers import DDIMScheduler
for name, config in CONFIGS.items():
    outputs[name] = DDIMScheduler(**config).alphas_cumprod
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    full = {name: SchedulerConfig(**values).to_dict() for name, values in CONFIGS.items()}
    public = {n: {k: v for k, v in c.items() if not k.startswith("_")} for n, c in full.items()}
    return run_reference(f"CONFIGS = {public!r}\n{REFERENCE}", {}, tmp_path_factory.mktemp("schedules"))


@pytest.mark.parametrize("name", CONFIGS)
def test_rates_are_those_of_diffusers(name, reference):
    schedule = NoiseSchedule(SchedulerConfig(**CONFIGS[name]))
    # diffusers multiplies a thousand factors in float32.
    np.testing.assert_allclose(schedule.alphas_cumprod, reference[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_squared_rates_add_to_one(name):
    schedule = NoiseSchedule(SchedulerConfig(**CONFIGS[name]))
    np.testing.assert_allclose(schedule.signal_rates**2 + schedule.noise_rates**2, 1, atol=1e-6)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)


def test_stable_diffusion_has_its_known_middle():
    """Cumulative alpha at t=500 is 0.276; schedules with other betas are far off."""
    np.testing.assert_allclose(NoiseSchedule(SchedulerConfig()).alphas_cumprod[500], 0.2763, atol=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise():
    schedule = NoiseSchedule(SchedulerConfig(rescale_betas_zero_snr=True))
    assert schedule.signal_rates[-1] == 0 and schedule.noise_rates[-1] == 1


def test_unknown_settings_are_refused():
    with pytest.raises(UserError, match="beta_schedule 'sigmoid'"):
        NoiseSchedule(SchedulerConfig(beta_schedule="sigmoid"))
    with pytest.raises(ConfigError, match="prediction_type 'flow'"):
        SchedulerConfig(prediction_type="flow")


@pytest.mark.parametrize("class_name", ["PNDMScheduler", "EulerDiscreteScheduler", None])
@pytest.mark.parametrize("has_betas", [False, True])
def test_schedule_with_zero_terminal_snr_is_written_and_read(class_name, has_betas):
    """A class without the option, or no file, becomes DDIM; the betas stay those of the model."""
    betas = np.linspace(0.001, 0.02, 1000).tolist()
    values = {"prediction_type": "v_prediction", **({"trained_betas": betas} if has_betas else {})}
    config = SchedulerConfig.from_dict(values | ({"_class_name": class_name} if class_name else {}))
    changed = config.with_zero_terminal_snr()
    written = changed.to_dict()
    expected = class_name if class_name == "EulerDiscreteScheduler" else "DDIMScheduler"
    assert written["_class_name"] == expected and written["timestep_spacing"] == "trailing"
    again, before = NoiseSchedule(SchedulerConfig.from_dict(written)), NoiseSchedule(config)
    assert again.signal_rates[-1] == 0 and again.signal_rates[0] == before.signal_rates[0]
    np.testing.assert_array_equal(again.signal_rates, NoiseSchedule(changed).signal_rates)
    rates = before.signal_rates.astype("float64")
    np.testing.assert_allclose(
        again.signal_rates, (rates - rates[-1]) * rates[0] / (rates[0] - rates[-1]), atol=1e-6
    )
