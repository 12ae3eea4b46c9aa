"""Adafactor (Shazeer and Stern, 2018), as in transformers."""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.training.optimizers.base import EMAOptimizer, Part


class Adafactor(EMAOptimizer):
    """Adafactor with EMA copies of the weights: the second moment is a product of row and column means.

    As in transformers, a convolution's kernel is factored over height and width, so its state has 2/3 of the
    weights' size for 3 x 3 and the full size for 1 x 1. Vectors are not factored.

    Args:
        learning_rate: a number or a Keras schedule; without effect with `relative_step`.
        ema_decay: the largest decay of the EMA weights; None keeps none.
        relative_step: whether the learning rate of update t is min(0.01, 1 / sqrt(t)).
        scale_parameter: whether the learning rate is multiplied by the root mean square of the weight.
        warmup_init: whether the bound 0.01 of `relative_step` is 1e-6 t instead.
        beta_1: decay rate of the average of updates; None keeps no average.
        clip_threshold: root mean square to which the update of a weight is clipped.
        decay_rate: exponent of t in the second moment's decay rate, 1 - t ** decay_rate.
        epsilon_1, epsilon_2: what is added to squared gradients, and the least scale of a weight.
        weight_decay: decoupled weight decay.
        options: further arguments of `keras.optimizers.Optimizer`.
    """

    option_names = (
        *("relative_step", "scale_parameter", "warmup_init", "beta_1", "clip_threshold", "decay_rate"),
        *("epsilon_1", "epsilon_2"),
    )

    def __init__(
        self,
        learning_rate: Any,
        ema_decay: float | None = 0.9999,
        relative_step: bool = False,
        scale_parameter: bool = False,
        warmup_init: bool = False,
        beta_1: float | None = None,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        weight_decay: float = 0.0,
        name: str = "adafactor",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, ema_decay, weight_decay, name, **options)
        self.relative_step, self.scale_parameter = relative_step, scale_parameter
        self.warmup_init, self.beta_1 = warmup_init, beta_1
        self.clip_threshold, self.decay_rate = clip_threshold, decay_rate
        self.epsilon_1, self.epsilon_2 = epsilon_1, epsilon_2

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        axes = _factored_axes(variable.shape)
        if axes is None:
            kinds = {"second moment": {}}
        else:
            shapes = (_without(variable.shape, axis) for axis in reversed(axes))
            kinds = {
                f"{name} means": {"shape": shape}
                for name, shape in zip(("row", "column"), shapes, strict=True)
            }
        return kinds | ({} if self.beta_1 is None else {"first moment": {}})

    def group_of(self, variable: keras.Variable) -> Any:
        """Vectors of one length are rows of one matrix: clipping and scale belong to each of them."""
        return variable.shape[0] if variable.ndim == 1 else None

    def rate_of_update(self, learning_rate: Tensor) -> Tensor:
        if not self.relative_step:
            return super().rate_of_update(learning_rate)
        update = ops.cast(self.iterations + 1, "float32")
        return ops.minimum(update * 1e-6 if self.warmup_init else 0.01, ops.rsqrt(update))

    def start_update(self, rate: Tensor, parts: list[Part]) -> Any:
        update = ops.cast(self.iterations + 1, "float32")
        return rate, ops.power(update, self.decay_rate)

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        rate, share = common  # of the new squares in the second moment
        # One row for each vector, or the whole variable.
        shape, axes = (part.shape, None) if len(part.shape) != 1 else ((-1, *part.shape), -1)
        gradient, values = (ops.reshape(array, shape) for array in (part.gradient, weight))
        squares = ops.square(gradient) + self.epsilon_1
        factored = _factored_axes(part.shape)
        if factored is None:
            second = state[0] + (ops.reshape(squares, ops.shape(state[0])) - state[0]) * share
            second_moment = [second]
            update = gradient * ops.rsqrt(ops.reshape(second, shape))
        else:
            rows, columns = (
                means + (ops.mean(squares, axis=axis, keepdims=True) - means) * share
                for means, axis in zip(state[:2], reversed(factored), strict=True)
            )
            second_moment = [rows, columns]
            relative = rows / ops.mean(rows, axis=factored[0], keepdims=True)
            update = gradient * ops.rsqrt(relative) * ops.rsqrt(columns)
        update = update / ops.maximum(_root_mean_square(update, axes) / self.clip_threshold, 1.0)
        if self.scale_parameter:
            rate = rate * ops.maximum(_root_mean_square(values, axes), self.epsilon_2)
        update = ops.reshape(update * rate, ops.shape(weight))
        average = []
        if self.beta_1 is not None:
            update = state[-1] * self.beta_1 + update * (1.0 - self.beta_1)
            average = [update]
        kept = ops.reshape(values * (1.0 - rate * self.weight_decay), ops.shape(weight))
        return kept - update, *second_moment, *average


def _factored_axes(shape):
    """Return the two axes of a kernel that are torch's last ones; None if there are no means to take."""
    if len(shape) < 2:
        return None
    axes = (0, 1) if len(shape) == 4 else (len(shape) - 2, len(shape) - 1)
    # The product of means over one value is that value.
    return axes if min(shape[axis] for axis in axes) > 1 else None


def _without(shape, axis):
    return tuple(1 if place == axis else size for place, size in enumerate(shape))


def _root_mean_square(array, axes):
    return ops.sqrt(ops.mean(ops.square(array), axis=axes, keepdims=True))
