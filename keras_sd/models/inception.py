"""Inception v3 as FID and KID use it: the network of TensorFlow's graph of 2015-12-05.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR
2016, table 1. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", NeurIPS 2017, measure by its last average pool. It differs from Keras' Inception v3 in its
weights, in the pool of the last block, and in its batch normalisations, which have a scale. The attribute
tree is that of pytorch-fid's file of weights.
"""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.models.layers import Layer, convolution, sequential

IMAGE_SIZE = 299
WIDTH = 2048

_EPSILON = 1e-3  # of all batch normalisations
_WINDOWS = {"1x7": (1, 7), "7x1": (7, 1), "1x3": (1, 3), "3x1": (3, 1)}


class BatchNormalization(Layer):
    """Batch normalisation over the last axis by the moments of the training set, which never change."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.gamma = self.add_weight(shape=(channels,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(channels,), initializer="zeros", name="beta")
        moments = {"shape": (channels,), "trainable": False}
        self.running_mean = self.add_weight(initializer="zeros", name="running_mean", **moments)
        self.running_var = self.add_weight(initializer="ones", name="running_var", **moments)

    def call(self, inputs):
        scale = self.gamma * ops.rsqrt(self.running_var + _EPSILON)
        return inputs * scale + (self.beta - self.running_mean * scale)


class ConvolutionBlock(Layer):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(self, inputs, outputs, window, *, strides=1, padding="same", **kwargs):
        super().__init__(**kwargs)
        # The weights always come from a file.
        options = {"strides": strides, "padding": padding, "kernel_initializer": "zeros"}
        self.conv = convolution(inputs, outputs, window, use_bias=False, **options)
        self.bn = BatchNormalization(outputs)

    def call(self, inputs):
        return ops.relu(self.bn(self.conv(inputs)))


def _reducing(inputs, outputs, window=3):
    """Return a convolution of stride 2 without padding."""
    return ConvolutionBlock(inputs, outputs, window, strides=2, padding="valid")


def _shrunk(inputs):
    return ops.max_pool(inputs, 3, strides=2, padding="valid")


def _average(inputs):
    """Average 3x3 positions around each one; the padding at the borders does not count."""
    return ops.average_pool(inputs, 3, strides=1, padding="same")


def _maximum(inputs):
    return ops.max_pool(inputs, 3, strides=1, padding="same")


def _joined(*branches):
    return ops.concatenate(branches, axis=-1)


class InceptionA(Layer):
    """Branches of 1x1, 5x5 and two 3x3 convolutions (figure 5 of the paper)."""

    def __init__(self, inputs, pool_features, **kwargs):
        super().__init__(**kwargs)
        self.branch1x1 = ConvolutionBlock(inputs, 64, 1)
        self.branch5x5_1 = ConvolutionBlock(inputs, 48, 1)
        self.branch5x5_2 = ConvolutionBlock(48, 64, 5)
        self.branch3x3dbl_1 = ConvolutionBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvolutionBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvolutionBlock(96, 96, 3)
        self.branch_pool = ConvolutionBlock(inputs, pool_features, 1)

    def call(self, inputs):
        return _joined(
            self.branch1x1(inputs),
            sequential([self.branch5x5_1, self.branch5x5_2], inputs),
            sequential([self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3], inputs),
            self.branch_pool(_average(inputs)),
        )


class InceptionB(Layer):
    """Halves height and width by convolutions and a pool side by side (figure 10)."""

    def __init__(self, inputs, **kwargs):
        super().__init__(**kwargs)
        self.branch3x3 = _reducing(inputs, 384)
        self.branch3x3dbl_1 = ConvolutionBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvolutionBlock(64, 96, 3)
        self.branch3x3dbl_3 = _reducing(96, 96)

    def call(self, inputs):
        double = sequential([self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3], inputs)
        return _joined(self.branch3x3(inputs), double, _shrunk(inputs))


class InceptionC(Layer):
    """Branches of 7x7 convolutions, each as one of 1x7 and one of 7x1 (figure 6)."""

    def __init__(self, inputs, width, **kwargs):
        super().__init__(**kwargs)
        self.branch1x1 = ConvolutionBlock(inputs, 192, 1)
        self.branch7x7_1 = ConvolutionBlock(inputs, width, 1)
        self.branch7x7_2 = ConvolutionBlock(width, width, _WINDOWS["1x7"])
        self.branch7x7_3 = ConvolutionBlock(width, 192, _WINDOWS["7x1"])
        self.branch7x7dbl_1 = ConvolutionBlock(inputs, width, 1)
        self.branch7x7dbl_2 = ConvolutionBlock(width, width, _WINDOWS["7x1"])
        self.branch7x7dbl_3 = ConvolutionBlock(width, width, _WINDOWS["1x7"])
        self.branch7x7dbl_4 = ConvolutionBlock(width, width, _WINDOWS["7x1"])
        self.branch7x7dbl_5 = ConvolutionBlock(width, 192, _WINDOWS["1x7"])
        self.branch_pool = ConvolutionBlock(inputs, 192, 1)

    def call(self, inputs):
        double = [self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3]
        double += [self.branch7x7dbl_4, self.branch7x7dbl_5]
        return _joined(
            self.branch1x1(inputs),
            sequential([self.branch7x7_1, self.branch7x7_2, self.branch7x7_3], inputs),
            sequential(double, inputs),
            self.branch_pool(_average(inputs)),
        )


class InceptionD(Layer):
    """Halves height and width once more."""

    def __init__(self, inputs, **kwargs):
        super().__init__(**kwargs)
        self.branch3x3_1 = ConvolutionBlock(inputs, 192, 1)
        self.branch3x3_2 = _reducing(192, 320)
        self.branch7x7x3_1 = ConvolutionBlock(inputs, 192, 1)
        self.branch7x7x3_2 = ConvolutionBlock(192, 192, _WINDOWS["1x7"])
        self.branch7x7x3_3 = ConvolutionBlock(192, 192, _WINDOWS["7x1"])
        self.branch7x7x3_4 = _reducing(192, 192)

    def call(self, inputs):
        wide = [self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4]
        return _joined(
            sequential([self.branch3x3_1, self.branch3x3_2], inputs),
            sequential(wide, inputs),
            _shrunk(inputs),
        )


class InceptionE(Layer):
    """Branches that end in a 1x3 and a 3x1 convolution side by side (figure 7).

    Args:
        pool: of the last branch; the network's last block has a maximum there.
    """

    def __init__(self, inputs, pool, **kwargs):
        super().__init__(**kwargs)
        self.pool = pool
        self.branch1x1 = ConvolutionBlock(inputs, 320, 1)
        self.branch3x3_1 = ConvolutionBlock(inputs, 384, 1)
        self.branch3x3_2a = ConvolutionBlock(384, 384, _WINDOWS["1x3"])
        self.branch3x3_2b = ConvolutionBlock(384, 384, _WINDOWS["3x1"])
        self.branch3x3dbl_1 = ConvolutionBlock(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvolutionBlock(448, 384, 3)
        self.branch3x3dbl_3a = ConvolutionBlock(384, 384, _WINDOWS["1x3"])
        self.branch3x3dbl_3b = ConvolutionBlock(384, 384, _WINDOWS["3x1"])
        self.branch_pool = ConvolutionBlock(inputs, 192, 1)

    def call(self, inputs):
        single = self.branch3x3_1(inputs)
        double = sequential([self.branch3x3dbl_1, self.branch3x3dbl_2], inputs)
        return _joined(
            self.branch1x1(inputs),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self.pool(inputs)),
        )


class InceptionV3(keras.Model):
    """The network up to its last average pool.

    Call it on float32 `(n, 299, 299, 3)` in [-1, 1]. It returns the features, float32 `(n, 2048)`. All
    weights exist after construction, with zeros in the kernels: `weights.inception` reads a file of weights.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.Conv2d_1a_3x3 = _reducing(3, 32)
        self.Conv2d_2a_3x3 = ConvolutionBlock(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvolutionBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvolutionBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvolutionBlock(80, 192, 3, padding="valid")
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, _average)
        self.Mixed_7c = InceptionE(2048, _maximum)
        self.built = True

    def call(self, images: Tensor) -> Tensor:
        hidden = sequential([self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3], images)
        hidden = sequential([self.Conv2d_3b_1x1, self.Conv2d_4a_3x3], _shrunk(hidden))
        blocks = [self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b]
        blocks += [self.Mixed_6c, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c]
        return ops.mean(sequential(blocks, _shrunk(hidden)), axis=(1, 2))
