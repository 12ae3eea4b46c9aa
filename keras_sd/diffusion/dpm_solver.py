"""Solvers in log-SNR: DPM-Solver and its successors (Lu et al., 2022), DEIS and UniPC (Zhang, Zhao, 2023).

The linear part of the ODE is solved exactly over a step, and the network's prediction (of the sample or of
the noise) is approximated by a polynomial in log-SNR. This results in a mean prediction, which is applied as
if it were constant over the step. Options have diffusers' names; where the papers leave a choice, the
formulas follow diffusers.
"""

import functools
import math

import numpy as np

from keras_sd.diffusion.rows import (
    LATENTS,
    MEMORY,
    SAMPLE,
    Row,
    by_chance,
    by_noise,
    by_noise_and_chance,
    by_sample,
    noise_at,
)
from keras_sd.diffusion.spacing import CLEAN
from keras_sd.errors import UserError

# Below this number of steps, high orders are unstable in the last steps.
_FEW_STEPS = 15

# By algorithm_type: the update, and the factor of the step's width in log-SNR in the polynomial's weights.
_UPDATES = {
    "dpmsolver++": (by_sample, -1),
    "dpmsolver": (by_noise, 1),
    "sde-dpmsolver++": (by_chance, -2),
    "sde-dpmsolver": (by_noise_and_chance, 1),
}


def _time(level):
    """Return half the log-SNR, the time variable of the solvers."""
    return -np.log(level.sigma) if level.noise_rate else np.inf


def _prediction(options, level):
    """Return the prediction that the polynomial interpolates: the sample, or the noise that it implies."""
    return SAMPLE if options["algorithm_type"].endswith("++") else noise_at(level)


def _is_still(step):
    return step.level.sigma == step.end.sigma


def _slope_weight(width):
    """Return the weight of the first derivative in the mean; `width` is the scaled width in log-SNR."""
    return (np.expm1(width) / width - 1) / np.expm1(width)


def _curve_weight(width, half=-0.5):
    """Return the weight of the second derivative in the mean."""
    return ((np.expm1(width) - width) / width**2 + half) / np.expm1(width)


# DPM-Solver multistep


def dpm_multistep(steps, run):
    """DPM-Solver(++) and its SDE variants, of order 1 to 3, with the predictions of earlier steps."""
    options = run.options
    for index, step in enumerate(steps):
        prediction = _prediction(options, step.level)
        order = _multistep_order(options, run.num_inference_steps, index, len(steps), step)
        mean = _multistep_mean(options, steps, index, [prediction, *MEMORY[:2]][:order])
        update, _ = _UPDATES[options["algorithm_type"]]
        latents = LATENTS if _is_still(step) else update(LATENTS, mean, step.level, step.end)
        yield Row(*step, latents, (prediction, MEMORY[0]))


def _multistep_order(options, num_inference_steps, index, count, step):
    lowers = options["lower_order_final"] and num_inference_steps < _FEW_STEPS
    ends_low = lowers or options.get("euler_at_final") or options.get("final_sigmas_type") == "zero"
    order = min(options["solver_order"], index + 1)
    if _is_still(step) or (index == count - 1 and ends_low):
        return 1
    return min(order, 2) if lowers and index == count - 2 else order


def _multistep_mean(options, steps, index, predictions):
    newest, *older = predictions
    if not older:
        return newest
    times = [_time(step.level) for step in steps[index::-1][: len(predictions)]]
    width = _time(steps[index].end) - times[0]
    ratios = -np.diff(times) / width
    _, sign = _UPDATES[options["algorithm_type"]]
    slope = (newest - older[0]) / ratios[0]
    if len(older) == 1:
        weight = 0.5 if options["solver_type"] == "midpoint" else _slope_weight(sign * width)
        return newest + weight * slope
    before = (older[0] - older[1]) / ratios[1]
    curve = (slope - before) / sum(ratios)
    slope = slope + ratios[0] * curve
    # diffusers' half has the other sign in the SDE.
    half = 0.5 if options["algorithm_type"] == "sde-dpmsolver++" else -0.5
    return newest + _slope_weight(sign * width) * slope + _curve_weight(sign * width, half) * curve


