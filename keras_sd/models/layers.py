"""Layers that all models share. Each has its weights once it is constructed.

All tensors are channels-last. The constructors take the widths of inputs and outputs. So nothing is traced to
find shapes, and an optimizer can be built before the first step.
"""

import math
import re

import keras
import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.kernels import normalization
from keras_sd.kernels.convolution import convolve
from keras_sd.models.initializers import Deferred, deferred_weights, glorot_uniform, uniform
from keras_sd.models.quantized_kernel import QuantizableKernel


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
    """The update of a linear layer or a convolution that is trained in place of its weights.

    LoRA (Hu et al., 2022) returns `base(x) + lora_scale * lora_B(lora_A(x))`. DoRA (Liu et al., 2024) also
    gives each row of the updated weight the length `lora_magnitude_vector`. LoKr (Yeh et al., 2024) adds
    `lora_scale` times the Kronecker product of `lokr_w1` and `lokr_w2`, or the product of its factors.

    Attributes:
        has_active_update: False lets the layer return `base(x)`.
    """

    lora_A = lora_B = lora_magnitude_vector = None
    lokr_w1 = lokr_w2 = lokr_w2_a = lokr_w2_b = None
    has_active_update = True

    def add_low_rank(self, rank, scale, *, use_dora=False):
        """Add an update of LoRA, or of DoRA, of that rank. It has no effect before it is trained.

        Its initial values are those of Hu et al.'s code: uniform in +-1 / sqrt(inputs), and zeros.
        """
        inputs = math.prod(self.kernel.shape[:-1])
        with backend.unlocked(self):
            self.lora_A = self._inner(rank, uniform(inputs**-0.5))
            self.lora_B = self._outer(rank, self.kernel.shape[-1], "zeros")
            if use_dora:
                kernel = backend.to_numpy(self.kernel).astype("float32")
                lengths = np.sqrt(np.square(kernel.reshape(-1, kernel.shape[-1])).sum(axis=0))
                self.lora_magnitude_vector = self.add_weight(
                    shape=lengths.shape,
                    initializer=lambda shape, dtype: ops.convert_to_tensor(lengths, dtype),
                    name="lora_magnitude_vector",
                    dtype="float32",
                    autocast=False,
                )
        self.lora_scale = scale

    def add_kronecker(self, inputs, outputs, rank, scale):
        """Add an update of LoKr. It has no effect before it is trained.

        Its initial values are those of LyCORIS: uniform in +-1 / sqrt(columns), and zeros.

        Args:
            inputs, outputs: pairs whose products are the layer's inputs and outputs: the columns and the rows
                of both matrices.
            rank: that of the second matrix; None for a whole one.
        """
        columns, rows = inputs[0], outputs[0]
        with backend.unlocked(self):
            self.lokr_w1 = self.add_weight(
                shape=(rows, columns), initializer=uniform(columns**-0.5), name="lokr_w1"
            )
            if rank is None:
                self.lokr_w2 = self._inner(outputs[1], "zeros", inputs[1])
            else:
                self.lokr_w2_b = self._inner(rank, "zeros", inputs[1])
                self.lokr_w2_a = self._outer(rank, outputs[1], uniform(rank**-0.5))
        self.lora_scale = scale

    def call(self, inputs):
        outputs = super().call(inputs)
        if not self.has_active_update:
            return outputs
        if self.lokr_w1 is not None:
            return outputs + self.lora_scale * self._kronecker(inputs)
        if self.lora_A is None:
            return outputs
        update = self.lora_scale * self.lora_B(self.lora_A(inputs))
        if self.lora_magnitude_vector is None:
            return outputs + update
        own = outputs - ops.cast(self.bias, outputs.dtype) if self.use_bias else outputs
        growth = ops.cast(self._magnitude_ratio() - 1.0, outputs.dtype)  # small, so it needs no precision
        return outputs + update + growth * (own + update)

    def _magnitude_ratio(self):
        """Return by what the updated weight is multiplied to have its magnitude, float32 `(outputs,)`.

        No gradient flows through the present length, as in the paper, section 4.3.
        """
        down, up, kernel = (
            ops.reshape(ops.cast(weight, "float32"), (-1, weight.shape[-1]))
            for weight in (self.lora_A.kernel, self.lora_B.kernel, self.kernel)
        )
        updated = ops.stop_gradient(kernel + self.lora_scale * ops.matmul(down, up))
        lengths = ops.sqrt(ops.sum(ops.square(updated), axis=0))
        return self.lora_magnitude_vector / (lengths + keras.config.epsilon())

    def _kronecker(self, inputs):
        """Return the product with the Kronecker product, which is never made."""
        rows, columns = self.lokr_w1.shape
        grouped = ops.reshape(inputs, (-1, *inputs.shape[1:-1], columns, inputs.shape[-1] // columns))
        if self.lokr_w2 is not None:
            inner = self._apply_grouped([self.lokr_w2], grouped)
        else:
            inner = self._apply_grouped([self.lokr_w2_b, self.lokr_w2_a], grouped)
        outer = ops.matmul(ops.cast(self.lokr_w1, inner.dtype), inner)
        return ops.reshape(outer, (-1, *outer.shape[1:-2], rows * outer.shape[-1]))


class Dense(LowRankUpdate, QuantizableKernel, keras.layers.Dense):
    """Keras' linear layer with an optional update."""

    def _inner(self, outputs, initializer, inputs=None):
        inputs = inputs or self.kernel.shape[0]
        return dense(inputs, outputs, use_bias=False, kernel_initializer=initializer)

    def _outer(self, inputs, outputs, initializer):
        return dense(inputs, outputs, use_bias=False, kernel_initializer=initializer)

    def _apply_grouped(self, layers, grouped):
        return sequential(layers, grouped)


class Conv2D(LowRankUpdate, QuantizableKernel, keras.layers.Conv2D):
    """Keras' convolution with an optional update: a kernel of the same size, then one of 1x1."""

    def convolution_op(self, inputs, kernel):
        outputs = convolve(inputs, kernel, self.strides, self.padding)
        return super().convolution_op(inputs, kernel) if outputs is None else outputs

    def _inner(self, outputs, initializer, inputs=None):
        inputs = inputs or self.kernel.shape[2]
        options = {"strides": self.strides, "padding": self.padding, "kernel_initializer": initializer}
        return convolution(inputs, outputs, self.kernel_size, use_bias=False, **options)

    def _outer(self, inputs, outputs, initializer):
        return convolution(inputs, outputs, 1, use_bias=False, kernel_initializer=initializer)

    def _apply_grouped(self, layers, grouped):
        """Convolve each group of channels of `(n, h, w, groups, channels)` as an image of its own."""
        _, height, width, groups, channels = grouped.shape
        images = ops.reshape(ops.transpose(grouped, (0, 3, 1, 2, 4)), (-1, height, width, channels))
        images = sequential(layers, images)
        split = ops.reshape(images, (-1, groups, *images.shape[1:]))
        return ops.transpose(split, (0, 2, 3, 1, 4))


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
