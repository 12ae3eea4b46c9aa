"""Layers that all models share. Each has its weights once it is constructed.

All tensors are channels-last. The constructors take the widths of inputs and outputs. So nothing is traced to
find shapes, and an optimizer can be built before the first step.
"""

import math
import re

import keras
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.kernels import normalization
from keras_sd.kernels.convolution import convolve
from keras_sd.models.initializers import Deferred, deferred_weights, glorot_uniform, uniform


class Weights:
    """The creation of weights, with values from a file while a model is being opened."""

    def add_weight(self, shape=None, initializer=None, **options):
        backend.keep_programs()  # TensorFlow reads its flags when it creates the first weight
        deferred = deferred_weights()
        if deferred is None:
            return super().add_weight(shape, initializer, **options)
        initializer = Deferred(initializer)
        variable = super().add_weight(shape, initializer, **options)
        deferred[id(variable)] = initializer
        return variable


class Layer(Weights, keras.layers.Layer):
    """A layer that has all of its weights and sublayers once it is constructed.

    It sets `built`. Otherwise Keras traces a layer before its first call, and the layers inside it again.

    The default name is that of the class, without a number: TensorFlow takes a millisecond to create the
    first variable of a name and a shape, and 0.2 ms for each further one.
    """

    def __init__(self, name=None, **kwargs):
        super().__init__(name=name or re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower(), **kwargs)
        self.built = True


class LowRankUpdate(Weights):
    """The low-rank update (LoRA, Hu et al., 2022) of a linear layer or a convolution.

    With an update, the layer returns `base(x) + lora_scale * lora_B(lora_A(x))`.
    """

    lora_A = lora_B = None

    def add_low_rank(self, rank, alpha):
        """Add an update of that rank, scaled by `alpha / rank`. It has no effect before it is trained.

        Its initial values are those of Hu et al.'s code: uniform in +-1 / sqrt(inputs), and zeros.
        """
        inputs = math.prod(self.kernel.shape[:-1])
        with backend.unlocked(self):
            self.lora_A, self.lora_B = self._low_rank_pair(rank, uniform(inputs**-0.5))
        self.lora_scale = alpha / rank

    def call(self, inputs):
        outputs = super().call(inputs)
        if self.lora_A is None:
            return outputs
        return outputs + self.lora_scale * self.lora_B(self.lora_A(inputs))


class Dense(LowRankUpdate, keras.layers.Dense):
    """Keras' linear layer with an optional low-rank update."""

    def _low_rank_pair(self, rank, initializer):
        inputs, outputs = self.kernel.shape
        return (
            dense(inputs, rank, use_bias=False, kernel_initializer=initializer),
            dense(rank, outputs, use_bias=False, kernel_initializer="zeros"),
        )


class Conv2D(LowRankUpdate, keras.layers.Conv2D):
    """Keras' convolution with an optional low-rank update: a kernel of the same size, then one of 1x1."""

    def convolution_op(self, inputs, kernel):
        outputs = convolve(inputs, kernel, self.strides, self.padding)
        return super().convolution_op(inputs, kernel) if outputs is None else outputs

    def _low_rank_pair(self, rank, initializer):
        inputs, outputs = self.kernel.shape[2:]
        options = {"strides": self.strides, "padding": self.padding, "kernel_initializer": initializer}
        return (
            convolution(inputs, rank, self.kernel_size, use_bias=False, **options),
            convolution(rank, outputs, 1, use_bias=False, kernel_initializer="zeros"),
        )


def sublayers(layer):
    """Yield `(path, sublayer)` for each layer in a public attribute, or in a list in one."""
    for attribute, value in vars(layer).items():
        if attribute.startswith("_"):
            continue
        if isinstance(value, keras.layers.Layer):
            yield attribute, value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, keras.layers.Layer):
                    yield f"{attribute}.{index}", item


def sequential(layers, inputs):
    """Return the result of layers that are applied one after the other."""
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def dense(inputs, outputs, *, kernel_initializer=glorot_uniform, **options):
    """Return a linear layer from `inputs` to `outputs` features on the last axis, with its weights.

    Args:
        options: other options of `keras.layers.Dense`.
    """
    layer = Dense(outputs, kernel_initializer=kernel_initializer, name="dense", **options)
    layer.build((None, inputs))
    return layer


class Embedding(Weights, keras.layers.Embedding):
    """Keras' table of vectors."""


def embedding(entries, width, initializer):
    """Return a table of `entries` learned vectors."""
    layer = Embedding(entries, width, initializer, name="embedding")
    layer.build()
    return layer


