"""AdamW that keeps an exponential moving average (EMA) of the weights inside the compiled step."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.backend.compat import JointAdamW


class AdamW(JointAdamW):
    """AdamW (Loshchilov and Hutter, 2019) with EMA copies of the weights.

    The decay is min(`ema_decay`, (1 + n) / (10 + n)) at update n, counted from 0, so the average soon forgets
    the initial weights. Keras' own `use_ema` starts from zeros and has a fixed decay. The average changes
    with each update, not with each accumulated micro-batch. An `ema_decay` of None keeps no EMA weights.

    `epsilon` is added to the bias-corrected root of the second moment, as in torch and in the paper's
    algorithm 1; Keras adds it before the correction, where it has up to thirty times the effect.
    """

    def __init__(
        self,
        learning_rate: Any,
        ema_decay: float | None = 0.9999,
        epsilon: float = 1e-08,
        name: str = "adamw",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, epsilon=epsilon, name=name, **options)
        self.ema_decay = ema_decay
        self.ema_variables = []

    def build(self, variables: Any) -> None:
        """Create the moments and the EMA weights, which start as exact copies of the weights."""
        if self.built:
            return
        super().build(variables)
        if self.ema_decay is None:
            return
        self.ema_variables = self.add_optimizer_variables(variables, "ema")
        for average, variable in zip(self.ema_variables, variables, strict=True):
            # A copy: JAX donates the buffers of both to the compiled step, so they must not be shared.
            average.assign(ops.copy(variable))

    def update_all(
        self, gradients: list[Tensor], variables: list[keras.Variable], learning_rate: Tensor
    ) -> None:
        """Make one update of all variables (Kingma and Ba, 2015, algorithm 1).

        Common factors are computed once, and all vectors, the majority of variables, are updated as one
        array. Keras traces an update for each variable, which takes most of the time before a small model's
        first step.
        """
        update = ops.cast(self.iterations + 1, "float32")
        rate = ops.cast(learning_rate, "float32")
        step_size = rate / _bias_correction(self.beta_1, update)
        root_correction = ops.sqrt(_bias_correction(self.beta_2, update))
        retained = 1.0 - rate * self.weight_decay
        first_share, second_share, epsilon = (
            ops.convert_to_tensor(number, "float32")
            for number in (1.0 - self.beta_1, 1.0 - self.beta_2, self.epsilon)
        )
        if self.ema_decay is not None:
            decay = ops.minimum(self.ema_decay, young_decay(ops.cast(self.iterations, "float32")))
            average_share = 1.0 - decay
        for group in _with_joined_vectors(variables):
            gradient = _joined([gradients[place] for place in group])
            states = list(zip(*(self._state(variables[place]) for place in group), strict=True))
            momentum, velocity, weight, *average = map(_joined, states)
            momentum = momentum + (gradient - momentum) * first_share
            velocity = velocity + (ops.square(gradient) - velocity) * second_share
            weight = weight * retained - momentum * step_size / (
                ops.sqrt(velocity) / root_correction + epsilon
            )
            average = [values - (values - weight) * average_share for values in average]
            for state, values in zip(states, (momentum, velocity, weight, *average), strict=True):
                _assign_parts(state, values)

    def _state(self, variable):
        """Return the variables that an update changes: both moments, the weight and, if any, its average."""
        index, momentum, velocity = self.slots(variable)
        average = [] if self.ema_decay is None else [self.ema_variables[index]]
        return momentum, velocity, variable, *average


def _bias_correction(beta, update):
    """Return 1 - beta ** update, without rounding errors for beta close to 1."""
    return -ops.expm1(update * float(np.log(beta))) if beta else 1.0


def _with_joined_vectors(variables):
    """Return groups of indices: all vectors in one group, each other variable in its own."""
    vectors = [place for place, variable in enumerate(variables) if variable.ndim == 1]
    others = [[place] for place, variable in enumerate(variables) if variable.ndim != 1]
    return [vectors, *others] if vectors else others


def _joined(arrays):
    """Return one array, or several vectors concatenated, in float32."""
    arrays = [ops.cast(array, "float32") for array in arrays]  # reads a variable once
    return ops.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _assign_parts(variables, values):
    """Assign to variables their parts of an array from `_joined`."""
    if len(variables) > 1:
        ends = np.cumsum([variable.shape[0] for variable in variables])
        parts = ops.split(values, ends[:-1])
    else:
        parts = [values]
    for variable, part in zip(variables, parts, strict=True):
        variable.assign(part)


def young_decay(updates):
    """Return the largest EMA decay after `updates` updates: small at first, to forget the initial weights."""
    return (1.0 + updates) / (10.0 + updates)


class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """Counts the steps of a learning-rate schedule in updates, when each update takes several batches.

    Keras passes the number of batches to a schedule, also when gradients are accumulated.

    Args:
        schedule: the schedule over updates.
        batches: batches in one update.
    """

    def __init__(self, schedule, batches):
        super().__init__()
        self.schedule = schedule
        self.batches = batches

    def __call__(self, step):
        return self.schedule(step // self.batches)
