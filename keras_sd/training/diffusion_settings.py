"""How training draws noise and timesteps, and how it weights the losses of timesteps."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_sd.diffusion import prediction
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
    """Settings of the noise, the timesteps and the loss that all methods for diffusion models share.

    Attributes:
        snr_gamma: gamma of min-SNR weighting (Hang et al., 2023), usually 5; None for equal weights.
        debiased_estimation: whether losses are weighted by 1 / sqrt(SNR) (Yu et al., 2023), with an SNR of at
            most 1,000; for velocity by 1 / (SNR + 1).
        noise_offset: scale of additional noise that is constant over a channel, which lets a model learn to
            change the brightness of whole images; usually 0.1.
        input_perturbation: scale of additional noise on the input that is not part of the target (Ning et
            al., 2023); usually 0.1.
        multires_noise_iterations: number of coarser and coarser noises that are added up, 2 or more; usually
            6 to 10. 0 draws white noise.
        multires_noise_discount: weight of each noise as a multiple of the finer one's, above 0, up to 1; None
            is 0.3.
        timestep_sampling: "uniform", or "log_normal": the logarithm of sigma, which is noise rate / signal
            rate, is normal (Karras et al., 2022, table 1), and the nearest timestep is taken.
        log_sigma_mean, log_sigma_std: of that normal distribution; None is -1.2 and 1.2, as in the paper.

    Raises:
        UserError: a value is out of range, or has no effect.
    """

    snr_gamma: float | None = None
    debiased_estimation: bool = False
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float | None = None
    timestep_sampling: str = "uniform"
    log_sigma_mean: float | None = None
    log_sigma_std: float | None = None

    def __post_init__(self) -> None:
        for name, (fits, range_) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and fits(value)):
                raise UserError(f"{name} {value}: out of range; use {range_}")
        if self.timestep_sampling not in ("uniform", "log_normal"):
            raise UserError(
                f"timestep_sampling {self.timestep_sampling!r}: unknown; use uniform or log_normal"
            )
        if self.snr_gamma is not None and self.debiased_estimation:
            raise UserError(
                f"snr_gamma {self.snr_gamma}: `debiased_estimation=True` weights losses too; leave one out"
            )
        is_log_normal = self.timestep_sampling == "log_normal"
        for name, has_effect, other in (
            ("multires_noise_discount", self.multires_noise_iterations, "multires_noise_iterations"),
            ("log_sigma_mean", is_log_normal, "timestep_sampling='log_normal'"),
            ("log_sigma_std", is_log_normal, "timestep_sampling='log_normal'"),
        ):
            value = getattr(self, name)
            if value is not None and not has_effect:
                raise UserError(f"{name} {value}: has no effect without `{other}`; leave it out")

    def identity(self) -> dict[str, Any]:
        """Return the values that a run shares with the one that resumes it, if they are not defaults."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        # The name under which older checkpoints have it.
        return {"min_snr_gamma": values.pop("snr_gamma", None), **values}

    def weights(self, schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
        """Return the weight of each timestep's squared error, float32 `(T,)`.

        Raises:
            UserError: the network predicts the sample, and losses are debiased.
        """
        with np.errstate(divide="ignore"):
            ratio = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
        if self.snr_gamma is not None:
            weights = prediction.min_snr_weight(schedule.prediction_type, ratio, self.snr_gamma)
        elif self.debiased_estimation:
            weights = prediction.debiased_weight(schedule.prediction_type, ratio)
        else:
            weights = np.ones_like(ratio)
        return weights.astype("float32")


_NOT_NEGATIVE = (lambda value: value >= 0), "0 or more"
_RANGES = {
    "snr_gamma": ((lambda value: value > 0), "more than 0, such as 5"),
    "noise_offset": _NOT_NEGATIVE,
    "input_perturbation": _NOT_NEGATIVE,
    # The first of the added noises is white as well.
    "multires_noise_iterations": ((lambda value: value == 0 or value >= 2), "2 or more, or 0 for none"),
    "multires_noise_discount": ((lambda value: 0 < value <= 1), "a number above 0, up to 1"),
    "log_sigma_mean": ((lambda value: True), "a number"),
    "log_sigma_std": ((lambda value: value > 0), "more than 0"),
}
_DISCOUNT, _LOG_SIGMA = 0.3, (-1.2, 1.2)


class NoiseDrawing:
    """Draws the noise and the timestep of training examples.

    Attributes:
        num_timesteps: number of timesteps to draw from.

    Args:
        settings: `DiffusionSettings`.
        schedule: `NoiseSchedule` of the model; or the number of timesteps to draw from uniformly.
    """

    def __init__(self, settings: DiffusionSettings, schedule: NoiseSchedule | int) -> None:
        self.settings = settings
        self.num_timesteps = schedule if isinstance(schedule, int) else schedule.num_train_timesteps
        if settings.timestep_sampling == "log_normal":
            if isinstance(schedule, int):
                raise UserError("timestep_sampling log_normal: needs a noise schedule; use 'uniform'")
            with np.errstate(divide="ignore"):  # the last timestep may be noise alone
                log_sigmas = np.log(np.sqrt(1.0 / schedule.alphas_cumprod - 1.0))
            # Between two timesteps the nearer one is taken.
            self._limits = (log_sigmas[:-1] + log_sigmas[1:]) / 2

    def timestep(self, generator: np.random.Generator) -> np.int32:
        """Draw a timestep, from 0 to the number of timesteps, exclusive."""
        if self.settings.timestep_sampling == "uniform":
            return np.int32(generator.integers(self.num_timesteps))
        return self._log_normal(generator.standard_normal())

    def timestep_at(self, quantile: float) -> np.int32:
        """Return the timestep at a quantile, 0 to just below 1, of the distribution of timesteps."""
        if self.settings.timestep_sampling == "uniform":
            return np.int32(quantile * self.num_timesteps)
        from scipy.special import ndtri  # here, as its import takes a sixth of a second

        return self._log_normal(ndtri(quantile))

    def _log_normal(self, normal):
        """Return the timestep of a value of the standard normal distribution."""
        default_mean, default_std = _LOG_SIGMA
        mean, std = self.settings.log_sigma_mean, self.settings.log_sigma_std
        mean, std = default_mean if mean is None else mean, default_std if std is None else std
        return np.int32(np.searchsorted(self._limits, mean + std * normal))

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
        """Draw an example's `noise`, its `timesteps`, and its `input_noise` where the input is perturbed.

        Args:
            shape: height, width and channels of the noise, float32.
        """
        settings = self.settings

        def normal(*shape):
            return generator.standard_normal(shape, dtype="float32")

        noise, timestep = normal(*shape), self.timestep(generator)
        if settings.noise_offset:
            noise += np.float32(settings.noise_offset) * normal(1, 1, shape[-1])
        if settings.multires_noise_iterations:
            noise = self._with_coarser_noise(noise, generator)
        drawn = {"noise": noise, "timesteps": timestep}
        if settings.input_perturbation:
            drawn["input_noise"] = noise + np.float32(settings.input_perturbation) * normal(*shape)
        return drawn

    def _with_coarser_noise(self, noise, generator):
        """Return noise with coarser ones added, of standard deviation 1 (Whitaker, 2023, "pyramid noise")."""
        settings, (height, width, channels) = self.settings, noise.shape
        discount = settings.multires_noise_discount
        discount = _DISCOUNT if discount is None else discount
        for number in range(settings.multires_noise_iterations):
            # Between 2 and 4 times as coarse as the last one, and not always at the same places.
            shrinkage = generator.uniform(2.0, 4.0) ** number
            rows, columns = max(1, int(height / shrinkage)), max(1, int(width / shrinkage))
            coarse = generator.standard_normal((rows, columns, channels), dtype="float32")
            noise = noise + np.float32(discount**number) * enlarged(coarse, height, width)
            if rows == 1 or columns == 1:
                break
        return noise / noise.std()


def enlarged(array: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Return an array `(h, w, channels)` enlarged by bilinear interpolation between the centres of pixels."""
    rows, columns = _interpolation(array.shape[0], height), _interpolation(array.shape[1], width)
    return np.einsum("ih,jw,hwc->ijc", rows, columns, array, optimize=True)


def _interpolation(size, larger):
    """Return the weights of bilinear interpolation, float32 `(larger, size)`."""
    places = np.clip((np.arange(larger) + 0.5) * size / larger - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size))).astype("float32")
