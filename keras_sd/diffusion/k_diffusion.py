"""Samplers of k-diffusion, with sigma as time: Euler, Heun, DPM2, DPM++ SDE, LMS (Karras et al., 2022)."""

import itertools

import numpy as np

from keras_sd.diffusion import spacing
from keras_sd.diffusion.rows import (
    LATENTS,
    MEMORY,
    RANDOM,
    SAMPLE,
    Row,
    by_chance,
    by_noise,
    by_sample,
    noise_at,
)
from keras_sd.diffusion.spacing import CLEAN, PURE_NOISE, Level


def _is_first_order(step):
    """Return whether a step must be of first order: from infinite sigma, or to sigma 0."""
    return step.end == CLEAN or step.level.sigma >= PURE_NOISE / 2


def euler(steps, run):
    """Euler's method in sigma (Karras et al., 2022, algorithm 1 without its second order)."""
    for step in steps:
        timestep, level, end = step
        latents = by_sample(LATENTS, SAMPLE, level, end)
        # With `final_sigmas_type` the result keeps some noise; as in diffusers its signal rate is 1.
        latents = latents / end.signal_rate if step is steps[-1] else latents
        yield Row(timestep, level, end, latents)


def euler_ancestral(steps, run):
    """Euler's method to a level below the target, then fresh noise: DDPM's step, at other timesteps."""
    for timestep, level, end in steps:
        yield Row(timestep, level, end, by_chance(LATENTS, SAMPLE, level, end))


def heun(steps, run):
    """Heun's method in sigma (Karras et al., 2022, algorithm 1): the noise is averaged over both ends."""
    for step, following in itertools.zip_longest(steps, steps[1:]):
        timestep, level, end = step
        first = by_sample(LATENTS, SAMPLE, level, end)
        if _is_first_order(step):
            yield Row(timestep, level, end, first)
            continue
        yield Row(timestep, level, end, first, (LATENTS, noise_at(level)), ends_step=False)
        start, noise = MEMORY[:2]
        yield Row(following.timestep, end, end, by_noise(start, (noise + noise_at(end)) / 2, level, end))


def dpm2(steps, run):
    """DPM-Solver-2 (Lu et al., 2022) as in k-diffusion: by the predicted noise midway in log sigma."""
    return _midpoint(steps, run, lambda level, end: end)


def dpm2_ancestral(steps, run):
    """DPM-Solver-2 to a level below the target, then fresh noise."""
    return _midpoint(steps, run, _lowered)


def _lowered(level, end):
    """Return the level below `end` that an ancestral step reaches before fresh noise is added."""
    up = end.sigma * np.sqrt(1 - (end.sigma / level.sigma) ** 2)
    return Level.of_sigma(np.sqrt(end.sigma**2 - up**2))


def _midpoint(steps, run, lowered):
    for step in steps:
        timestep, level, end = step
        if _is_first_order(step):
            yield Row(timestep, level, end, by_sample(LATENTS, SAMPLE, level, end))
            continue
        low = lowered(level, end)
        middle_sigma = np.sqrt(level.sigma * low.sigma)
        middle = Level.of_sigma(middle_sigma)
        half_way = by_sample(LATENTS, SAMPLE, level, middle)
        yield Row(timestep, level, middle, half_way, (LATENTS,), ends_step=False)
        middle_timestep = spacing.sigma_to_timestep(run.schedule, middle_sigma)
        latents = by_noise(MEMORY[0], noise_at(middle), level, low)
        if low != end:
            up = np.sqrt(end.sigma**2 - low.sigma**2)
            latents = end.signal_rate * (latents / low.signal_rate + up * RANDOM)
        yield Row(middle_timestep, middle, end, latents)


def dpm_sde(steps, run):
    """DPM-Solver++(S) SDE of order 2 (k-diffusion's `sample_dpmpp_sde`): by the sample at the midpoint.

    The noise of a whole step combines those of its two halves, as increments of one Brownian motion in sigma.
    """
    for step in steps:
        timestep, level, end = step
        if step.end == CLEAN:
            yield Row(timestep, level, end, by_sample(LATENTS, SAMPLE, level, end))
            continue
        middle_sigma = np.sqrt(level.sigma * end.sigma)
        middle = Level.of_sigma(middle_sigma)
        half_way = by_chance(LATENTS, SAMPLE, level, middle)
        yield Row(timestep, level, middle, half_way, (LATENTS, RANDOM), ends_step=False)
        share = (level.sigma - middle_sigma) / (level.sigma - end.sigma)
        random = np.sqrt(share) * MEMORY[1] + np.sqrt(1 - share) * RANDOM
        middle_timestep = spacing.sigma_to_timestep(run.schedule, middle_sigma)
        yield Row(middle_timestep, middle, end, by_chance(MEMORY[0], SAMPLE, level, end, random))


def lms(steps, run, order=4):
    """Linear multistep (k-diffusion): the Adams-Bashforth polynomial through the last predicted noises."""
    nodes, node_weights = np.polynomial.legendre.leggauss(order // 2)
    for index, (timestep, level, end) in enumerate(steps):
        noises = [noise_at(level), *MEMORY[: order - 1]][: index + 1]
        known = [step.level.sigma for step in steps[index::-1][: len(noises)]]
        places = level.sigma + (end.sigma - level.sigma) * (nodes + 1) / 2
        mean = 0
        for position, (sigma, noise) in enumerate(zip(known, noises, strict=True)):
            others = np.delete(known, position)[:, None]
            lagrange = np.prod((places - others) / (sigma - others), axis=0)
            mean = mean + lagrange @ node_weights / 2 * noise
        yield Row(timestep, level, end, by_noise(LATENTS, mean, level, end), tuple(noises[: order - 1]))
