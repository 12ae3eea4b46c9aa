"""Rows of weights for the compiled step of `keras_sd.diffusion.denoiser`, and the formulas that build them.

Every sampler here is linear: its new latents are a weighted sum of the old latents, the predicted sample and
noise, its memory of earlier predictions, and fresh noise. The samplers compute their formulas in float64 on
the unit vectors below; the results are the weights.

Latents are variance-preserving, `signal_rate * sample + noise_rate * noise`, also where a paper uses
`sample + sigma * noise`. Dividing the former by the signal rate gives the latter.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from keras_sd.arguments import shown
from keras_sd.diffusion.spacing import Level
from keras_sd.errors import UserError

MEMORY_SIZE = 5

# The terms of the compiled step's weighted sums, in this order.
LATENTS, *MEMORY, SAMPLE, NOISE, RANDOM = np.eye(MEMORY_SIZE + 4)


class Row(NamedTuple):
    """One evaluation of the network and the update after it.

    `timestep` and `level` are those of the latents that the network sees; `end` is the level of the latents
    after the row. `latents` and `memory` are the new latents and memory, as weights of the terms above.
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
        """Whether the row uses fresh noise."""
        return bool(self.latents @ RANDOM)


class SamplingRun(NamedTuple):
    """The settings of one sampling run.

    Attributes:
        schedule: the `NoiseSchedule` that the network was trained on.
        options: dictionary of the options of the sampler's class in diffusers.
        num_inference_steps: number of steps from pure noise to the sample.
        first_step: number of steps skipped at the beginning.
        eta: the share of fresh noise, 0 to 1.
    """

    schedule: object
    options: dict
    num_inference_steps: int
    first_step: int = 0
    eta: float = 0.0


def listed(values, kind, title):
    """Return what a method has made as a list.

    Args:
        kind: the class of each value.
        title: the sampler, for the message.

    Raises:
        UserError: a value is of another class.
    """
    values = list(values) if isinstance(values, Iterable) else [values]
    if not all(isinstance(value, kind) for value in values):
        wrong = next(value for value in values if not isinstance(value, kind))
        raise UserError(f"{title}: its method makes {shown(wrong)}; make `{kind.__name__}` objects")
    return values


def check_rows(rows, steps, total, title):
    """Raise a UserError unless rows complete all steps, and each can be computed.

    Args:
        rows: list of `Row`.
        steps: number of steps.
        total: number of training timesteps.
        title: the sampler, for the message.
    """
    ended = sum(bool(row.ends_step) for row in rows)
    if ended != steps or not rows[-1].ends_step:
        raise UserError(
            f"{title}: its rows end {ended} of {steps} steps; make one or more for each step, `ends_step` in "
            "the last one"
        )
    for index, row in enumerate(rows):
        if not _is_sound(row, total):
            raise UserError(
                f"{title}: its row {index} at timestep {shown(row.timestep)} cannot be computed; give a "
                f"timestep from 0 to {total - 1}, levels of two rates from 0 to 1, and {len(LATENTS)} finite "
                f"weights for the latents and for each of up to {MEMORY_SIZE} memories"
            )


def _is_sound(row, total):
    try:
        timestep = np.array(row.timestep, "float64")  # None is NaN
        rates = np.array([row.level, row.end], "float64")
        weights = np.array([row.latents, *row.memory], "float64")
    except (TypeError, ValueError):
        return False
    shapes = timestep.shape, rates.shape, weights.shape
    return (
        shapes == ((), (2, 2), (1 + len(row.memory), len(LATENTS)))
        and len(row.memory) <= MEMORY_SIZE
        and bool(0 <= timestep <= total - 1)
        and bool(((rates >= 0) & (rates <= 1)).all())
        and bool(np.isfinite(weights).all())
    )


# Updates from one noise level to another, the building blocks of the samplers. Each is exact if the
# prediction is.


def by_sample(latents, sample, level, end):
    """Move latents by a predicted sample: Euler's step in sigma, DDIM's and first-order DPM-Solver++'s."""
    share = end.noise_rate / level.noise_rate
    return share * latents + (end.signal_rate - share * level.signal_rate) * sample


def by_noise(latents, noise, level, end):
    """Move latents by predicted noise, the derivative of `sample + sigma * noise` with respect to sigma."""
    share = end.signal_rate / level.signal_rate
    return share * latents + (end.noise_rate - share * level.noise_rate) * noise


def by_chance(latents, sample, level, end, random=RANDOM, standard_deviation=None):
    """Draw from the posterior of the forward process given the sample (Ho et al., 2020, equation 7).

    Euler's ancestral step in sigma and the first-order step of SDE-DPM-Solver++ are the same.

    Args:
        random: the fresh noise.
        standard_deviation: of the drawn latents; None for that of the posterior.
    """
    ratio = level.signal_rate * end.noise_rate / (level.noise_rate * end.signal_rate)
    mean = end.noise_rate / level.noise_rate * ratio * latents + end.signal_rate * (1 - ratio**2) * sample
    if standard_deviation is None:
        standard_deviation = end.noise_rate * np.sqrt(1 - ratio**2)
    return mean + standard_deviation * random


def by_noise_and_chance(latents, noise, level, end):
    """Take SDE-DPM-Solver's first-order step (Lu et al., 2022): remove twice the noise, add fresh noise."""
    share = end.signal_rate / level.signal_rate
    removed = 2 * (end.noise_rate - share * level.noise_rate)
    added = np.sqrt((level.sigma / end.sigma) ** 2 - 1) * end.noise_rate
    return share * latents + removed * noise + added * RANDOM


def noise_at(level):
    """Return the noise in the latents according to the predicted sample, clipped or not."""
    return (LATENTS - level.signal_rate * SAMPLE) / level.noise_rate
