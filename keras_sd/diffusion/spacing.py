"""Where samplers ask the network: timesteps, and the noise levels between which their steps go.

`sigma` is the ratio of noise to signal, the clock of Karras et al. (2022) and of k-diffusion's samplers;
everything is computed in float64.
"""

from typing import NamedTuple

import numpy as np

from keras_sd.errors import UserError

# The sigma that stands for a timestep of noise alone, whose own is infinite: half precision's smallest number
# as squared signal rate, as in diffusers.
PURE_NOISE = 2.0**12


class Level(NamedTuple):
    """How noisy latents are: `signal_rate * sample + noise_rate * noise`, with squares that add to 1."""

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
        """The level of a squared signal rate, `alphas_cumprod`."""
        return cls(np.sqrt(alpha), np.sqrt(1 - alpha))


CLEAN = Level(1.0, 0.0)


class Step(NamedTuple):
    """The network is asked about latents of `level` at `timestep`; the step leads to the level `end`."""

    timestep: float
    level: Level
    end: Level


# Timesteps


def spaced_timesteps(config, num_steps, spacing=None):
    """The timesteps at which the network is asked, falling, int64 `(num_steps,)`.

    Table 2 of Lin et al. (2023); `steps_offset` belongs to the leading spacing alone.

    Args:
        config: `SchedulerConfig`.
        num_steps: from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace"; by default the config's.

    Raises:
        UserError: `num_steps` is out of range, the first timestep is, or the spacing is unknown.
    """
    total, spacing = config.num_train_timesteps, spacing or config.timestep_spacing
    _check_range(num_steps, total)
    if spacing == "leading":
        timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + config.steps_offset
        if timesteps[0] >= total:
            raise UserError(
                f"num_steps {num_steps}: with steps_offset {config.steps_offset} it starts beyond "
                f"timestep {total - 1}; use fewer steps"
            )
        return timesteps
    if spacing == "trailing":
        # A range by a fractional step may come out one too long; halves are rounded as in diffusers.
        return np.round(np.arange(total, 0, -total / num_steps)[:num_steps]).astype("int64") - 1
    if spacing == "linspace":
        # A single step, too, has to begin from noise.
        rising = np.linspace(0, total - 1, num_steps) if num_steps > 1 else [total - 1]
        return np.round(rising)[::-1].astype("int64")
    raise UserError(f"timestep_spacing {spacing!r}: unknown; use leading, trailing or linspace")


def _check_range(num_steps, most):
    if not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= most:
        raise UserError(f"num_steps {num_steps}: out of range; use 1 to {most}")


def _is_trailing(config):
    """Whether samplers whose usual spacing is linspace keep to the trailing one.

    A model that was trained to begin from noise alone has to be asked there.
    """
    return config.timestep_spacing == "trailing" or config.rescale_betas_zero_snr


# Sigmas


def training_sigmas(schedule):
    """Sigma of each training timestep, rising, `(T,)`; `PURE_NOISE` where no signal is left."""
    alphas = np.where(schedule.alphas_cumprod > 0, schedule.alphas_cumprod, 1 / (1 + PURE_NOISE**2))
    return np.sqrt((1 - alphas) / alphas)


def karras_sigmas(largest, smallest, count, rho=7):
    """Sigmas that fall evenly in their rho-th root (Karras et al., 2022, equation 5)."""
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), count) ** rho


def sigma_to_timestep(schedule, sigmas):
    """The timesteps, between whole ones too, that have these sigmas; interpolated in log sigma."""
    training = np.log(training_sigmas(schedule))
    return np.interp(np.log(sigmas), training, np.arange(len(training)))


# Steps


def _chain(timesteps, levels):
    """Steps from each level to the next, and from the last one to no noise at all."""
    ends = [*levels[1:], CLEAN]
    return [Step(*values) for values in zip(timesteps, levels, ends, strict=True)]