# DPM-Solver singlestep


def dpm_singlestep(steps, run):
    """DPM-Solver(++) singlestep: groups of 1 to 3 evaluations, all of which start at the group's first level.

    The memory holds the latents at the start of the group and the group's predictions.
    """
    options = run.options
    orders = _singlestep_orders(options, run.num_inference_steps)[run.first_step :]
    update, _ = _UPDATES[options["algorithm_type"]]
    for index, (step, order) in enumerate(zip(steps, orders, strict=True)):
        place = min(order - 1, index)  # in the group; a run that starts inside one has no earlier predictions
        prediction = _prediction(options, step.level)
        group = steps[index - place : index + 1]
        predictions = [prediction, *MEMORY[1 : 1 + place]]
        start = LATENTS if place == 0 else MEMORY[0]
        mean = _singlestep_mean(options, group, predictions)
        level = group[0].level
        latents = start if level.sigma == step.end.sigma else update(start, mean, level, step.end)
        yield Row(*step, latents, (start, *predictions[:2]))


def _singlestep_orders(options, num_inference_steps):
    """Return the order of each evaluation: groups of 1 to `solver_order`, and lower orders at the end."""
    order = options["solver_order"]
    lowers = (
        options["lower_order_final"] or num_inference_steps % order or options["final_sigmas_type"] == "zero"
    )
    groups, rest = divmod(num_inference_steps, order)
    full = list(range(1, order + 1))
    if not lowers or order == 1:
        orders = full * groups
    elif order == 2:
        orders = full * (groups - 1) + [1, 1] if rest == 0 else full * groups + [1]
    elif rest == 0:
        orders = full * (groups - 1) + [1, 2, 1]
    else:
        orders = full * groups + [1, 2][:rest]
    if options["final_sigmas_type"] == "zero":
        orders[-1] = 1
    return orders


def _singlestep_mean(options, group, predictions):
    """Return the mean prediction from the group's start to the end of its last step."""
    *later, first = predictions
    if not later:
        return first
    start = _time(group[0].level)
    width = _time(group[-1].end) - start
    _, sign = _UPDATES[options["algorithm_type"]]
    # Newest first, like the predictions.
    ratios = [(_time(step.level) - start) / width for step in group[:0:-1]]
    slopes = [(prediction - first) / ratio for prediction, ratio in zip(later, ratios, strict=True)]
    is_midpoint = options["solver_type"] == "midpoint"
    if len(later) == 1:
        return first + (0.5 if is_midpoint else _slope_weight(sign * width)) * slopes[0]
    if is_midpoint:
        return first + _slope_weight(sign * width) * slopes[0]
    apart = ratios[0] - ratios[1]
    slope = (ratios[0] * slopes[1] - ratios[1] * slopes[0]) / apart
    curve = 2 * (slopes[0] - slopes[1]) / apart
    half = 0.5 if options["algorithm_type"] == "sde-dpmsolver++" else -0.5
    return first + _slope_weight(sign * width) * slope + _curve_weight(sign * width, half) * curve


# DEIS


def deis_multistep(steps, run):
    """DEIS in log-rho: the polynomial through the predicted noises in log sigma, integrated over sigma."""
    for index, step in enumerate(steps):
        noises = [noise_at(step.level), *MEMORY[:2]]
        order = _multistep_order(run.options, run.num_inference_steps, index, len(steps), step)
        latents = LATENTS
        if not _is_still(step):
            shares = _deis_shares([past.level.sigma for past in steps[index::-1][:order]], step.end.sigma)
            change = sum(share * noise for share, noise in zip(shares, noises, strict=False))
            latents = step.end.signal_rate * (LATENTS / step.level.signal_rate + change)
        yield Row(*step, latents, tuple(noises[:2]))


