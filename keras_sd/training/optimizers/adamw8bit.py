"""AdamW with moments of 8 bits (Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization")."""

import math
from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.training.optimizers.adamw import AdamW
from keras_sd.training.optimizers.base import Part

BLOCK = 256
"""Number of values that share a scale."""
SMALLEST = 4096
"""Number of elements from which a variable has moments of 8 bits, as in bitsandbytes."""
_DECADES = 7


class DynamicMap:
    """The dynamic quantization of numbers up to 1 to 256 codes: seven powers of ten of equal spacing each.

    The decade from 10 ** (i - 7) to 10 ** (i - 6) has 2 ** i codes of each sign, or 2 ** (i + 1) without a
    sign. Codes ascend with the numbers; two more are 0 and 1. bitsandbytes looks numbers up in a table; here
    the same numbers are computed, as a look-up for every weight is slow on a GPU or TPU.

    Args:
        signed: whether numbers may be negative.
    """

    def __init__(self, signed):
        self.zero = 127 if signed else 0  # the code of 0
        self.signed = signed
        counts = [2**decade * (1 if signed else 2) for decade in range(_DECADES)]
        scales = [10.0 ** (decade - _DECADES + 1) for decade in range(_DECADES)]
        # Distance from the code of 0 to the first code of each decade, and to that of 1.
        firsts = [1 + sum(counts[:decade]) for decade in range(_DECADES + 1)]
        self.decades = list(zip(firsts, counts, scales, strict=False))
        self.last = firsts[-1]
        lowest = [scale * (0.1 + 0.45 / count) for _, count, scale in self.decades] + [1.0]
        highest = [0.0] + [scale * (1.0 - 0.45 / count) for _, count, scale in self.decades]
        # Above each of these a number is nearer to the next decade.
        self.bounds = [(low + high) / 2 for low, high in zip(lowest, highest, strict=True)]

    def decoded(self, codes):
        """Return the numbers of codes; both are float32."""
        steps = codes - self.zero
        distance, number = ops.abs(steps), ops.zeros_like(codes)
        for first, count, scale in self.decades:
            slope = 0.9 * scale / count
            number = ops.where(
                distance >= first, distance * slope + (0.1 * scale + (0.5 - first) * slope), number
            )
        number = ops.where(distance >= self.last, 1.0, number)
        return number * ops.sign(steps) if self.signed else number

    def encoded(self, numbers):
        """Return the codes of the nearest numbers; a small negative number does not become 0."""
        size, distance = ops.abs(numbers), ops.zeros_like(numbers)
        for (first, count, scale), bound in zip(self.decades, self.bounds, strict=False):
            place = ops.floor((size / scale - 0.1) * (count / 0.9))
            distance = ops.where(size > bound, ops.clip(place, 0.0, count - 1.0) + first, distance)
        distance = ops.where(size > self.bounds[-1], float(self.last), distance)
        if not self.signed:
            return distance
        below = self.zero - ops.clip(distance, 1.0, float(self.zero))
        return ops.where(numbers < 0.0, below, self.zero + distance)


SIGNED, UNSIGNED = DynamicMap(signed=True), DynamicMap(signed=False)


class AdamW8bit(AdamW):
    """AdamW whose moments have 8 bits for each element and a float32 scale for each 256 of them.

    A scale is the largest absolute value of its block. Variables of fewer than 4,096 elements keep moments of
    32 bits. Blocks are consecutive elements of the variable as it lies here; bitsandbytes takes those of
    torch's transposed layout. Arguments are those of `AdamW`.
    """

    def __init__(
        self,
        learning_rate: Any,
        ema_decay: float | None = 0.9999,
        epsilon: float = 1e-08,
        name: str = "adamw8bit",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, ema_decay, epsilon, name, **options)

    def state_of(self, variable: keras.Variable) -> dict[str, dict[str, Any]]:
        if not _is_quantized(variable.shape):
            return super().state_of(variable)
        blocks = math.ceil(math.prod(variable.shape) / BLOCK)
        kinds: dict[str, dict[str, Any]] = {}
        for moment in ("first", "second"):
            kinds[f"{moment} moment"] = {"dtype": "uint8"}
            kinds[f"{moment} scales"] = {"shape": (blocks,)}
        return kinds

    def group_of(self, variable: keras.Variable) -> Any:
        return None if _is_quantized(variable.shape) else super().group_of(variable)

    def rule(self, part: Part, weight: Tensor, state: list[Tensor], common: Any) -> tuple[Tensor, ...]:
        if not _is_quantized(part.shape):
            return super().rule(part, weight, state, common)
        moments = [
            _dequantized(codes, scales, map_)
            for codes, scales, map_ in zip(state[::2], state[1::2], (SIGNED, UNSIGNED), strict=True)
        ]
        weight, momentum, velocity = super().rule(part, weight, moments, common)
        return weight, *_quantized(momentum, SIGNED), *_quantized(velocity, UNSIGNED)


def _is_quantized(shape):
    return math.prod(shape) >= SMALLEST


def _blocks(array):
    """Return an array as rows of one block each, the last one filled up with zeros."""
    size = math.prod(array.shape)
    missing = -size % BLOCK
    flat = ops.reshape(array, (size,))
    return ops.reshape(ops.pad(flat, ((0, missing),)) if missing else flat, (-1, BLOCK))


def _as(shape, blocks):
    """Return the array of a shape from its blocks."""
    size = math.prod(shape)
    flat = ops.reshape(blocks, (-1,))
    return ops.reshape(flat if size % BLOCK == 0 else flat[:size], shape)


def _dequantized(codes, scales, map_):
    """Return a moment from codes of its shape and scales of its blocks."""
    return _as(codes.shape, _blocks(map_.decoded(codes)) * scales[:, None])


def _quantized(values, map_):
    """Return codes of a moment's shape and scales of its blocks."""
    blocks = _blocks(values)
    scales = ops.max(ops.abs(blocks), axis=1)
    codes = map_.encoded(blocks / ops.where(scales > 0.0, scales, 1.0)[:, None])
    return _as(values.shape, codes), scales
