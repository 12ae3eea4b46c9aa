"""The optimizers by name, and the settings that belong to some of them.

This module imports no backend, so that commands can use it before they load one.
"""

from typing import Any, NamedTuple

TITLES = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW8bit",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "prodigy": "Prodigy",
}
"""Name of each optimizer -> as its authors write it."""

LION_SHARE = 0.2
"""Default learning rate of Lion as a share of AdamW's; Chen et al. (2023), section 5, advise 0.1 to 0.33."""

_ADAM = ("adamw", "adamw8bit", "prodigy")


class OptimizerOption(NamedTuple):
    """A setting of some optimizers.

    Attributes:
        kind: bool or float.
        defaults: name of each optimizer that has it -> default; None is what `text` says.
        text: the help on the command line.
        range: "share" (0 to just below 1), "positive", "not negative" or "factor" (1 or more); None for a
            bool.
    """

    kind: type
    defaults: dict[str, Any]
    text: str
    range: str | None = None


OPTIONS = {
    "adam_beta1": OptimizerOption(
        float, dict.fromkeys(_ADAM, 0.9), "Decay rate of the first moment of AdamW and Prodigy.", "share"
    ),
    "adam_beta2": OptimizerOption(
        float, dict.fromkeys(_ADAM, 0.999), "Decay rate of the second moment of AdamW and Prodigy.", "share"
    ),
    "adam_epsilon": OptimizerOption(
        float,
        dict.fromkeys(_ADAM, 1e-8),
        "Added to the root of the second moment of AdamW and Prodigy.",
        "positive",
    ),
    "adam_weight_decay": OptimizerOption(
        float,
        {"adamw": 0.01, "adamw8bit": 0.01, "adafactor": 0.0, "lion": 0.05, "prodigy": 0.0},
        "Weight decay of any optimizer, times the learning rate.",
        "not negative",
    ),
    "lion_beta1": OptimizerOption(
        float, {"lion": 0.9}, "Share of the momentum in the sign of Lion's step.", "share"
    ),
    "lion_beta2": OptimizerOption(float, {"lion": 0.99}, "Decay rate of Lion's momentum.", "share"),
    "adafactor_relative_step": OptimizerOption(
        bool,
        {"adafactor": False},
        "Learning rate min(0.01, 1/sqrt(t)) at update t, in place of the learning rate and its schedule.",
    ),
    "adafactor_scale_parameter": OptimizerOption(
        bool,
        {"adafactor": None},
        "Multiply Adafactor's learning rate by the root mean square of each weight; by default with "
        "its relative step only.",
    ),
    "adafactor_warmup_init": OptimizerOption(
        bool, {"adafactor": False}, "Relative steps start at 1e-6 t in place of 0.01."
    ),
    "adafactor_beta1": OptimizerOption(
        float,
        {"adafactor": None},
        "Decay rate of an average of Adafactor's updates; by default none.",
        "share",
    ),
    "prodigy_beta3": OptimizerOption(
        float,
        {"prodigy": None},
        "Decay rate of the sums that Prodigy estimates d from; by default the root of beta2.",
        "share",
    ),
    "prodigy_d0": OptimizerOption(
        float, {"prodigy": 1e-6}, "First estimate d, Prodigy's factor of the learning rate.", "positive"
    ),
    "prodigy_d_coef": OptimizerOption(
        float, {"prodigy": 1.0}, "Factor of the estimate; 0.5 trains more gently, 2 harder.", "positive"
    ),
    "prodigy_growth_rate": OptimizerOption(
        float, {"prodigy": None}, "Largest factor by which d grows in an update; by default any.", "factor"
    ),
    "prodigy_decouple": OptimizerOption(
        bool, {"prodigy": True}, "Decay weights as AdamW does, and not through the gradient."
    ),
    "prodigy_use_bias_correction": OptimizerOption(
        bool, {"prodigy": False}, "Correct Prodigy's step for moments that start from 0, as Adam does."
    ),
    "prodigy_safeguard_warmup": OptimizerOption(
        bool,
        {"prodigy": None},
        "Keep a small learning rate from raising the estimate; by default with a warm-up only.",
    ),
}
"""Name of each such setting -> its description."""


def default_learning_rate(optimizer: str, of_adamw: float) -> float:
    """Return the usual learning rate of an optimizer where AdamW has this one."""
    return {"prodigy": 1.0, "lion": of_adamw * LION_SHARE}.get(optimizer, of_adamw)