@functools.cache
def _quadrature():
    return np.polynomial.legendre.leggauss(64)


def _deis_shares(sigmas, end):
    """Return the integrals of the Lagrange polynomials in log sigma over sigma, from `sigmas[0]` to `end`."""
    if not end > 0:
        raise UserError(
            "scheduler_config.json: the first timestep has no noise (beta_start), where DEIS is not defined; "
            "use another sampler"
        )
    nodes, weights = _quadrature()
    places, start, end = np.log(sigmas), math.log(sigmas[0]), math.log(end)
    times = start + (end - start) * (nodes + 1) / 2
    weights = weights * (end - start) / 2 * np.exp(times)
    shares = []
    for index, place in enumerate(places):
        others = np.delete(places, index)[:, None]
        shares.append(weights @ np.prod((times - others) / (place - others), axis=0))
    return shares


# UniPC


def unipc(steps, run):
    """UniPC (Zhao et al., 2023), of order 1 to 3.

    Each prediction first corrects the previous step. The memory holds the latents at the start of that step
    and the earlier predictions, the newest first.
    """
    options = run.options
    start, *previous = MEMORY[:4]
    update = by_sample if options["predict_x0"] else by_noise
    order = 0  # of the previous step
    for index, step in enumerate(steps):
        prediction = SAMPLE if options["predict_x0"] else noise_at(step.level)
        latents = LATENTS
        if index > 0 and run.first_step + index - 1 not in options["disable_corrector"]:
            before = steps[index - 1]
            if not _is_still(before):
                mean = _unipc_mean(options, steps[:index], step.level, previous[:order], prediction)
                latents = update(start, mean, before.level, step.level)
        order = min(options["solver_order"], index + 1)
        if options["lower_order_final"]:
            order = min(order, len(steps) - index)
        # A step to zero noise has infinite width in log-SNR.
        order = 1 if step.end == CLEAN or _is_still(step) else order
        mean = _unipc_mean(options, steps[: index + 1], step.end, [prediction, *previous][:order])
        made = latents if _is_still(step) else update(latents, mean, step.level, step.end)
        yield Row(*step, made, (latents, prediction, *previous[:2]))


def _unipc_mean(options, steps, end, predictions, corrected_by=None):
    """Return the mean prediction over the last of `steps`, which leads to `end`.

    Args:
        predictions: at the start of this step and of the previous ones, the newest first; one per order.
        corrected_by: the prediction at `end` for the corrector; None for the predictor.
    """
    newest, *older = predictions
    if not older and corrected_by is None:
        return newest
    times = [_time(step.level) for step in steps[::-1][: len(predictions)]]
    width = _time(end) - times[0]
    ratios = [(time - times[0]) / width for time in times[1:]]
    slopes = [(prediction - newest) / ratio for prediction, ratio in zip(older, ratios, strict=True)]
    matrix, values, scale = _unipc_system(options, [*ratios, 1.0], width)
    if corrected_by is not None:
        slopes.append(corrected_by - newest)
        shares = [0.5] if len(predictions) == 1 else np.linalg.solve(matrix, values)
    elif len(predictions) == 2:
        shares = [0.5]
    else:
        shares = np.linalg.solve(matrix[:-1, :-1], values[:-1])
    return newest + scale * sum(share * slope for share, slope in zip(shares, slopes, strict=True))


def _unipc_system(options, ratios, width):
    """Return the order conditions on the weights (equation 10) and the common factor by B(h)."""
    signed = -width if options["predict_x0"] else width
    phi = np.expm1(signed)
    b = signed if options["solver_type"] == "bh1" else phi
    term, factorial, values = phi / signed - 1, 1, []
    for power in range(1, len(ratios) + 1):
        values.append(term * factorial / b)
        factorial *= power + 1
        term = term / signed - 1 / factorial
    matrix = np.stack([np.array(ratios) ** power for power in range(len(ratios))])
    return matrix, np.array(values), b / phi
