"""The options of diffusers' schedulers: their defaults, and the values that are supported here.

Each class has the options of its `__init__` in diffusers 0.42, with their defaults. A value that is not
supported is a `UserError` that names it; no option is ignored silently.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from keras_sd.errors import UserError
from keras_sd.files.json_files import shown

_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SCHEDULE_OF_SD = _SCHEDULE | {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIPPING = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_RANGE_OF_SIGMA = {"sigma_min": None, "sigma_max": None}
_FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DPM_SOLVER = (
    _SCHEDULE
    | _THRESHOLDING
    | _SIGMAS
    | _FLOW
    | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
    | {"final_sigmas_type": "zero", "lambda_min_clipped": -float("inf"), "variance_type": None}
)
_K_DIFFUSION = _SCHEDULE_OF_SD | _LINSPACE | _SIGMAS
_DISTILLED = (
    _SCHEDULE_OF_SD
    | _LEADING
    | _ZERO_SNR
    | _CLIPPING
    | _THRESHOLDING
    | {"beta_schedule": "scaled_linear", "set_alpha_to_one": True}
    | {"original_inference_steps": 50, "timestep_scaling": 10.0}
)

OPTIONS = {
    "DDIMScheduler": _SCHEDULE
    | _LEADING
    | _ZERO_SNR
    | _CLIPPING
    | _THRESHOLDING
    | {"clip_sample": True, "set_alpha_to_one": True},
    "DDPMScheduler": _SCHEDULE
    | _LEADING
    | _ZERO_SNR
    | _CLIPPING
    | _THRESHOLDING
    | {"clip_sample": True, "variance_type": "fixed_small"},
    "PNDMScheduler": _SCHEDULE | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "LMSDiscreteScheduler": _SCHEDULE | _LINSPACE | _SIGMAS,
    "EulerDiscreteScheduler": _SCHEDULE
    | _LINSPACE
    | _ZERO_SNR
    | _SIGMAS
    | _RANGE_OF_SIGMA
    | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": _SCHEDULE | _LINSPACE | _ZERO_SNR,
    "HeunDiscreteScheduler": _K_DIFFUSION | _CLIPPING,
    "KDPM2DiscreteScheduler": _K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _K_DIFFUSION,
    "DPMSolverSDEScheduler": _K_DIFFUSION | {"noise_sampler_seed": None},
    "DPMSolverMultistepScheduler": _DPM_SOLVER
    | _LINSPACE
    | _ZERO_SNR
    | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _DPM_SOLVER | {"lower_order_final": False},
    "DEISMultistepScheduler": _SCHEDULE
    | _LINSPACE
    | _THRESHOLDING
    | _SIGMAS
    | _FLOW
    | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "UniPCMultistepScheduler": _SCHEDULE
    | _LINSPACE
    | _ZERO_SNR
    | _THRESHOLDING
    | _SIGMAS
    | _RANGE_OF_SIGMA
    | _FLOW
    | {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True}
    | {"final_sigmas_type": "zero", "disable_corrector": [], "solver_p": None, "shift_terminal": None},
}

_DPM_SOLVERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")

# Values of other classes that a class replaces by one of its own, as diffusers does.
_SYNONYMS = {
    **{(name, "algorithm_type"): {"deis": "dpmsolver++"} for name in _DPM_SOLVERS},
    ("DEISMultistepScheduler", "algorithm_type"): dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
    **{(name, "solver_type"): dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint") for name in _DPM_SOLVERS},
    ("DEISMultistepScheduler", "solver_type"): dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    ("UniPCMultistepScheduler", "solver_type"): dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
    ("DDPMScheduler", "variance_type"): {"fixed_small_log": "fixed_small"},  # the same in another form
}


class Rule(NamedTuple):
    """The supported values of an option: a predicate, a description, and why others are not supported."""

    accepts: Callable
    expected: str
    reason: str = ""


def _one_of(*values, reason=""):
    def accepts(value):
        return any(value == known and type(value) is type(known) for known in values)

    names = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return Rule(accepts, " or ".join(", ".join(names).rsplit(", ", 1)), reason)


def _everything(value):
    return True


def _any(expected, reason=""):
    return Rule(_everything, expected, reason)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_whole(value, least=0):
    return type(value) is int and least <= value < 2**31


_SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
_POSITIVE = Rule(lambda value: _is_number(value) and 0 < value < 1e9, "above 0, below 10^9")
_SIGMA = Rule(lambda value: value is None or _POSITIVE.accepts(value), "above 0, below 10^9, or null")
_ORDER = _one_of(1, 2, 3, reason="higher orders are not stable")
_NO_FLOW = "flow matching is not supported"
_ONLY_VALUE = "it is the only one; values of other classes are replaced by it, as in diffusers"
_NO_VARIANCE = "the UNet predicts no variance"

RULES = {
    # These are checked by `SchedulerConfig`, `NoiseSchedule` and `spacing`.
    "num_train_timesteps": _any("a whole number from 1"),
    **dict.fromkeys(("beta_start", "beta_end"), _any("0 to 1")),
    "beta_schedule": _any("linear, scaled_linear or squaredcos_cap_v2"),
    "trained_betas": _any("null, or a number for each timestep"),
    "prediction_type": _any("epsilon, v_prediction or sample", _NO_FLOW),
    "timestep_spacing": _any("leading, trailing or linspace"),
    "steps_offset": _any("a whole number, which the first timestep must not exceed"),
    **dict.fromkeys(("rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one"), _any("true or false")),
    "thresholding": _SWITCH,
    "dynamic_thresholding_ratio": Rule(lambda value: _is_number(value) and 0 <= value <= 1, "0 to 1"),
    "sample_max_value": _POSITIVE,
    "clip_sample_range": _POSITIVE,
    "skip_prk_steps": _SWITCH,
    **dict.fromkeys(_SIGMAS, _SWITCH),
    "use_lu_lambdas": _SWITCH,
    **dict.fromkeys(_RANGE_OF_SIGMA, _SIGMA),
    "interpolation_type": _one_of("linear", "log_linear"),
    "timestep_type": _one_of("discrete", reason="no network here takes log sigma as its timestep"),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "lower_order_final": _SWITCH,
    "euler_at_final": _SWITCH,
    "solver_order": _ORDER,
    "predict_x0": _SWITCH,
    "disable_corrector": Rule(
        lambda value: isinstance(value, list | tuple) and all(map(_is_whole, value)), "a list of steps"
    ),
    "solver_p": _one_of(None, reason="the predictor cannot be replaced by another sampler"),
    "lambda_min_clipped": Rule(lambda value: _is_number(value) and value < float("inf"), "a number"),
    "noise_sampler_seed": _one_of(None, reason="the seed of the image determines the noise"),
    "original_inference_steps": Rule(lambda value: _is_whole(value, 1), "a whole number from 1"),
    "timestep_scaling": _POSITIVE,
    "use_flow_sigmas": _one_of(False, reason=_NO_FLOW),
    "shift_terminal": _one_of(None, reason=_NO_FLOW),
    **dict.fromkeys(("flow_shift", "use_dynamic_shifting", "time_shift_type"), _any("any value")),
}
# Options that the model's noise schedule decides, or that have no effect.
_OF_THE_MODEL = {*_SCHEDULE, *_ZERO_SNR, "flow_shift", "use_dynamic_shifting", "time_shift_type"}

# Options whose values differ between classes.
RULES_OF_CLASS = {
    ("DDPMScheduler", "variance_type"): _one_of(
        "fixed_small", "fixed_large", reason=f"{_NO_VARIANCE}, and fixed_large_log is no variance"
    ),
    **{(name, "variance_type"): _one_of(None, reason=_NO_VARIANCE) for name in _DPM_SOLVERS},
    ("DPMSolverMultistepScheduler", "algorithm_type"): _one_of(
        "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"
    ),
    ("DPMSolverSinglestepScheduler", "algorithm_type"): _one_of(
        "dpmsolver++", "dpmsolver", "sde-dpmsolver++"
    ),
    ("DEISMultistepScheduler", "algorithm_type"): _one_of("deis", reason=_ONLY_VALUE),
    **{(name, "solver_type"): _one_of("midpoint", "heun") for name in _DPM_SOLVERS},
    ("DEISMultistepScheduler", "solver_type"): _one_of("logrho", reason=_ONLY_VALUE),
    ("UniPCMultistepScheduler", "solver_type"): _one_of("bh1", "bh2"),
    ("UniPCMultistepScheduler", "use_dynamic_shifting"): _one_of(False, reason=_NO_FLOW),
}


def rule_of(class_name, option):
    """Return the `Rule` of an option of a class."""
    return RULES_OF_CLASS.get((class_name, option)) or RULES[option]


def complete(class_name, values, place="scheduler_config.json"):
    """Return all options that a scheduler of diffusers would have.

    Args:
        class_name: the scheduler class.
        values: dictionary of a `scheduler_config.json`; keys that the class does not have are ignored.
        place: where they come from, for the message.

    Raises:
        UserError: a value is not supported; the message names it.
    """
    options = dict(OPTIONS[class_name])
    for option in options:
        given = values.get(option)
        if given is not None:
            options[option] = _checked(class_name, option, given, place)
    _check_together(class_name, options, place)
    return options


def check_own(class_name, values, place):
    """Check the options that a sampler of a user's own sets.

    Args:
        class_name, place: as in `complete`.
        values: the options by name.

    Raises:
        UserError: the class has no such option or cannot have such a value, or only the noise schedule of the
            model decides it.
    """
    free = OPTIONS[class_name].keys() - _OF_THE_MODEL
    for option, value in values.items():
        if option not in free:
            names = ", ".join(sorted(free))
            raise UserError(
                f"{place}: {shown(option)} is no option of {class_name} that a sampler sets; use {names}"
            )
        rule = rule_of(class_name, option)
        if rule.accepts is _everything and type(value) is not type(OPTIONS[class_name][option]):
            raise _refusal(class_name, f"{option} {shown(value)}", rule.expected, place)
        _checked(class_name, option, value, place)


def _checked(class_name, option, value, place):
    """Return a value, or that which the class takes in its place; raise a UserError if it has none."""
    if not isinstance(value, list | dict):
        value = _SYNONYMS.get((class_name, option), {}).get(value, value)
    rule = rule_of(class_name, option)
    if not rule.accepts(value):
        raise _refusal(class_name, f"{option} {shown(value)}", rule.expected, place, rule.reason)
    return value


def _check_together(class_name, options, place):
    """Raise a UserError for supported values that cannot be combined."""
    chosen = [option for option in _SIGMAS if options.get(option)]
    if len(chosen) > 1:
        raise _refusal(class_name, " and ".join(chosen), "one of them", place)
    algorithm = options.get("algorithm_type", "")
    if algorithm.endswith("dpmsolver") and options["final_sigmas_type"] == "zero":
        reason = "the predicted noise has no limit there"
        raise _refusal(class_name, f"final_sigmas_type zero with {algorithm}", "sigma_min", place, reason)
    if algorithm == "sde-dpmsolver" and options["solver_order"] == 3:
        reason = "there is no such formula"
        raise _refusal(class_name, "solver_order 3 with sde-dpmsolver", "1 or 2", place, reason)


def _refusal(class_name, fault, expected, place, reason=""):
    because = f" ({reason})" if reason else ""
    return UserError(
        f"{place}: {fault} of {class_name} is not supported{because}; use {expected}, or another sampler"
    )


def unknown_keys(values):
    """Return the keys of a `scheduler_config.json` that no class here has, and that diffusers ignores."""
    known = {option for options in OPTIONS.values() for option in options}
    return [key for key in values if key not in known and not key.startswith("_")]
