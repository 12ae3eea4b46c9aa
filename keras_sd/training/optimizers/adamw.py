"""AdamW (Loshchilov and Hutter, 2019)."""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.training.optimizers.base import EMAOptimizer, Part, bias_correction


class AdamW(EMAOptimizer):
    """AdamW with EMA copies of the weights.

    `epsilon` is added to the bias-corrected root of the second moment, as in torch and in the paper's
    algorithm 1; Keras adds it before the correction, where it has up to thirty times the effect.

    Args:
        learning_rate: a number or a Keras schedule.
        ema_decay: the largest decay of the EMA weights; None keeps none.
        epsilon: what is added to the root of the second moment.
        beta_1, beta_2: decay rates of the first and the second moment.
        weight_decay: decoupled weight decay.
        options: further arguments of `keras.optimizers.Optimizer`.
    """

    option_names = ("beta_1", "beta_2", "epsilon")

    def __init__(
        self,
        learning_rate: Any,
        ema_decay: float | None = 0.9999,
        epsilon: float = 1e-08,
        name: str = "adamw",
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        weight_decay: float = 0.004,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, ema_decay, weight_decay, name, **options)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        return {"first moment": {}, "second moment": {}}

    def start_update(self, rate: Tensor, parts: list[Part]) -> Any:
        """Return the factors of Kingma and Ba (2015), algorithm 1."""
        update = ops.cast(self.iterations + 1, "float32")
        step_size = rate / bias_correction(self.beta_1, update)
        root_correction = ops.sqrt(bias_correction(self.beta_2, update))
        retained = 1.0 - rate * self.weight_decay
        shares = (
            ops.convert_to_tensor(number, "float32")
            for number in (1.0 - self.beta_1, 1.0 - self.beta_2, self.epsilon)
        )
        return step_size, root_correction, retained, *shares

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        step_size, root_correction, retained, first_share, second_share, epsilon = common
        momentum, velocity = state
        momentum = momentum + (part.gradient - momentum) * first_share
        velocity = velocity + (ops.square(part.gradient) - velocity) * second_share
        weight = weight * retained - momentum * step_size / (ops.sqrt(velocity) / root_correction + epsilon)
        return weight, momentum, velocity
