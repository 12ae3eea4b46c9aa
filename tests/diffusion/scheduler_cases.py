"""Sets of options of diffusers' schedulers, for the comparison of all of them with the samplers here.

    python -m tests.diffusion.scheduler_cases

prints the table of `docs/samplers.md`.
"""

import itertools

from keras_sd.diffusion.scheduler_options import OPTIONS, RULES_OF_CLASS, rule_of

# What Stable Diffusion's files say; the rest is the class's own.
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINED_BETAS = [0.0008 + 0.000011 * step for step in range(1000)]
THRESHOLDING, CLIPPING = {"thresholding": True, "sample_max_value": 1.5}, {"clip_sample": True}
KARRAS, ENDS_NOISY = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
VELOCITY, LEADING = {"prediction_type": "v_prediction"}, {"timestep_spacing": "leading", "steps_offset": 1}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Options that diffusers accepts and never uses. None stands for every class that has the option.
WITHOUT_EFFECT = {
    *((None, option) for option in ("flow_shift", "time_shift_type", "use_dynamic_shifting")),
    ("DEISMultistepScheduler", "solver_type"),
    *(
        (name, option)
        for name in ("LCMScheduler", "TCDScheduler")
        for option in ("timestep_spacing", "steps_offset", "set_alpha_to_one")
    ),
    *(("TCDScheduler", option) for option in ("clip_sample", "clip_sample_range", "timestep_scaling")),
    *(
        ("TCDScheduler", option)
        for option in ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    ),
}