def ddim_steps(schedule, num_steps):
    """DDIM's and PLMS's: the config's spacing.

    A step ends at `T // num_steps` timesteps below its own, also where the next step begins elsewhere
    because `num_steps` does not divide `T`: what diffusers does, whose pictures these are to be.
    """
    timesteps = spaced_timesteps(schedule.config, num_steps)
    alphas, stride = schedule.alphas_cumprod, schedule.num_train_timesteps // num_steps
    final = 1.0 if schedule.config.set_alpha_to_one else alphas[0]
    ends = [alphas[timestep - stride] if timestep >= stride else final for timestep in timesteps]
    return [
        Step(timestep, Level.of_alpha(alphas[timestep]), Level.of_alpha(end))
        for timestep, end in zip(timesteps, ends, strict=True)
    ]


def ddpm_steps(schedule, num_steps):
    """DDPM's: the config's spacing; each step ends where the next one begins."""
    timesteps = spaced_timesteps(schedule.config, num_steps)
    return _chain(timesteps, [Level.of_alpha(alpha) for alpha in schedule.alphas_cumprod[timesteps]])


def distilled_timesteps(schedule):
    """The 50 that latent consistency models are distilled at (Luo et al., 2023), falling, int64."""
    total = schedule.num_train_timesteps
    count = min(50, total)
    return np.arange(count, 0, -1) * (total // count) - 1


def lcm_steps(schedule, num_steps):
    """A latent consistency model's: some of the timesteps that it was distilled at."""
    distilled = distilled_timesteps(schedule)
    _check_range(num_steps, len(distilled))
    timesteps = distilled[np.arange(num_steps) * len(distilled) // num_steps]
    return _chain(timesteps, [Level.of_alpha(alpha) for alpha in schedule.alphas_cumprod[timesteps]])


def k_diffusion_steps(schedule, num_steps, karras=False, whole_timesteps=False):
    """Those of k-diffusion's samplers: linspace, between whole timesteps too.

    A config with the trailing spacing or a zero terminal SNR gets the trailing spacing.

    Args:
        karras: spaces the sigmas between the first and the last as Karras et al. did.
        whole_timesteps: rounds the timesteps of Karras's sigmas.
    """
    if _is_trailing(schedule.config):
        timesteps = spaced_timesteps(schedule.config, num_steps, "trailing")
    else:
        _check_range(num_steps, schedule.num_train_timesteps)
        timesteps = np.linspace(schedule.num_train_timesteps - 1, 0, num_steps)
    training = training_sigmas(schedule)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], num_steps)
        timesteps = sigma_to_timestep(schedule, sigmas)
        timesteps = np.round(timesteps) if whole_timesteps else timesteps
    return _chain(timesteps, [Level.of_sigma(sigma) for sigma in sigmas])


def solver_steps(schedule, num_steps, karras=False):
    """DPM-Solver's and UniPC's: linspace over whole timesteps, of which the last one is not asked at.

    A config with the trailing spacing or a zero terminal SNR gets the trailing spacing.

    Args:
        karras: spaces the sigmas between the schedule's extremes as Karras et al. did.
    """
    if _is_trailing(schedule.config):
        timesteps = spaced_timesteps(schedule.config, num_steps, "trailing")
    else:
        _check_range(num_steps, schedule.num_train_timesteps - 1)
        timesteps = spaced_timesteps(schedule.config, num_steps + 1, "linspace")[:-1]
    training = training_sigmas(schedule)
    sigmas = training[timesteps]
    if karras:
        sigmas = karras_sigmas(training[-1], training[0], num_steps)
        timesteps = sigma_to_timestep(schedule, sigmas)
        # The cosine schedule's last timesteps have sigmas far apart.
        cosine = schedule.config.beta_schedule == "squaredcos_cap_v2"
        timesteps = timesteps if cosine else np.round(timesteps)
    return _chain(timesteps, [Level.of_sigma(sigma) for sigma in sigmas])
