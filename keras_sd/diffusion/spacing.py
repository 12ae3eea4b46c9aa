"""Timestep spacing: the timesteps of a sampler, and the noise levels at the start and end of its steps.

`sigma` is the ratio of noise to signal, the time variable of Karras et al. (2022) and of k-diffusion's
samplers. Everything is computed in float64. `options` are those of the sampler's class in diffusers
(`keras_sd.diffusion.scheduler_options`).
"""

from typing import NamedTuple

import numpy as np

from keras_sd.errors import UserError
from keras_sd.files.json_files import shown

# Replaces the infinite sigma of a timestep of pure noise. As in diffusers, the squared signal rate becomes
# the smallest number of half precision.
PURE_NOISE = 2.0**12


class Level(NamedTuple):
    """A noise level: latents are `signal_rate * sample + noise_rate * noise`; the squared rates add to 1."""

    signal_rate: float
    noise_rate: float

    @property
    def sigma(self):
        return self.noise_rate / self.signal_rate

    @classmethod
    def of_sigma(cls, sigma):
        return cls(1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))

    @classmethod
    def of_alpha(cls, alpha):
        """Return the level with this squared signal rate, `alphas_cumprod`."""
        return cls(np.sqrt(alpha), np.sqrt(1 - alpha))


CLEAN = Level(1.0, 0.0)


class Step(NamedTuple):
    """A sampling step: the network sees latents of `level` at `timestep`; the step leads to `end`."""

    timestep: float
    level: Level
    end: Level


# Timesteps


def spaced_timesteps(options, num_inference_steps):
    """Return the timesteps of the evaluations, in descending order, int64 `(num_inference_steps,)`.

    See Lin et al. (2023), table 2. `steps_offset` is used by the leading spacing alone.

    Args:
        options: dictionary with num_train_timesteps, timestep_spacing ("leading", "trailing" or "linspace")
            and steps_offset.
        num_inference_steps: from 1 to the number of training timesteps.

    Raises:
        UserError: `num_inference_steps` or the first timestep is out of range, or the spacing is unknown.
    """
    total = options["num_train_timesteps"]
    _check_range(num_inference_steps, total)
    if _spacing_of(options) == "leading":
        return _leading(num_inference_steps, total // num_inference_steps, options["steps_offset"], total)
    if _spacing_of(options) == "trailing":
        return _trailing(num_inference_steps, total)
    # A single step has to start from noise, too.
    rising = np.linspace(0, total - 1, num_inference_steps) if num_inference_steps > 1 else [total - 1]
    return np.round(rising)[::-1].astype("int64")


def _spacing_of(options):
    spacing = options.get("timestep_spacing", "linspace")
    if spacing not in ("leading", "trailing", "linspace"):
        raise UserError(f"timestep_spacing {shown(spacing)}: unknown; use leading, trailing or linspace")
    return spacing


def _leading(num_inference_steps, stride, offset, total, first=0):
    timesteps = np.arange(first, first + num_inference_steps)[::-1] * stride + offset
    if offset < 0:
        raise UserError(f"steps_offset {offset}: below 0; use a scheduler_config.json with 0 or 1")
    if timesteps[0] >= total:
        raise UserError(
            f"num_inference_steps {num_inference_steps}: with steps_offset {offset} it starts beyond "
            f"timestep {total - 1}; use fewer steps"
        )
    return timesteps


def _trailing(num_inference_steps, total):
    # A range with a fractional step may be one entry too long; halves are rounded as in diffusers.
    return (
        np.round(np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]).astype("int64") - 1
    )


def _check_range(num_inference_steps, most):
    if not isinstance(num_inference_steps, int | np.integer) or not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps {shown(num_inference_steps)}: out of range; use 1 to {most}")


# Sigmas


def training_sigmas(schedule):
    """Return the sigma of each training timestep, ascending, `(T,)`; `PURE_NOISE` where no signal is left."""
    alphas = np.where(schedule.alphas_cumprod > 0, schedule.alphas_cumprod, 1 / (1 + PURE_NOISE**2))
    return np.sqrt((1 - alphas) / alphas)