def convolution(inputs, outputs, kernel_size=3, *, padding="same", **options):
    """Return a two-dimensional convolution from `inputs` to `outputs` channels, with its weights.

    Args:
        options: other options of `keras.layers.Conv2D`.
    """
    options = {"kernel_initializer": glorot_uniform} | options
    layer = Conv2D(outputs, kernel_size, padding=padding, name="convolution", **options)
    layer.build((None, None, None, inputs))
    return layer


class LayerNormalization(Layer):
    """Layer normalisation over the last axis."""

    def __init__(self, features, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.gamma = self.add_weight(shape=(features,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(features,), initializer="zeros", name="beta")

    def call(self, inputs):
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        return normalization.layer_normalization(inputs, gamma, beta, self.epsilon)


class GroupNormalization(Layer):
    """Group normalisation of `(n, height, width, channels)`, followed by SiLU with `silu`."""

    def __init__(self, channels, groups=32, epsilon=1e-5, *, silu=False, **kwargs):
        super().__init__(**kwargs)
        if channels % groups:
            raise UserError(f"{channels} channels do not divide into {groups} groups; change norm_num_groups")
        self.channels = channels
        self.groups = groups
        self.epsilon = epsilon
        self.silu = silu
        self.gamma = self.add_weight(shape=(channels,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(channels,), initializer="zeros", name="beta")

    def call(self, inputs):
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        return normalization.group_normalization(
            inputs, gamma, beta, self.groups, self.epsilon, silu=self.silu
        )


class ResnetBlock(Layer):
    """A residual block of two convolutions. A timestep embedding, if there is one, is added between them."""

    def __init__(self, inputs, outputs, *, time_features=None, groups=32, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.norm1 = GroupNormalization(inputs, groups, epsilon, silu=True)
        self.conv1 = convolution(inputs, outputs)
        self.time_emb_proj = dense(time_features, outputs) if time_features else None
        self.norm2 = GroupNormalization(outputs, groups, epsilon, silu=True)
        # The branch starts at zero, so the block starts as its shortcut, which trains faster.
        self.conv2 = convolution(outputs, outputs, kernel_initializer="zeros")
        self.conv_shortcut = convolution(inputs, outputs, 1) if inputs != outputs else None

    def call(self, inputs, time_embedding=None):
        hidden = self.conv1(self.norm1(inputs))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(time_embedding)[:, None, None, :]
        hidden = self.conv2(self.norm2(hidden))
        shortcut = inputs if self.conv_shortcut is None else self.conv_shortcut(inputs)
        return shortcut + hidden


class Downsample(Layer):
    """A strided convolution that halves height and width.

    `padding` is the zero padding ((top, bottom), (left, right)). As the published weights expect, it is 1 on
    all sides in the UNet, and at the bottom and on the right in the VAE.
    """

    def __init__(self, channels, padding=((1, 1), (1, 1)), **kwargs):
        super().__init__(**kwargs)
        self.padding = padding
        self.conv = convolution(channels, channels, strides=2, padding="valid")

    def call(self, inputs):
        return self.conv(ops.pad(inputs, ((0, 0), *self.padding, (0, 0))))


class Upsample(Layer):
    """Nearest-neighbour interpolation to twice the height and width, then a convolution.

    With `size` `(height, width)`, the last row or column is cut off if that side is odd. So the up path
    returns to the sizes of the down path.
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.conv = convolution(channels, channels)

    def call(self, inputs, size=(None, None)):
        height, width = size
        enlarged = ops.repeat(ops.repeat(inputs, 2, axis=1), 2, axis=2)
        return self.conv(enlarged[:, :height, :width])


class TimestepEmbedding(Layer):
    """Two linear layers on the sinusoidal features of a timestep (Ho et al., 2020)."""

    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(**kwargs)
        self.linear_1 = dense(inputs, outputs)
        self.linear_2 = dense(outputs, outputs)

    def call(self, features):
        return self.linear_2(ops.silu(self.linear_1(features)))


def sinusoidal_features(timesteps, features, *, flip_sin_to_cos=True, frequency_shift=0):
    """Return sinusoids of `(n,)` timesteps at geometrically spaced frequencies: `(n, features)` float32.

    Vaswani et al. (2017), section 3.5. The published UNets have the cosines first.
    """
    half = features // 2
    exponents = -ops.log(10000.0) * ops.arange(half, dtype="float32") / (half - frequency_shift)
    angles = ops.cast(timesteps, "float32")[:, None] * ops.exp(exponents)[None, :]
    sines, cosines = ops.sin(angles), ops.cos(angles)
    return ops.concatenate([cosines, sines] if flip_sin_to_cos else [sines, cosines], axis=-1)
