"""How good the images are: Kernel Inception Distance, reconstruction error, nearest neighbours."""

from keras_sd.metrics.features import ClipFeatures, InceptionFeatures, extract
from keras_sd.metrics.kid import (
    KID,
    KernelInceptionDistance,
    kernel_inception_distance,
    paired_kernel_inception_distance,
    polynomial_mmd,
)
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio

__all__ = [
    "KID",
    "ClipFeatures",
    "InceptionFeatures",
    "KernelInceptionDistance",
    "extract",
    "kernel_inception_distance",
    "paired_kernel_inception_distance",
    "peak_signal_to_noise_ratio",
    "polynomial_mmd",
]