# Values of each option, and what else has to be set for them to matter.
VALUES = {
    "num_train_timesteps": ([500], {}),
    "beta_start": ([0.002], {}),
    "beta_end": ([0.02], {}),
    "beta_schedule": (["linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"], VELOCITY),
    "trained_betas": ([TRAINED_BETAS], {}),
    "prediction_type": (["v_prediction", "sample", "flow_prediction"], {}),
    "thresholding": ([True], {"sample_max_value": 1.5}),
    "dynamic_thresholding_ratio": ([0.8], THRESHOLDING),
    "sample_max_value": ([1.2], {"thresholding": True}),
    "clip_sample": ([True, False], {}),
    "clip_sample_range": ([0.5], CLIPPING),
    "set_alpha_to_one": ([True, False], {}),
    "timestep_spacing": (["leading", "trailing", "linspace"], {}),
    "steps_offset": ([1, 7], {"timestep_spacing": "leading"}),
    "rescale_betas_zero_snr": ([True], VELOCITY | {"timestep_spacing": "trailing"}),
    "variance_type": (
        ["fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
        LEADING,
    ),
    "skip_prk_steps": ([True, False], {}),
    "use_karras_sigmas": ([True], {}),
    "use_exponential_sigmas": ([True], {}),
    "use_beta_sigmas": ([True], {}),
    "use_lu_lambdas": ([True], {}),
    "sigma_min": ([0.1], KARRAS),
    "sigma_max": ([10.0], KARRAS),
    "interpolation_type": (["log_linear"], {}),
    "timestep_type": (["continuous"], VELOCITY),
    "final_sigmas_type": (["sigma_min", "zero"], {}),
    "lower_order_final": ([True, False], {"solver_order": 3} | ENDS_NOISY),
    "euler_at_final": ([True, False], {"lower_order_final": False} | ENDS_NOISY),
    "solver_order": ([1, 2, 3, 4], {}),
    "solver_type": (["midpoint", "heun", "logrho", "bh1", "bh2"], ENDS_NOISY),
    "algorithm_type": (["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"], ENDS_NOISY),
    "predict_x0": ([False], ENDS_NOISY),
    "disable_corrector": ([[0, 4]], {}),
    "solver_p": (["a scheduler"], {}),
    "lambda_min_clipped": ([-2.0], {}),
    "noise_sampler_seed": ([7], {}),
    "original_inference_steps": ([64], {}),
    "timestep_scaling": ([0.01], {}),
    "use_flow_sigmas": ([True], FLOW),
    "flow_shift": ([3.0], {}),
    "use_dynamic_shifting": ([True], {}),
    "time_shift_type": (["linear"], {}),
    "shift_terminal": ([0.1], FLOW),
}

# Sets of several options at once: each of one column with each of the others'.
GRIDS = [
    [{"timestep_spacing": name} for name in ("leading", "trailing", "linspace")],
    [{"prediction_type": name} for name in ("epsilon", "v_prediction")],
]
SIGMAS = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
OF_CLASS = {
    "EulerDiscreteScheduler": [[KARRAS, {"interpolation_type": "log_linear"} | KARRAS], [{}, ENDS_NOISY]],
    "DPMSolverMultistepScheduler": [
        [
            {"algorithm_type": name}
            for name in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        ],
        [{"solver_order": 2}, {"solver_order": 3}],
        [{"solver_type": "midpoint"} | ENDS_NOISY, {"solver_type": "heun"} | ENDS_NOISY],
    ],
    "DPMSolverSinglestepScheduler": [
        [{"algorithm_type": name} for name in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")],
        [{"solver_order": 2}, {"solver_order": 3}],
        [{"solver_type": "midpoint"} | ENDS_NOISY, {"solver_type": "heun"} | ENDS_NOISY],
    ],
    "DEISMultistepScheduler": [
        [{"solver_order": 1}, {"solver_order": 3}],
        [{}, {"lower_order_final": False}, *SIGMAS],
    ],
    "UniPCMultistepScheduler": [
        [{"solver_order": 1}, {"solver_order": 3}],
        [{"solver_type": "bh1"} | ENDS_NOISY, {"predict_x0": False} | ENDS_NOISY],
        [{}, {"lower_order_final": False}, {"disable_corrector": [1]}],
    ],
}


def sets_of(class_name):
    """All sets of options of a class: dictionary from what is set, as a text, to the whole set."""
    known = OPTIONS[class_name]
    found = {}
    for option in known:
        values, others = VALUES[option]
        others = {name: value for name, value in others.items() if name in known}
        found[_title(others)] = others
        for value in values:
            found[_title({option: value} | others)] = others | {option: value}
    grids = [[row for row in column if row.keys() <= known.keys()] for column in GRIDS]
    chosen = [grids]
    if "use_karras_sigmas" in known:
        chosen.append([SIGMAS, *grids[:1]])
    if "final_sigmas_type" in known:
        chosen.append([SIGMAS, [ENDS_NOISY]])
    if class_name in OF_CLASS:
        chosen.append(OF_CLASS[class_name])
    for columns in chosen:
        for rows in itertools.product(*(column for column in columns if column)):
            values = {name: value for row in rows for name, value in row.items()}
            found.setdefault(_title(values), values)
    return {title: BASE | values for title, values in found.items()}


def table_of_options():
    """The rows of `docs/samplers.md`: each option with its classes, what is computed, and why not more is."""
    rows = {}
    for class_name, known in OPTIONS.items():
        for option in known:
            rule = rule_of(class_name, option)
            is_idle = (class_name, option) in WITHOUT_EFFECT or (None, option) in WITHOUT_EFFECT
            is_idle &= (class_name, option) not in RULES_OF_CLASS
            computed = "any value, without effect in diffusers" if is_idle else rule.expected
            row = (option, computed, "" if is_idle else rule.reason)
            rows.setdefault(row, []).append(class_name.removesuffix("Scheduler"))
    for (option, computed, reason), classes in sorted(rows.items(), key=lambda item: item[0]):
        of = "all" if len(classes) == len(OPTIONS) else ", ".join(classes)
        yield f"| `{option}` of {of} | {computed} | {reason or '—'} |"


def _title(values):
    return (
        "(defaults)"
        if not values
        else ", ".join(
            f"{name}={'[...]' if name == 'trained_betas' else value}"
            for name, value in sorted(values.items())
        )
    )


if __name__ == "__main__":
    print("\n".join(table_of_options()))
