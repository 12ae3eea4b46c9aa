"""Attention to the text and between positions in the UNet, and between positions in the VAE."""

import keras
from keras import ops

from keras_sd.errors import UserError
from keras_sd.kernels import chunked_attention, flash_attention
from keras_sd.models.layers import GroupNormalization, Layer, LayerNormalization, convolution, dense


def scaled_dot_product(query, key, value, mask=None, *, upcast=False):
    """Return the attention of `(n, tokens, heads, head_size)` tensors (Vaswani et al., 2017).

    Large matrices of scores are never held whole: a GPU has kernels for that, and other devices use chunked
    attention (`kernels.chunked_attention`), with the same result.

    Args:
        mask: None, or a boolean that broadcasts to `(n, heads, queries, keys)`: the keys that a query sees.
            Masked attention is never chunked; texts are short.
        upcast: compute scores in float32, for models whose scores are too large for float16.

    Returns:
        `(n, queries, heads, head_size)`.
    """
    if mask is not None:
        return _masked(query, key, value, mask, upcast)
    if flash_attention.is_available(query):
        return flash_attention.attention(query, key, value)
    heads = query.shape[2]
    query, key, value = (
        ops.reshape(array, (-1, array.shape[1], heads * array.shape[3])) for array in (query, key, value)
    )
    attended = chunked_attention.attention(query, key, value, heads, upcast=upcast)
    return ops.reshape(attended, (-1, query.shape[1], heads, value.shape[-1] // heads))


def _masked(query, key, value, mask, upcast):
    if upcast:
        query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    scale = query.shape[-1] ** -0.5
    scores = ops.einsum("nqhd,nkhd->nhqk", query * ops.cast(scale, query.dtype), key)
    # A softmax of many terms needs more precision than float16 or bfloat16 has.
    scores = ops.where(mask, ops.cast(scores, "float32"), -float("inf"))
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    return ops.einsum("nhqk,nkhd->nqhd", weights, value)


class Attention(Layer):
    """Multi-head attention of `(n, tokens, features)` to themselves or to a context."""

    def __init__(self, features, context_features, heads, *, upcast=False, **kwargs):
        super().__init__(**kwargs)
        if features % heads:
            raise UserError(
                f"{features} channels do not divide into {heads} attention heads; "
                "change attention_head_dim, which is the number of heads"
            )
        self.heads = heads
        self.head_size = features // heads
        self.upcast = upcast
        self.to_q = dense(features, features, use_bias=False)
        self.to_k = dense(context_features, features, use_bias=False)
        self.to_v = dense(context_features, features, use_bias=False)
        self.to_out = [dense(features, features)]

    def _split_heads(self, values):
        return ops.reshape(values, (-1, values.shape[1], self.heads, self.head_size))

    def call(self, inputs, context=None):
        context = inputs if context is None else context
        query, key, value = (
            self._split_heads(project(source))
            for project, source in ((self.to_q, inputs), (self.to_k, context), (self.to_v, context))
        )
        attended = scaled_dot_product(query, key, value, upcast=self.upcast)
        return self.to_out[0](ops.reshape(attended, (-1, inputs.shape[1], self.heads * self.head_size)))


class GEGLU(Layer):
    """A linear layer multiplied by the GELU of a second one (Shazeer, 2020)."""

    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(**kwargs)
        self.proj = dense(inputs, 2 * outputs)

    def call(self, inputs):
        values, gate = ops.split(self.proj(inputs), 2, axis=-1)
        return values * ops.gelu(gate, approximate=False)


class FeedForward(Layer):
    """The position-wise network of a transformer; its hidden layer is four times as wide."""

    def __init__(self, features, **kwargs):
        super().__init__(**kwargs)
        # The published models have a dropout at index 1; its rate is 0 in all of Stable Diffusion.
        self.net = [GEGLU(features, 4 * features), keras.layers.Identity(), dense(4 * features, features)]

    def call(self, inputs):
        for layer in self.net:
            inputs = layer(inputs)
        return inputs


class BasicTransformerBlock(Layer):
    """Self-attention, attention to the text and a feed-forward network, with residual connections."""

    def __init__(
        self, features, context_features, heads, *, only_cross_attention=False, upcast=False, **kwargs
    ):
        super().__init__(**kwargs)
        self.only_cross_attention = only_cross_attention
        first_features = context_features if only_cross_attention else features
        self.norm1 = LayerNormalization(features)
        self.attn1 = Attention(features, first_features, heads, upcast=upcast)
        self.norm2 = LayerNormalization(features)
        self.attn2 = Attention(features, context_features, heads, upcast=upcast)
        self.norm3 = LayerNormalization(features)
        self.ff = FeedForward(features)

    def call(self, inputs, context):
        hidden = inputs + self.attn1(self.norm1(inputs), context if self.only_cross_attention else None)
        hidden = hidden + self.attn2(self.norm2(hidden), context)
        return hidden + self.ff(self.norm3(hidden))


class SpatialTransformer(Layer):
    """A transformer block over the positions of `(n, height, width, channels)` and a text context.

    The projections in and out are 1x1 convolutions in SD 1 and linear layers in SD 2.
    """

    def __init__(
        self,
        channels,
        context_features,
        heads,
        *,
        groups=32,
        use_linear_projection=False,
        only_cross_attention=False,
        upcast=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.channels = channels

        def projection(**options):
            if use_linear_projection:
                return dense(channels, channels, **options)
            return convolution(channels, channels, 1, **options)

        self.norm = GroupNormalization(channels, groups, 1e-6)
        self.proj_in = projection()
        self.transformer_blocks = [
            BasicTransformerBlock(
                channels, context_features, heads, only_cross_attention=only_cross_attention, upcast=upcast
            )
        ]
        self.proj_out = projection(kernel_initializer="zeros")

    def call(self, inputs, context):
        height, width = inputs.shape[1:3]
        hidden = self.proj_in(self.norm(inputs))
        hidden = ops.reshape(hidden, (-1, height * width, self.channels))
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        hidden = ops.reshape(hidden, (-1, height, width, self.channels))
        return inputs + self.proj_out(hidden)


class AttentionBlock(Layer):
    """Single-head self-attention over the positions of a feature map, as in the VAE's middle."""

    def __init__(self, channels, *, groups=32, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.group_norm = GroupNormalization(channels, groups, epsilon)
        self.to_q = dense(channels, channels)
        self.to_k = dense(channels, channels)
        self.to_v = dense(channels, channels)
        self.to_out = [dense(channels, channels, kernel_initializer="zeros")]

    def call(self, inputs):
        height, width = inputs.shape[1:3]
        hidden = ops.reshape(self.group_norm(inputs), (-1, height * width, self.channels))
        query, key, value = (project(hidden)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))
        # The only head is as wide as the features, so its scores are the largest of the model.
        attended = self.to_out[0](scaled_dot_product(query, key, value, upcast=True)[:, :, 0])
        return inputs + ops.reshape(attended, (-1, height, width, self.channels))
