"""What all optimizers share: EMA weights, joined vectors, and the figures of an update for the log.

A subclass is the rule of one optimizer. It names its state (`state_of`) and computes one update of a weight
(`rule`). Everything runs inside the compiled step.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.arguments import Tensor
from keras_sd.backend.compat import JointOptimizer


class Part:
    """Variables that are updated as one array: one variable, or several vectors behind one another.

    Attributes:
        variables: the trained variables.
        state: for each kind of state, one variable of each trained variable.
        shape: of each of the variables.
        gradient: of all of them, float32.
        factor: of the learning rate.
    """

    def __init__(self, variables, state, gradients, factor=1.0):
        self.variables, self.state, self.factor = variables, state, factor
        self.shape = tuple(variables[0].shape)
        self.gradient = joined(gradients)


class EMAOptimizer(JointOptimizer):
    """An optimizer that keeps an exponential moving average (EMA) of the weights inside the compiled step.

    The decay is min(`ema_decay`, (1 + n) / (10 + n)) at update n, counted from 0, so the average soon forgets
    the initial weights. Keras' own `use_ema` starts from zeros and has a fixed decay. The average changes
    with each update, not with each accumulated micro-batch. An `ema_decay` of None keeps no EMA weights.

    Attributes:
        ema_variables: the EMA weights, in the order of the trained variables.
        state_names: the names of the optimizer's state, in the order of its variables.
        figures: name -> scalar variable with a figure of the last update, for the log. They are no state: no
            update depends on them.
        rate_factors: id of a trained variable -> factor of its learning rate, as torch's parameter groups
            have; None if all have the same. Set it before `build`.
        post_hoc_gammas: exponents of power-function averages that are kept as well (`post_hoc_ema`). Set them
            before `build`.
        post_hoc_variables: for each exponent the averages, in the order of the trained variables.
        rate_figures: name -> factor of a learning rate that the log shows as well.
    """

    option_names: tuple[str, ...] = ()  # arguments of the subclass, for `get_config`
    figure_names: tuple[str, ...] = ("learning_rate", "gradient_norm")

    def __init__(
        self, learning_rate: Any, ema_decay: float | None, weight_decay: float, name: str, **options: Any
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **options)
        self.ema_decay = ema_decay
        self.ema_variables = []
        self.state_names = []
        self.figures = {}
        self.rate_factors: dict[int, float] | None = None
        self.rate_figures: dict[str, float] = {}
        self.post_hoc_gammas: tuple[float, ...] = ()
        self.post_hoc_variables: list[list[Any]] = []

    def build(self, variables: Any) -> None:
        """Create the state and the EMA weights, which start as exact copies of the weights."""
        if self.built:
            return
        super().build(variables)
        names = self.add_common_state()
        state = []
        for place, variable in enumerate(variables):
            kinds = self.state_of(variable)
            state.append([self.add_state(variable, kind, **more) for kind, more in kinds.items()])
            names += [f"{kind}/{place}" for kind in kinds]
        self.state, self.state_names = state, names
        self.fill_state(variables)
        if self.ema_decay is not None:
            self.ema_variables = [self.add_state(variable, "ema") for variable in variables]
            # Copies: JAX donates the buffers of both to the compiled step, so they must not be shared.
            for average, value in zip(self.ema_variables, backend.copies(variables), strict=True):
                average.assign(value)
        # The first update overwrites them, so their first values do not matter.
        self.post_hoc_variables = [
            [self.add_state(variable, f"post_hoc_{place}") for variable in variables]
            for place in range(len(self.post_hoc_gammas))
        ]
        names_of_figures = (*self.figure_names, *self.rate_figures)
        self.figures = {name: self.add_variable((), dtype="float32", name=name) for name in names_of_figures}

    def add_common_state(self) -> list[str]:
        """Create the state that belongs to no single variable; return its names (for subclasses)."""
        return []

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        """Return the state of a variable as name -> arguments of `add_state` (for subclasses)."""
        raise NotImplementedError

    def fill_state(self, variables: list[keras.Variable]) -> None:
        """Give the state its first values, where they are not zeros (for subclasses)."""

    def group_of(self, variable: keras.Variable) -> Any:
        """Return a key that vectors updated as one array share; None for a variable by itself."""
        return "vectors" if variable.ndim == 1 else None

    def start_update(self, rate: Tensor, parts: list[Part]) -> Any:
        """Return what the updates of all parts have in common (for subclasses)."""
        return rate

    def updates_by_factor(self, rate: Tensor, parts: list[Part]) -> dict[float, Any]:
        """Return for each factor of the learning rate what the updates of its parts have in common."""
        factors = dict.fromkeys(part.factor for part in parts)
        return {
            factor: self.start_update(rate if factor == 1.0 else rate * factor, parts) for factor in factors
        }

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        """Return a part's new weight and state (for subclasses).

        Args:
            part: has the gradient.
            weight, state: the values, float32.
            common: the result of `start_update`.
        """
        raise NotImplementedError

    def rate_of_update(self, learning_rate: Tensor) -> Tensor:
        """Return the learning rate of this update, float32 (for subclasses that choose it)."""
        return ops.cast(learning_rate, "float32")

    def measure(self, gradient_norm: Tensor) -> None:
        """Keep the norm of the gradients before clipping, for the log."""
        self.figures["gradient_norm"].assign(gradient_norm)

    def update_all(
        self, gradients: list[Tensor], variables: list[keras.Variable], learning_rate: Tensor
    ) -> None:
        """Make one update of all variables.

        Common factors are computed once, and all vectors, the majority of variables, are updated as one
        array. Keras traces an update for each variable, which takes most of the time before a small model's
        first step.
        """
        rate = self.rate_of_update(learning_rate)
        self.figures["learning_rate"].assign(rate)
        for name, factor in self.rate_figures.items():
            self.figures[name].assign(rate * factor)
        parts = self._parts(gradients, variables)
        common = self.updates_by_factor(rate, parts)
        if self.ema_decay is not None:
            decay = ops.minimum(self.ema_decay, young_decay(ops.cast(self.iterations, "float32")))
            average_share = 1.0 - decay
        post_hoc_shares = [self._power_share(gamma) for gamma in self.post_hoc_gammas]
        for part in parts:
            state = [joined(kind) for kind in part.state]
            weight, *state = self.rule(part, joined(part.variables), state, common[part.factor])
            if self.ema_decay is not None:
                averages = [self.ema_variables[self.index_of(variable)] for variable in part.variables]
                values = joined(averages)
                assign_parts(averages, values - (values - weight) * average_share)
            for averages, share in zip(self.post_hoc_variables, post_hoc_shares, strict=True):
                own = [averages[self.index_of(variable)] for variable in part.variables]
                values = joined(own)
                assign_parts(own, values + (weight - values) * share)
            assign_parts(part.variables, weight)
            for kind, values in zip(part.state, state, strict=True):
                assign_parts(kind, values)

    def _power_share(self, gamma):
        """Return the share of new weights in a power-function average (Karras et al., 2024, section 3)."""
        update = ops.cast(self.iterations, "float32") + 1.0
        return -ops.expm1((gamma + 1.0) * ops.log1p(-1.0 / update))

    def _parts(self, gradients, variables):
        groups, alone = {}, []
        rates = self.rate_factors
        factors = [1.0 if rates is None else rates[id(variable)] for variable in variables]
        for place, variable in enumerate(variables):
            key = self.group_of(variable)
            if key is None:
                alone.append([place])
            else:
                groups.setdefault((key, factors[place]), []).append(place)
        parts = []
        for places in (*groups.values(), *alone):
            members = [variables[place] for place in places]
            state = list(zip(*(self.state[self.index_of(variable)] for variable in members), strict=True))
            parts.append(Part(members, state, [gradients[place] for place in places], factors[places[0]]))
        return parts

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this optimizer again."""
        names = ("ema_decay", *self.option_names)
        return super().get_config() | {name: getattr(self, name) for name in names}


def bias_correction(beta, update):
    """Return 1 - beta ** update, without rounding errors for beta close to 1."""
    return -ops.expm1(update * float(np.log(beta))) if beta else 1.0


def joined(arrays):
    """Return one array, or several vectors concatenated, in float32."""
    arrays = [ops.cast(array, "float32") for array in arrays]  # reads a variable once
    return ops.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def assign_parts(variables, values):
    """Assign to variables their parts of an array from `joined`."""
    if len(variables) > 1:
        ends = np.cumsum([variable.shape[0] for variable in variables])
        parts = ops.split(values, ends[:-1])
    else:
        parts = [values]
    for variable, part in zip(variables, parts, strict=True):
        variable.assign(ops.cast(part, variable.dtype))


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
