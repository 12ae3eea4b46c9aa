"""Rows of weights for the one compiled step of `keras_sd.diffusion.denoiser`, and what they are built from.

Every sampler here is linear: what it makes of the latents, the predicted sample and noise, what it remembers
of earlier predictions, and fresh noise, is a weighted sum of them. Formulas are computed in float64 on the
unit vectors below, and what comes out are the weights.

Latents are kept variance-preserving, `signal_rate * sample + noise_rate * noise`, also where a paper's are
`sample + sigma * noise`: divided by the signal rate they are the same.
"""

from typing import NamedTuple

import numpy as np

from keras_sd.diffusion.spacing import Level

MEMORY_SIZE = 5

# What the compiled step takes a weighted sum of, in this order.
LATENTS, *MEMORY, SAMPLE, NOISE, RANDOM = np.eye(MEMORY_SIZE + 4)


class Row(NamedTuple):
    """One evaluation of the network, and what is made of it.

    `timestep` and `level` are those of the latents that the network sees; `end` is the level of the latents
    after the row. `latents` and `memory` say what they become, as weights of the above.
    """

    timestep: float
    level: Level
    end: Level
    latents: np.ndarray
    memory: tuple = ()
    ends_step: bool = True

    @property
    def weights(self):
        """The new latents and memory as weights of the old ones: `(1 + MEMORY_SIZE, MEMORY_SIZE + 4)`."""
        weights = np.zeros((1 + MEMORY_SIZE, MEMORY_SIZE + 4))
        weights[: 1 + len(self.memory)] = [self.latents, *self.memory]
        return weights

    @property
    def draws(self):
        """Whether it uses fresh noise."""
        return bool(self.latents @ RANDOM)


class Run(NamedTuple):
    """What rows are made for.

    Attributes:
        schedule: the `NoiseSchedule` that the network was trained on.
        options: dictionary of the options of the sampler's class in diffusers.
        num_inference_steps: of the whole way.
        first_step: how many of them are left out at the beginning.
        eta: the share of fresh noise, 0 to 1.
    """

    schedule: object
    options: dict
    num_inference_steps: int
    first_step: int = 0
    eta: float = 0.0


# Ways from one noise level to another, on which the samplers are built. Each is exact if what it is given is.


def by_sample(latents, sample, level, end):
    """By the predicted sample: Euler's step in sigma, DDIM's, and first-order DPM-Solver++'s are all this."""
    share = end.noise_rate / level.noise_rate
    return share * latents + (end.signal_rate - share * level.signal_rate) * sample


def by_noise(latents, noise, level, end):
    """By the predicted noise, the derivative by sigma of `sample + sigma * noise`."""
    share = end.signal_rate / level.signal_rate
    return share * latents + (end.noise_rate - share * level.noise_rate) * noise


def by_chance(latents, sample, level, end, random=RANDOM, deviation=None):
    """Draw from the forward process's posterior given the sample (Ho et al., 2020, equation 7).

    Euler's ancestral step in sigma and first-order SDE-DPM-Solver++'s are this as well.

    Args:
        random: the fresh noise.
        deviation: the standard deviation of what is drawn, where it is not the posterior's.
    """
    ratio = level.signal_rate * end.noise_rate / (level.noise_rate * end.signal_rate)
    mean = end.noise_rate / level.noise_rate * ratio * latents + end.signal_rate * (1 - ratio**2) * sample
    if deviation is None:
        deviation = end.noise_rate * np.sqrt(1 - ratio**2)
    return mean + deviation * random


def by_noise_and_chance(latents, noise, level, end):
    """First-order SDE-DPM-Solver's (Lu et al., 2022): twice the noise is taken out, and new noise put in."""
    share = end.signal_rate / level.signal_rate
    removed = 2 * (end.noise_rate - share * level.noise_rate)
    added = np.sqrt((level.sigma / end.sigma) ** 2 - 1) * end.noise_rate
    return share * latents + removed * noise + added * RANDOM


def noise_at(level):
    """Return the noise that the predicted sample, clipped if it was, leaves in the latents."""
    return (LATENTS - level.signal_rate * SAMPLE) / level.noise_rate
