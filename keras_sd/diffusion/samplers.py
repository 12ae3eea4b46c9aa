"""Samplers, as tables of numbers for the one compiled step of `keras_sd.diffusion.denoiser`.

Every sampler here is linear: what it makes of the latents, the predicted sample and noise, what it remembers
of earlier predictions, and fresh noise, is a weighted sum of them. So a sampler is a function that yields
rows of weights, one for each time the network is asked. It is written in the terms of its paper: the formulas
are computed in float64 on the unit vectors below, and what comes out are the weights.

Latents are kept variance-preserving, `signal_rate * sample + noise_rate * noise`, also where a paper's are
`sample + sigma * noise`: divided by the signal rate they are the same.

This module needs no backend.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from keras_sd.diffusion import spacing
from keras_sd.diffusion.prediction import add_noise, consistency_shares, target, to_sample_and_noise
from keras_sd.diffusion.spacing import CLEAN, PURE_NOISE, Level
from keras_sd.errors import UserError

MEMORY_SIZE = 4

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


# Ways from one noise level to another, on which the samplers are built. Each is exact if what it is given is.


def _by_sample(latents, sample, level, end):
    """By the predicted sample: Euler's step in sigma, DDIM's, and first-order DPM-Solver++'s are all this."""
    share = end.noise_rate / level.noise_rate
    return share * latents + (end.signal_rate - share * level.signal_rate) * sample


def _by_noise(latents, noise, level, end):
    """By the predicted noise, the derivative by sigma of `sample + sigma * noise`."""
    share = end.signal_rate / level.signal_rate
    return share * latents + (end.noise_rate - share * level.noise_rate) * noise


def _by_chance(latents, sample, level, end):
    """Draws from the forward process's posterior given the sample (Ho et al., 2020, equation 7).

    Euler's ancestral step in sigma and first-order SDE-DPM-Solver++'s are this as well.
    """
    ratio = level.signal_rate * end.noise_rate / (level.noise_rate * end.signal_rate)
    mean = end.noise_rate / level.noise_rate * ratio * latents + end.signal_rate * (1 - ratio**2) * sample
    return mean + end.noise_rate * np.sqrt(1 - ratio**2) * RANDOM


def _noise_at(level):
    """The noise that the predicted sample, clipped if it was, leaves in the latents."""
    return (LATENTS - level.signal_rate * SAMPLE) / level.noise_rate


def _is_first_order(step):
    """Steps that a mean over sigma would spoil: from infinite sigma, and to none, where it is not defined."""
    return step.end == CLEAN or step.level.sigma >= PURE_NOISE / 2


# Samplers: functions of the steps to make and the noise schedule that yield rows.


def _ddim(steps, schedule, eta):
    """Denoising diffusion implicit models (Song et al., 2021), equation 12."""
    for timestep, level, end in steps:
        variance = (end.noise_rate / level.noise_rate) ** 2 * (1 - (level.signal_rate / end.signal_rate) ** 2)
        # At eta 1 rounding may leave a little less than nothing under the root.
        noise_rate = np.sqrt(max(end.noise_rate**2 - eta**2 * variance, 0))
        latents = end.signal_rate * SAMPLE + noise_rate * NOISE + eta * np.sqrt(variance) * RANDOM
        yield Row(timestep, level, end, latents)


def _ancestral(steps, schedule):
    """DDPM (Ho et al., 2020, algorithm 2) and Euler ancestral (k-diffusion), which differ in their steps."""
    for timestep, level, end in steps:
        yield Row(timestep, level, end, _by_chance(LATENTS, SAMPLE, level, end))


def _euler(steps, schedule):
    """Euler's method in sigma (Karras et al., 2022, algorithm 1 without its second order)."""
    for timestep, level, end in steps:
        yield Row(timestep, level, end, _by_sample(LATENTS, SAMPLE, level, end))


def _heun(steps, schedule):
    """Heun's method in sigma (Karras et al., 2022, algorithm 1): the noise is averaged over both ends."""
    for step, following in itertools.zip_longest(steps, steps[1:]):
        timestep, level, end = step
        euler = _by_sample(LATENTS, SAMPLE, level, end)
        if _is_first_order(step):
            yield Row(timestep, level, end, euler)
            continue
        yield Row(timestep, level, end, euler, (LATENTS, _noise_at(level)), ends_step=False)
        start, noise = MEMORY[:2]
        yield Row(following.timestep, end, end, _by_noise(start, (noise + _noise_at(end)) / 2, level, end))


def _dpm2(steps, schedule):
    """After DPM-Solver-2 (Lu et al., 2022), as in k-diffusion: by the noise at the middle in log sigma."""
    for step in steps:
        timestep, level, end = step
        if _is_first_order(step):
            yield Row(timestep, level, end, _by_sample(LATENTS, SAMPLE, level, end))
            continue
        middle_sigma = np.sqrt(level.sigma * end.sigma)
        middle = Level.of_sigma(middle_sigma)
        half_way = _by_sample(LATENTS, SAMPLE, level, middle)
        yield Row(timestep, level, middle, half_way, (LATENTS,), ends_step=False)
        middle_timestep = spacing.sigma_to_timestep(schedule, middle_sigma)
        yield Row(middle_timestep, middle, end, _by_noise(MEMORY[0], _noise_at(middle), level, end))


