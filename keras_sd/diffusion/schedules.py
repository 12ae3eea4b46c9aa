"""Noise schedules: the signal rate and the noise rate of each timestep."""

import numpy as np

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.files.json_files import shown


def _betas(config):
    """Return the variance of the noise that each step of the forward process adds, `(T,)` float64."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, "float64")
    if config.beta_schedule == "linear":  # Ho et al., 2020
        return np.linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":  # Rombach et al., 2022: linear in the square root
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal, 2021

        def remaining(time):
            return np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2

        times = np.arange(steps + 1) / steps
        return np.minimum(1 - remaining(times[1:]) / remaining(times[:-1]), 0.999)
    known = "linear, scaled_linear or squaredcos_cap_v2"
    raise UserError(f"beta_schedule {shown(config.beta_schedule)}: unknown; use {known}")


def _with_zero_terminal_snr(signal_rates):
    """Shift and scale signal rates to make the last timestep pure noise (Lin et al., 2023, algorithm 1)."""
    first, last = signal_rates[0], signal_rates[-1]
    return (signal_rates - last) * first / (first - last)


class NoiseSchedule:
    """The forward process: `noisy = signal_rate * sample + noise_rate * noise` at each timestep.

    `signal_rates` and `noise_rates` are float32 `(T,)` with squares that add to 1;
    `alphas_cumprod`, the squared signal rates, is float64.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = SchedulerConfig.checked(config)
        self.num_train_timesteps = config.num_train_timesteps
        self.prediction_type = config.prediction_type
        signal_rates = np.sqrt(np.cumprod(1.0 - _betas(config)))
        if config.rescale_betas_zero_snr:
            signal_rates = _with_zero_terminal_snr(signal_rates)
        self.alphas_cumprod = signal_rates**2
        self.signal_rates = signal_rates.astype("float32")
        self.noise_rates = np.sqrt(1.0 - self.alphas_cumprod).astype("float32")

    def check_learnable(self) -> None:
        """Check that the prediction type can be trained with this schedule.

        Raises:
            UserError: epsilon is predicted with zero terminal SNR. The last timestep then teaches nothing
                about the sample (Lin et al., 2023, section 3.3), and its min-SNR weight is 0 / 0.
        """
        if self.prediction_type == "epsilon" and not self.signal_rates[-1]:
            raise UserError(
                "prediction_type epsilon: cannot be trained with rescale_betas_zero_snr, whose last timestep "
                "is noise alone; train `prediction_type='v_prediction'`, or take rescale_betas_zero_snr out "
                "of scheduler_config.json"
            )
