"""Prodigy (Mishchenko and Defazio, 2023), which estimates the learning rate."""

from typing import Any

import keras
from keras import ops

from keras_sd import backend
from keras_sd.arguments import Tensor
from keras_sd.training.optimizers.base import EMAOptimizer, Part, bias_correction, joined


class Prodigy(EMAOptimizer):
    """Prodigy with EMA copies of the weights, as in the authors' package `prodigyopt`.

    The learning rate is multiplied by d, an estimate of the distance to the solution, which grows from `d0`.

    Args:
        learning_rate: a number or a Keras schedule, which is usually 1 at its highest.
        ema_decay: the largest decay of the EMA weights; None keeps none.
        beta_1, beta_2: decay rates of the first and the second moment.
        beta_3: decay rate of the sums for the estimate; None is the root of `beta_2`.
        epsilon: what is added to the root of the second moment, times d.
        decouple: whether the weight decay is AdamW's, and not added to the gradient.
        use_bias_correction: whether the step is corrected for moments that start from zeros, as Adam's.
        safeguard_warmup: whether the estimate's denominator leaves the learning rate out, for a warm-up.
        d0: the first estimate.
        d_coef: factor of the estimate.
        growth_rate: the largest factor by which d grows in one update; None for any.
        weight_decay: decay of the weights.
        options: further arguments of `keras.optimizers.Optimizer`.
    """

    option_names = (
        *("beta_1", "beta_2", "beta_3", "epsilon", "decouple", "use_bias_correction"),
        *("safeguard_warmup", "d0", "d_coef", "growth_rate"),
    )

    figure_names = (*EMAOptimizer.figure_names, "prodigy_d")

    def __init__(
        self,
        learning_rate: Any = 1.0,
        ema_decay: float | None = 0.9999,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        beta_3: float | None = None,
        epsilon: float = 1e-8,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
        weight_decay: float = 0.0,
        name: str = "prodigy",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, ema_decay, weight_decay, name, **options)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.beta_3 = beta_2**0.5 if beta_3 is None else beta_3
        self.decouple, self.use_bias_correction = decouple, use_bias_correction
        self.safeguard_warmup, self.growth_rate = safeguard_warmup, growth_rate
        self.d0, self.d_coef = d0, d_coef

    def add_common_state(self) -> list[str]:
        names = ["estimate", "largest estimate", "numerator", "updates"]
        first = {"estimate": self.d0, "largest estimate": self.d0}
        self._estimate, self._largest, self._numerator, self._updates = (
            self.add_state(None, name, shape=(), first=first.get(name, 0.0)) for name in names
        )
        return names

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        return {kind: {} for kind in ("first moment", "second moment", "sum", "start")}

    def fill_state(self, variables: list[keras.Variable]) -> None:
        for state, value in zip(self.state, backend.copies(variables), strict=True):
            state[-1].assign(value)

    def start_update(self, rate: Tensor, parts: list[Part]) -> Any:
        """Estimate d from all variables; return the factors of the update (algorithm 4 of the paper)."""
        d, largest, numerator, updates = (
            ops.cast(variable, "float32")
            for variable in (self._estimate, self._largest, self._numerator, self._updates)
        )
        step_size = d * rate
        if self.use_bias_correction:
            step_size = step_size * ops.sqrt(bias_correction(self.beta_2, updates + 1.0))
            step_size = step_size / bias_correction(self.beta_1, updates + 1.0)
        scale = d / self.d0  # keeps the sums away from the smallest numbers
        gain = scale * (d if self.safeguard_warmup else step_size)
        dot = denominator = 0.0
        for part in parts:
            weight, total, start = joined(part.variables), joined(part.state[2]), joined(part.state[3])
            if self.weight_decay and not self.decouple:
                part.gradient = part.gradient + weight * self.weight_decay
            dot = dot + ops.sum(part.gradient * (start - weight))
            denominator = denominator + ops.sum(ops.abs(total * self.beta_3 + part.gradient * gain))
        # An update with a learning rate of 0, the first of a warm-up, counts for nothing.
        has_rate = rate > 0.0
        moves = ops.logical_and(has_rate, denominator > 0.0)
        numerator_now = numerator * self.beta_3 + scale * step_size * dot
        found = self.d_coef * numerator_now / ops.where(moves, denominator, 1.0)
        grown = ops.where(d == ops.convert_to_tensor(self.d0, "float32"), ops.maximum(d, found), d)
        largest_now = ops.maximum(largest, found)
        if self.growth_rate is None:
            grown = largest_now
        else:
            grown = ops.minimum(largest_now, grown * self.growth_rate)
        for variable, old, new in (
            (self._estimate, d, grown),
            (self._largest, largest, largest_now),
            (self._numerator, numerator, numerator_now),
            (self._updates, updates, updates + 1.0),
        ):
            variable.assign(ops.where(moves, new, old))
        d_now = ops.where(moves, grown, d)
        self.figures["prodigy_d"].assign(d_now)
        return has_rate, moves, d, step_size, gain, d_now

    def updates_by_factor(self, rate: Tensor, parts: list[Part]) -> dict[float, Any]:
        """Return the factors of the updates; the estimate is one, and a factor is of the step alone."""
        has_rate, moves, d, step_size, *others = self.start_update(rate, parts)
        factors = dict.fromkeys(part.factor for part in parts)
        return {factor: (has_rate, moves, d, step_size * factor, *others) for factor in factors}

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        has_rate, moves, d, step_size, gain, d_now = common
        first, second, total, start = state
        gradient = part.gradient
        first_now = first * self.beta_1 + gradient * (d * (1.0 - self.beta_1))
        second_now = second * self.beta_2 + ops.square(gradient) * (ops.square(d) * (1.0 - self.beta_2))
        total_now = total * self.beta_3 + gradient * gain
        kept = weight
        if self.decouple:
            kept = weight - weight * (step_size * self.weight_decay)
        moved = kept - step_size * first_now / (ops.sqrt(second_now) + d_now * self.epsilon)
        new = ((first_now, first), (second_now, second), (total_now, total))
        return (
            ops.where(moves, moved, weight),
            *(ops.where(has_rate, value, old) for value, old in new),
            start,
        )
