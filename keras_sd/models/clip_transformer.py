"""CLIP's transformer: the pre-norm attention blocks that its text and image towers share.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; the
initial weights follow it too. Attribute names are those of transformers' ``CLIPEncoder``.
"""

import numpy as np
from keras import ops

from keras_sd.errors import UserError
from keras_sd.models.attention import scaled_dot_product
from keras_sd.models.gradient_checkpointing import RecomputingLayer
from keras_sd.models.initializers import normal
from keras_sd.models.layers import Layer, LayerNormalization, dense


def quick_gelu(inputs):
    """Return the sigmoid approximation of GELU in OpenAI's CLIP: ``x * sigmoid(1.702 x)``."""
    return inputs * ops.sigmoid(1.702 * inputs)


def gelu(inputs):
    """Return the exact GELU of OpenCLIP: ``x * Phi(x)``."""
    return ops.gelu(inputs, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class SelfAttention(Layer):
    """Multi-head attention of `(n, tokens, width)` to itself.

    With `causal`, a position sees only itself and those before it.
    """

    def __init__(self, config, *, causal, **kwargs):
        super().__init__(**kwargs)
        width, self.heads = config.hidden_size, config.num_attention_heads
        if width % self.heads:
            raise UserError(
                f"CLIP config: hidden_size {width} does not divide into {self.heads} heads; "
                "make it a multiple of num_attention_heads"
            )
        self.causal = causal
        scale = width**-0.5
        self.q_proj = dense(width, width, kernel_initializer=normal(scale))
        self.k_proj = dense(width, width, kernel_initializer=normal(scale))
        self.v_proj = dense(width, width, kernel_initializer=normal(scale))
        scale *= (2 * config.num_hidden_layers) ** -0.5
        self.out_proj = dense(width, width, kernel_initializer=normal(scale))

    def call(self, inputs):
        tokens, width = inputs.shape[1:]
        query, key, value = (
            ops.reshape(project(inputs), (-1, tokens, self.heads, width // self.heads))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = np.tri(tokens, dtype=bool) if self.causal else None
        attended = scaled_dot_product(query, key, value, mask)
        return self.out_proj(ops.reshape(attended, (-1, tokens, width)))


class MultiLayerPerceptron(Layer):
    """Two linear layers with an activation between them, for each position separately."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"CLIP config: hidden_act {config.hidden_act!r} is unknown; use {' or '.join(ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.hidden_act]
        width, hidden, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        self.fc1 = dense(width, hidden, kernel_initializer=normal((2 * width) ** -0.5))
        self.fc2 = dense(hidden, width, kernel_initializer=normal((2 * width * depth) ** -0.5))

    def call(self, inputs):
        return self.fc2(self.activation(self.fc1(inputs)))


class TransformerBlock(Layer):
    """Attention, then the perceptron, each with layer normalisation before it and a residual connection."""

    def __init__(self, config, *, causal, **kwargs):
        super().__init__(**kwargs)
        self.layer_norm1 = LayerNormalization(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config, causal=causal)
        self.layer_norm2 = LayerNormalization(config.hidden_size, config.layer_norm_eps)
        self.mlp = MultiLayerPerceptron(config)

    def call(self, inputs):
        hidden = inputs + self.self_attn(self.layer_norm1(inputs))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Transformer(RecomputingLayer):
    """A stack of blocks over `(n, tokens, width)`.

    Args:
        config: a ``TextEncoderConfig`` or an ``ImageEncoderConfig``.
        causal: whether a position sees only itself and those before it.
    """

    def __init__(self, config, *, causal, **kwargs):
        super().__init__(**kwargs)
        self.layers = [TransformerBlock(config, causal=causal) for _ in range(config.num_hidden_layers)]

    def call(self, hidden, depth=None):
        """Apply the first `depth` blocks, or all of them."""
        for layer in self.layers[:depth]:
            hidden = self._recomputed(layer)(hidden)
        return hidden
