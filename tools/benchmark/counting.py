"""Counts what a model multiplies: in one abstract trace of its forward pass, in which nothing is computed.

A trace of its own, as that of a compiled step is none to count in: Keras traces a model once more before its
first step on JAX, a gradient that recomputes does so again, and the body of a loop is traced once.
"""

import contextlib
import math

import keras

from keras_sd.models import attention, clip_transformer

# As a multiple of the forward pass. A trained kernel needs the gradient of its inputs and its own; a frozen
# one, as all kernels of a LoRA step, has none of its own. Attention's products of two activations have a
# third pass in both; a LoRA step is counted without it, so its share of the peak is too low: by 7 % at 512
# pixels.
PASSES = {"training": 3, "training-lora": 2}


def multiplications(function, inputs):
    """Return how many multiply-accumulates a function of a dictionary of arrays has.

    Linear layers, convolutions (by their definition, whatever computes them) and attention are counted.

    Args:
        function: calls Keras layers on the tensors of such a dictionary; it is traced, not run.
        inputs: name -> anything with a `shape` and a `dtype`.
    """
    found = []
    symbols = {
        name: keras.KerasTensor(array.shape, keras.backend.standardize_dtype(array.dtype))
        for name, array in inputs.items()
    }
    with _counted(found):
        _Traced(function)(symbols)
    return sum(found)


class _Traced(keras.Operation):
    """A function that Keras traces, once, where it is given symbols."""

    def __init__(self, function):
        super().__init__()
        self.call = function


@contextlib.contextmanager
def _counted(found):
    """Add what is multiplied by all that is traced inside."""
    dense, convolution = keras.layers.Dense.call, keras.layers.Conv2D.call
    attend = attention.scaled_dot_product

    def counting_layer(original):
        def call(layer, *arguments, **options):
            outputs = original(layer, *arguments, **options)
            found.append(math.prod(outputs.shape) * math.prod(layer.kernel.shape[:-1]))
            return outputs

        return call

    def counting_attention(query, key, value, *arguments, **options):
        scores = math.prod(query.shape[:-1]) * key.shape[1]
        found.append(scores * (query.shape[-1] + value.shape[-1]))
        return attend(query, key, value, *arguments, **options)

    keras.layers.Dense.call, keras.layers.Conv2D.call = counting_layer(dense), counting_layer(convolution)
    attention.scaled_dot_product = clip_transformer.scaled_dot_product = counting_attention
    try:
        yield
    finally:
        keras.layers.Dense.call, keras.layers.Conv2D.call = dense, convolution
        attention.scaled_dot_product = clip_transformer.scaled_dot_product = attend
