"""Samplers of k-diffusion, whose clock is sigma: Euler, Heun, DPM2, DPM++ SDE, LMS (Karras et al., 2022)."""

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
    """Steps that a mean over sigma would spoil: from infinite sigma, and to none, where it is not defined."""
    return step.end == CLEAN or step.level.sigma >= PURE_NOISE / 2


def euler(steps, run):
    """Euler's method in sigma (Karras et al., 2022, algorithm 1 without its second order)."""
    for step in steps:
        timestep, level, end = step
        latents = by_sample(LATENTS, SAMPLE, level, end)
        # Noise that is left in the end (`final_sigmas_type`) is beside the whole sample, as in diffusers.
        latents = latents / end.signal_rate if step is steps[-1] else latents
        yield Row(timestep, level, end, latents)


def euler_ancestral(steps, run):
    """Euler's method to less noise than asked for, and fresh noise: as DDPM, at other steps."""
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
    """After DPM-Solver-2 (Lu et al., 2022), as in k-diffusion: by the noise at the middle in log sigma."""
    return _by_the_middle(steps, run, _as_it_is)


def dpm2_ancestral(steps, run):
    """Return the same to less noise than asked for, and fresh noise."""
    return _by_the_middle(steps, run, _lowered)


def _as_it_is(level, end):
    return end


def _lowered(level, end):
    """Where an ancestral step goes before fresh noise leads it up to `end`."""
    up = end.sigma * np.sqrt(1 - (end.sigma / level.sigma) ** 2)
    return Level.of_sigma(np.sqrt(end.sigma**2 - up**2))


def _by_the_middle(steps, run, lowered):
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
    """DPM-Solver++(S) SDE of order 2 (k-diffusion's `sample_dpmpp_sde`): by the sample at the middle.

    The noise of a whole step is that of its first part and of its second, as of one Brownian motion in sigma.
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
    """Linear multistep (k-diffusion): Adams and Bashforth's polynomial through the last noises over sigma."""
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
