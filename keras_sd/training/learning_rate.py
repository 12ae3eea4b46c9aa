"""Learning-rate schedules: a linear warm-up, and what follows it, as in diffusers' `get_scheduler`."""

import math
from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor

SCHEDULES = {
    "constant": lambda progress, options: ops.ones_like(progress),
    "constant_with_warmup": lambda progress, options: ops.ones_like(progress),
    "linear": lambda progress, options: 1.0 - progress,
    "cosine": lambda progress, options: _half_cosine(progress),
    "cosine_with_restarts": lambda progress, options: _restarted_cosine(progress, options["num_cycles"]),
    "polynomial": lambda progress, options: ops.power(1.0 - progress, options["power"]),
}
"""Name -> the share of the peak learning rate at a share of the steps after the warm-up, both 0 to 1."""


class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly from 0 and then follows a schedule, down to 0 at the last step.

    Args:
        peak: the learning rate at the end of the warm-up.
        schedule: a name of `SCHEDULES`. The two constant ones stay at the peak.
        steps: number of steps of the whole run, from 1.
        warmup_steps: number of steps of the warm-up, 0 to `steps`.
        num_cycles: how often "cosine_with_restarts" falls from the peak to 0.
        power: the exponent of "polynomial"; 1 is linear.
    """

    def __init__(
        self,
        peak: float,
        schedule: str,
        steps: int,
        warmup_steps: int = 0,
        num_cycles: int = 1,
        power: float = 1.0,
    ) -> None:
        super().__init__()
        self.peak, self.schedule = peak, schedule
        self.steps, self.warmup_steps = steps, warmup_steps
        self.options = {"num_cycles": num_cycles, "power": power}

    def __call__(self, step: Any) -> Tensor:
        """Return the learning rate of a step, counted from 0, as float32."""
        step = ops.cast(step, "float32")
        warmup = float(self.warmup_steps)
        progress = ops.clip((step - warmup) / max(self.steps - warmup, 1.0), 0.0, 1.0)
        share = SCHEDULES[self.schedule](progress, self.options)
        if warmup:
            share = ops.where(step < warmup, step / warmup, share)
        return share * self.peak

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this schedule again."""
        return {
            "peak": self.peak,
            "schedule": self.schedule,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            **self.options,
        }


def _half_cosine(progress):
    """Return half a cosine wave from 1 to 0 (Loshchilov and Hutter, 2017, equation 5)."""
    return 0.5 + 0.5 * ops.cos(progress * math.pi)


def _restarted_cosine(progress, cycles):
    """Return one half wave after another, which does not begin anew at the end."""
    share = _half_cosine(ops.mod(progress * float(cycles), 1.0))
    return ops.where(progress < 1.0, share, 0.0)
