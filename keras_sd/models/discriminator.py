"""The patch discriminator that an autoencoder is trained against.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017: each output judges one
patch of the image. Group normalisation stands in place of their batch normalisation, so that an example's
output does not depend on the others of its batch.
"""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.models.initializers import normal
from keras_sd.models.layers import GroupNormalization, convolution, sequential

_GROUPS = 8
_LARGEST_FACTOR = 8  # of the width, as in the paper
EPSILON = 1e-6


class PatchDiscriminator(keras.Model):
    """Judges the patches of images, float `(n, h, w, 3)` in [-1, 1].

    It returns logits, float32 `(n, rows, columns, 1)`, which are high for real images.

    Args:
        width: channels of the first convolution, a multiple of 8.
        depth: number of convolutions that halve the resolution. With 3, an output sees 70 x 70 pixels.
    """

    def __init__(self, width: int = 64, depth: int = 3, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        widths = [width * min(2**level, _LARGEST_FACTOR) for level in range(depth + 1)]
        strides = [2] * (depth - 1) + [1]
        self.conv_in = _convolution(3, width, stride=2)
        # No bias: the normalisation has one.
        self.convolutions = [
            _convolution(inputs, outputs, stride=stride, use_bias=False)
            for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False)
        ]
        self.norms = [GroupNormalization(outputs, _GROUPS, EPSILON) for outputs in widths[1:]]
        self.conv_out = _convolution(widths[-1], 1)
        self.built = True

    def call(self, images: Tensor) -> Tensor:
        hidden = _leaky_relu(self.conv_in(ops.cast(images, self.compute_dtype)))
        for convolve, normalize in zip(self.convolutions, self.norms, strict=True):
            hidden = _leaky_relu(sequential([convolve, normalize], hidden))
        return ops.cast(self.conv_out(hidden), "float32")


def _convolution(inputs, outputs, stride=1, **options):
    return convolution(inputs, outputs, 4, strides=stride, kernel_initializer=normal(0.02), **options)


def _leaky_relu(inputs):
    return ops.leaky_relu(inputs, negative_slope=0.2)
