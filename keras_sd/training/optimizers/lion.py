"""Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms")."""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.training.optimizers.base import EMAOptimizer, Part


class Lion(EMAOptimizer):
    """Lion with EMA copies of the weights: each step has the sign of a mixture of gradient and momentum.

    Args:
        learning_rate: a number or a Keras schedule; a tenth to a third of AdamW's.
        ema_decay: the largest decay of the EMA weights; None keeps none.
        beta_1: share of the momentum in the step's mixture.
        beta_2: decay rate of the momentum.
        weight_decay: decoupled weight decay.
        options: further arguments of `keras.optimizers.Optimizer`.
    """

    option_names = ("beta_1", "beta_2")

    def __init__(
        self,
        learning_rate: Any,
        ema_decay: float | None = 0.9999,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        weight_decay: float = 0.0,
        name: str = "lion",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, ema_decay, weight_decay, name, **options)
        self.beta_1, self.beta_2 = beta_1, beta_2

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        return {"momentum": {}}

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        rate, (momentum,), gradient = common, state, part.gradient
        direction = ops.sign(momentum * self.beta_1 + gradient * (1.0 - self.beta_1))
        weight = weight * (1.0 - rate * self.weight_decay) - direction * rate
        return weight, momentum * self.beta_2 + gradient * (1.0 - self.beta_2)