def _lms(steps, schedule, order=4):
    """Linear multistep (k-diffusion): Adams and Bashforth's polynomial through the last noises over sigma."""
    nodes, node_weights = np.polynomial.legendre.leggauss(order // 2)
    for index, (timestep, level, end) in enumerate(steps):
        noises = [_noise_at(level), *MEMORY[: order - 1]][: index + 1]
        known = [step.level.sigma for step in steps[index::-1][: len(noises)]]
        places = level.sigma + (end.sigma - level.sigma) * (nodes + 1) / 2
        mean = 0
        for position, (sigma, noise) in enumerate(zip(known, noises, strict=True)):
            others = np.delete(known, position)[:, None]
            lagrange = np.prod((places - others) / (sigma - others), axis=0)
            mean = mean + lagrange @ node_weights / 2 * noise
        yield Row(timestep, level, end, _by_noise(LATENTS, mean, level, end), tuple(noises[: order - 1]))


_ADAMS_BASHFORTH = [
    np.array([1]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
]


def _pndm(steps, schedule):
    """Pseudo linear multistep, PLMS (Liu et al., 2022, algorithm 2) as Stable Diffusion uses it.

    In place of the Runge-Kutta steps of the paper the first step is made twice, the second time by the mean
    of the predictions at both ends. The multistep formula is applied to what the network predicts, be it
    noise, velocity or sample.
    """
    kind = schedule.prediction_type

    def moved(latents, prediction, step):
        sample, noise = to_sample_and_noise(kind, prediction, latents, *step.level)
        return add_noise(sample, noise, *step.end)

    for index, step in enumerate(steps):
        prediction = target(kind, SAMPLE, NOISE, *step.level)
        if index == 0 and len(steps) > 1:
            first, second = step, steps[1]
            memory = (prediction, *MEMORY[1:3], LATENTS)
            yield Row(*first, moved(LATENTS, prediction, first), memory, ends_step=False)
            mean = (MEMORY[0] + target(kind, SAMPLE, NOISE, *second.level)) / 2
            yield Row(second.timestep, second.level, first.end, moved(MEMORY[3], mean, first), MEMORY[:1])
            continue
        predictions = [prediction, *MEMORY[:3]][: index + 1]
        combined = _ADAMS_BASHFORTH[len(predictions) - 1] @ predictions
        yield Row(*step, moved(LATENTS, combined, step), tuple(predictions[:3]))


def _extrapolated_sample(steps, index, previous):
    """The sample half a step in log-SNR ahead, from this prediction and the `previous` one.

    DPM-Solver++(2M)'s (Lu et al., 2022, algorithm 2); UniPC's predictor of order 2 is the same.
    """
    if index == 0 or steps[index].end == CLEAN:
        return SAMPLE
    ahead = np.log(steps[index].level.sigma / steps[index].end.sigma)
    behind = np.log(steps[index - 1].level.sigma / steps[index].level.sigma)
    return SAMPLE + ahead / (2 * behind) * (SAMPLE - previous)


def _dpmpp_2m(steps, schedule, way=_by_sample):
    """DPM-Solver++(2M) (Lu et al., 2022), and by the way `_by_chance` its SDE variant."""
    for index, (timestep, level, end) in enumerate(steps):
        sample = _extrapolated_sample(steps, index, previous=MEMORY[0])
        yield Row(timestep, level, end, way(LATENTS, sample, level, end), (SAMPLE,))


def _unipc(steps, schedule):
    """UniPC of order 2 with B2(h) (Zhao et al., 2023).

    Each prediction first corrects the step that led to it. The memory holds the latents where that step began
    and the predicted samples there and one step before.
    """
    start, previous, before_previous = MEMORY[:3]
    for index, (timestep, level, end) in enumerate(steps):
        latents = LATENTS
        if index > 0:
            mean = _corrected_sample(steps[: index + 1], previous, before_previous)
            latents = _by_sample(start, mean, steps[index - 1].level, level)
        sample = _extrapolated_sample(steps, index, previous)
        yield Row(timestep, level, end, _by_sample(latents, sample, level, end), (latents, SAMPLE, previous))


def _corrected_sample(steps, previous, before_previous):
    """The mean sample over the step that led to the last of `steps`, now that the sample there is known."""
    times = [-np.log(step.level.sigma) for step in steps[-3:]]
    if len(times) == 2:
        return (previous + SAMPLE) / 2
    width = times[2] - times[1]
    place = (times[0] - times[1]) / width
    shrinkage = np.expm1(-width)
    first = (-shrinkage / width - 1) / shrinkage
    second = ((shrinkage / width + 1) / width - 0.5) * 2 / shrinkage
    old, new = np.linalg.solve([[1, 1], [place, 1]], [first, second])
    return previous + old * (before_previous - previous) / place + new * (SAMPLE - previous)


def _lcm(steps, schedule):
    """Multistep consistency sampling (Luo et al., 2023): the sample found is made noisy anew each step."""
    for timestep, level, end in steps:
        of_latents, of_sample = consistency_shares(timestep)
        sample = of_latents * LATENTS + of_sample * SAMPLE
        yield Row(timestep, level, end, add_noise(sample, RANDOM, *end))


class Tables(NamedTuple):
    """The rows of a run, and what standard-normal noise is multiplied by to begin with."""

    start: float
    rows: list


@dataclass(frozen=True)
class Sampler:
    """A way of denoising.

    Attributes:
        name: as A1111's web UI shows it and as pictures' files say.
        purpose: what it is for, in a line.
        steps: function of the noise schedule and the number of steps; gives a list of `spacing.Step`.
        rows: function of those steps and the schedule; yields `Row`s.
        starts_at_sigma: whether the first latents are `sigma * noise`, without the share of the signal.
        takes_eta: whether `rows` takes the share of fresh noise too.
    """

    name: str
    purpose: str
    steps: Callable
    rows: Callable
    starts_at_sigma: bool = False
    takes_eta: bool = False

    def tables(self, schedule, num_steps, eta=0.0, first_step=0):
        """What the compiled step is to do in each row.

        Args:
            schedule: the `NoiseSchedule` that the network was trained on.
            num_steps: of the whole way; a step is a row, or two.
            eta: from 0 to 1, the share of fresh noise in DDIM.
            first_step: how many of the steps are left out at the beginning.

        Raises:
            UserError: one of the numbers is out of range.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta}: out of range; use 0 (deterministic) to 1")
        if eta and not self.takes_eta:
            raise UserError(f"eta {eta}: {self.name} takes none; use 0, or the sampler ddim")
        steps = self.steps(schedule, num_steps)
        if not 0 <= first_step < num_steps:
            raise UserError(f"first_step {first_step}: out of range; use 0 to {num_steps - 1}")
        steps = steps[first_step:]
        rows = self.rows(steps, schedule, **({"eta": eta} if self.takes_eta else {}))
        start = steps[0].level.noise_rate if self.starts_at_sigma and first_step == 0 else 1.0
        return Tables(float(start), list(rows))


def _k_diffusion(name, purpose, rows, **spacing_options):
    steps = functools.partial(spacing.k_diffusion_steps, **spacing_options)
    return Sampler(name, purpose, steps, rows, starts_at_sigma=True)


def _solver(name, purpose, rows, **spacing_options):
    return Sampler(name, purpose, functools.partial(spacing.solver_steps, **spacing_options), rows)


_dpmpp_2m_sde = functools.partial(_dpmpp_2m, way=_by_chance)
_KARRAS = "the same with more of the steps where little noise is left"

SAMPLERS = {
    "ddim": Sampler(
        "DDIM", "plain and deterministic, 30 to 50 steps", spacing.ddim_steps, _ddim, takes_eta=True
    ),
    "ddpm": Sampler(
        "DDPM", "fresh noise each step as in the theory, 100 to 1000 steps", spacing.ddpm_steps, _ancestral
    ),
    "pndm": Sampler(
        "PLMS", "what Stable Diffusion 1 was published with, 30 to 50 steps", spacing.ddim_steps, _pndm
    ),
    "lms": _k_diffusion("LMS", "multistep as PLMS is, at other timesteps, 30 to 50 steps", _lms),
    "lms_karras": _k_diffusion("LMS Karras", _KARRAS, _lms, karras=True),
    "heun": _k_diffusion("Heun", "accurate, at twice the work a step, 15 to 30 steps", _heun),
    "heun_karras": _k_diffusion("Heun Karras", _KARRAS, _heun, karras=True),
    "euler": _k_diffusion("Euler", "the simplest that is good, 20 to 40 steps", _euler),
    "euler_a": _k_diffusion(
        "Euler a", "fresh noise each step: varied, never settles, 20 to 40 steps", _ancestral
    ),
    "dpm2": _k_diffusion("DPM2", "accurate, at twice the work a step, 15 to 30 steps", _dpm2),
    "dpm2_karras": _k_diffusion("DPM2 Karras", _KARRAS, _dpm2, karras=True, whole_timesteps=True),
    "dpmpp_2m": _solver("DPM++ 2M", "the best for few evaluations, 15 to 25 steps", _dpmpp_2m),
    "dpmpp_2m_karras": _solver("DPM++ 2M Karras", _KARRAS, _dpmpp_2m, karras=True),
    "dpmpp_2m_sde": _solver(
        "DPM++ 2M SDE", "fresh noise each step: rich in detail, 25 to 40 steps", _dpmpp_2m_sde
    ),
    "dpmpp_2m_sde_karras": _solver("DPM++ 2M SDE Karras", _KARRAS, _dpmpp_2m_sde, karras=True),
    "unipc": _solver("UniPC", "corrects each step by the next prediction, 8 to 20 steps", _unipc),
    "lcm": Sampler("LCM", "only for models distilled for it, 2 to 8 steps", spacing.lcm_steps, _lcm),
}


def find_sampler(name):
    """The sampler of that name.

    Raises:
        UserError: there is none; the line lists those there are.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r}: unknown; use one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