def karras_sigmas(largest, smallest, count, rho=7):
    """Return descending sigmas whose rho-th roots are evenly spaced (Karras et al., 2022, equation 5)."""
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), count) ** rho


def exponential_sigmas(largest, smallest, count):
    """Return descending sigmas whose logarithms are evenly spaced."""
    return np.exp(np.linspace(np.log(largest), np.log(smallest), count))


def beta_sigmas(largest, smallest, count):
    """Return descending sigmas at quantiles of a beta distribution, dense at both ends (Lee et al., 2024)."""
    from scipy.stats import beta

    return smallest + beta.ppf(1 - np.linspace(0, 1, count), 0.6, 0.6) * (largest - smallest)


_SIGMAS = {
    "use_karras_sigmas": karras_sigmas,
    "use_lu_lambdas": exponential_sigmas,  # evenly spaced in log-SNR (Lu et al., 2022), which is the same
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def _sigma_option(options):
    """Return the option that sets the sigmas, or None if the timesteps do."""
    return next((name for name in _SIGMAS if options.get(name)), None)


def _sigmas_between(options, largest, smallest, count):
    largest = options.get("sigma_max") or largest
    smallest = options.get("sigma_min") or smallest
    return _SIGMAS[_sigma_option(options)](largest, smallest, count)


def sigma_to_timestep(schedule, sigmas):
    """Return the timesteps of sigmas, interpolated in log sigma; they need not be integers."""
    training = np.log(training_sigmas(schedule))
    return np.interp(np.log(sigmas), training, np.arange(len(training)))


# Steps


def _chain(timesteps, levels, last=CLEAN):
    """Return the steps from each level to the next, and from the last one to `last`."""
    ends = [*levels[1:], last]
    return [Step(*values) for values in zip(timesteps, levels, ends, strict=True)]


def ddim_steps(schedule, num_inference_steps, options=None):
    """Return the steps of DDIM and PLMS.

    A step ends `T // num_inference_steps` timesteps below its start. As in diffusers, that differs from the
    start of the next step if `num_inference_steps` does not divide `T`.

    Args:
        options: by default those of the schedule's config.
    """
    options = options or vars(schedule.config)
    timesteps = spaced_timesteps(options, num_inference_steps)
    stride = schedule.num_train_timesteps // num_inference_steps
    return [
        Step(timestep, level_at(schedule, timestep, options), level_at(schedule, timestep - stride, options))
        for timestep in timesteps
    ]


def level_at(schedule, timestep, options):
    """Return the level of a timestep; `set_alpha_to_one` determines the level below the first one."""
    if timestep < 0:
        return CLEAN if options["set_alpha_to_one"] else Level.of_alpha(schedule.alphas_cumprod[0])
    return Level.of_alpha(schedule.alphas_cumprod[int(timestep)])


def ddpm_steps(schedule, num_inference_steps, options):
    """Return the steps of DDPM: each ends at the start of the next one."""
    timesteps = spaced_timesteps(options, num_inference_steps)
    return _chain(timesteps, [Level.of_alpha(alpha) for alpha in schedule.alphas_cumprod[timesteps]])


def distilled_timesteps(schedule, count=50):
    """Return the timesteps of consistency distillation (Luo et al., 2023), in descending order, int64."""
    total = schedule.num_train_timesteps
    count = min(count, total)
    return np.arange(count, 0, -1) * (total // count) - 1


def lcm_steps(schedule, num_inference_steps, options):
    """Return the steps of a latent consistency model, at some of the timesteps of its distillation."""
    distilled = distilled_timesteps(schedule, options["original_inference_steps"])
    _check_range(num_inference_steps, len(distilled))
    # Rounded down from fractions, as in diffusers.
    chosen = np.floor(np.linspace(0, len(distilled), num_inference_steps, endpoint=False)).astype("int64")
    timesteps = distilled[chosen]
    return _chain(timesteps, [Level.of_alpha(alpha) for alpha in schedule.alphas_cumprod[timesteps]])


def k_diffusion_steps(schedule, num_inference_steps, options):
    """Return the steps of k-diffusion's samplers; their timesteps need not be integers."""
    spacing, total = _spacing_of(options), schedule.num_train_timesteps
    if spacing == "linspace":
        _check_range(num_inference_steps, total)
        timesteps = np.linspace(total - 1, 0, num_inference_steps)
    else:
        timesteps = spaced_timesteps(options, num_inference_steps)
    training = training_sigmas(schedule)
    last = CLEAN
    if options.get("interpolation_type") == "log_linear":
        # One sigma more than there are timesteps, between the schedule's extremes, unrelated to the
        # timesteps.
        sigmas = exponential_sigmas(training[-1], training[0], num_inference_steps + 1)
        last = Level.of_sigma(sigmas[-1])
    else:
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    name = _sigma_option(options)
    if name:
        sigmas, last = _sigmas_between(options, sigmas[0], sigmas[-1], num_inference_steps), CLEAN
        timesteps = sigma_to_timestep(schedule, sigmas)
        is_rounded = name == "use_karras_sigmas" and options["rounds_karras_timesteps"]
        timesteps = np.round(timesteps) if is_rounded else timesteps
    if options.get("final_sigmas_type") == "sigma_min" and last == CLEAN:
        last = Level.of_sigma(training[0])
    return _chain(timesteps, [Level.of_sigma(sigma) for sigma in sigmas[:num_inference_steps]], last)


def solver_steps(schedule, num_inference_steps, options):
    """Return the steps of the solvers in log-SNR, at integer timesteps; the last timestep is not evaluated.

    Sigmas that an option sets lie between the schedule's extremes, whatever the timestep spacing.
    """
    training, total = training_sigmas(schedule), schedule.num_train_timesteps
    timesteps = _solver_timesteps(schedule, num_inference_steps, options)
    sigmas, name = training[timesteps], _sigma_option(options)
    ends_clean = options["final_sigmas_type"] == "zero"
    last = CLEAN if ends_clean else Level.of_sigma(training[0])
    if name:
        sigmas = _sigmas_between(options, training[-1], training[0], num_inference_steps)
        timesteps = np.clip(sigma_to_timestep(schedule, sigmas), 0, total - 1)
        # The cosine schedule's last timesteps have sigmas far apart.
        is_cosine = schedule.config.beta_schedule == "squaredcos_cap_v2" and options["keeps_cosine_timesteps"]
        is_rounded = name in ("use_karras_sigmas", "use_lu_lambdas") and not is_cosine
        # Other timesteps are rounded down; the small number keeps rounding errors from losing a whole one.
        timesteps = np.round(timesteps) if is_rounded else np.floor(timesteps + 1e-4)
        if not ends_clean and options["ends_at_last_sigma"]:
            last = Level.of_sigma(sigmas[-1])
    return _chain(timesteps, [Level.of_sigma(sigma) for sigma in sigmas], last)


def _solver_timesteps(schedule, num_inference_steps, options):
    spacing, total = _spacing_of(options), schedule.num_train_timesteps
    # Timesteps whose half log-SNR is below `lambda_min_clipped` are left out.
    least = options.get("lambda_min_clipped", -np.inf)
    total -= int(np.searchsorted(-np.log(training_sigmas(schedule))[::-1], least))
    if spacing == "trailing":
        _check_range(num_inference_steps, schedule.num_train_timesteps)
        timesteps = np.arange(total, 0, -schedule.num_train_timesteps / num_inference_steps)[
            :num_inference_steps
        ]
        if len(timesteps) < num_inference_steps:
            raise UserError(
                f"num_inference_steps {num_inference_steps}: lambda_min_clipped leaves {len(timesteps)} "
                "trailing timesteps; use timestep_spacing linspace"
            )
        return np.round(timesteps).astype("int64") - 1
    _check_range(num_inference_steps, total - 1)
    if spacing == "leading":
        stride = total // (num_inference_steps + 1)
        return _leading(
            num_inference_steps, stride, options["steps_offset"], schedule.num_train_timesteps, first=1
        )
    return np.round(np.linspace(0, total - 1, num_inference_steps + 1))[::-1][:-1].astype("int64")
