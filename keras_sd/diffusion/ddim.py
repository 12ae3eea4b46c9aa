"""Samplers that go from one training timestep to another: DDIM, DDPM, PLMS, LCM, TCD."""

import numpy as np

from keras_sd.diffusion.prediction import add_noise, consistency_shares, target, to_sample_and_noise
from keras_sd.diffusion.rows import LATENTS, MEMORY, NOISE, RANDOM, SAMPLE, Row, by_chance
from keras_sd.diffusion.spacing import CLEAN, Level, level_at
from keras_sd.errors import UserError


def ddim(steps, run):
    """Denoising diffusion implicit models (Song et al., 2021), equation 12."""
    for timestep, level, end in steps:
        variance = (end.noise_rate / level.noise_rate) ** 2 * (1 - (level.signal_rate / end.signal_rate) ** 2)
        # At eta 1, rounding may make the argument of the root slightly negative.
        noise_rate = np.sqrt(max(end.noise_rate**2 - run.eta**2 * variance, 0))
        latents = end.signal_rate * SAMPLE + noise_rate * NOISE + run.eta * np.sqrt(variance) * RANDOM
        yield Row(timestep, level, end, latents)


def ddpm(steps, run):
    """DDPM (Ho et al., 2020, algorithm 2), with the variance of the posterior or of the forward process."""
    for timestep, level, end in steps:
        standard_deviation = None
        if run.options["variance_type"] == "fixed_large":
            change = 1 - (level.signal_rate / end.signal_rate) ** 2
            standard_deviation = np.sqrt(change) if timestep > 0 else 0.0
        latents = by_chance(LATENTS, SAMPLE, level, end, standard_deviation=standard_deviation)
        yield Row(timestep, level, end, latents)


# PNDM

_ADAMS_BASHFORTH = [
    np.array([1]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
]


def _moved(run, latents, prediction, level, end):
    """Return the latents after a DDIM step with a given prediction, of the network's prediction type."""
    sample, noise = to_sample_and_noise(run.schedule.prediction_type, prediction, latents, *level)
    return add_noise(sample, noise, *end)


def _predicted(run, level):
    return target(run.schedule.prediction_type, SAMPLE, NOISE, *level)


def pndm(steps, run):
    """Pseudo linear multistep, PLMS (Liu et al., 2022, algorithm 2).

    The paper's first three steps are Runge-Kutta steps. Stable Diffusion leaves them out (`skip_prk_steps`)
    and takes the first step twice, the second time with the mean of the predictions at both ends. The
    multistep formula is applied to the network's prediction, be it noise, velocity or sample. The memory
    holds the earlier predictions, the newest first, and then the latents at the start of a step.
    """
    known = 0
    if not run.options["skip_prk_steps"]:
        yield from _runge_kutta(steps, run)
        known, steps = 3, steps[3:]
    for index, step in enumerate(steps):
        prediction = _predicted(run, step.level)
        if known == 0 and index == 0 and len(steps) > 1:
            memory = (prediction, *MEMORY[1:3], LATENTS)
            yield Row(*step, _moved(run, LATENTS, prediction, step.level, step.end), memory, ends_step=False)
            yield _second_attempt(steps[1], run)
            continue
        predictions = [prediction, *MEMORY[:3]][: known + index + 1]
        combined = _ADAMS_BASHFORTH[len(predictions) - 1] @ predictions
        latents = _moved(run, LATENTS, combined, step.level, step.end)
        yield Row(*step, latents, tuple(predictions[:3]))


def _second_attempt(second, run):
    """Repeat the first step, corrected by the prediction at its end, where the second step begins."""
    mean = (MEMORY[0] + _predicted(run, second.level)) / 2
    stride = run.schedule.num_train_timesteps // run.num_inference_steps
    # As if the first step had started one stride above the second; with leading spacing it did.
    start = level_at(run.schedule, second.timestep + stride, run.options)
    latents = _moved(run, MEMORY[3], mean, start, second.level)
    return Row(second.timestep, second.level, second.level, latents, MEMORY[:1])


def _runge_kutta(steps, run):
    """Yield the first three steps by the Runge-Kutta formula of order 4 (Liu et al., 2022, equation 13).

    The memory holds the predictions at the starts of the last three steps, then the latents at the start of
    this step, then the running sum of its predictions.
    """
    if len(steps) < 4:
        raise UserError(
            f"num_inference_steps {len(steps)}: too few for the Runge-Kutta steps of the model's PNDM; "
            "use 4 or more, or the sampler pndm"
        )
    half = run.schedule.num_train_timesteps // run.num_inference_steps // 2
    kept, start, total = MEMORY[:3], MEMORY[3], MEMORY[4]
    for step, following in zip(steps[:3], steps[1:4], strict=True):
        first, last = step.timestep, following.timestep
        # For each evaluation: the timestep of the network's input, and the timestep that the latents reach.
        stages = ((first, first - half), (last + half, last + half), (last + half, last), (last, last))
        for stage, (evaluated, reached) in enumerate(stages):
            level = level_at(run.schedule, evaluated, run.options)
            end = level_at(run.schedule, reached, run.options)
            prediction = _predicted(run, level)
            if stage == 0:
                memory = (prediction, *kept[:2], LATENTS, prediction / 6)
                latents = _moved(run, LATENTS, prediction, step.level, end)
            else:
                mean = total + prediction / 6 if stage == 3 else prediction
                memory = (*kept, start, total + prediction / 3)
                latents = _moved(run, start, mean, step.level, end)
            yield Row(evaluated, level, end, latents, memory, ends_step=stage == 3)


# Distilled models


def lcm(steps, run):
    """Multistep consistency sampling (Luo et al., 2023): each step predicts a sample and adds fresh noise."""
    for timestep, level, end in steps:
        of_latents, of_sample = consistency_shares(timestep, run.options["timestep_scaling"])
        sample = of_latents * LATENTS + of_sample * SAMPLE
        yield Row(timestep, level, end, add_noise(sample, RANDOM, *end))


def tcd(steps, run):
    """Trajectory consistency (Zheng et al., 2024): denoise below the target level, then add fresh noise.

    `eta` is the paper's gamma; with 0 each step goes straight to its target. The last step ends at the level
    of the first timestep.
    """
    alphas = run.schedule.alphas_cumprod
    for index, (timestep, level, _) in enumerate(steps):
        is_last = index == len(steps) - 1
        following = 0 if is_last else int(steps[index + 1].timestep)
        low = Level.of_alpha(alphas[int(np.floor((1 - run.eta) * following))])
        latents, end = add_noise(SAMPLE, NOISE, *low), low
        if run.eta > 0 and not is_last:
            end = Level.of_alpha(alphas[following])
            share = end.signal_rate / low.signal_rate
            latents = share * latents + np.sqrt(1 - share**2) * RANDOM
        yield Row(timestep, level, CLEAN if is_last else end, latents)
