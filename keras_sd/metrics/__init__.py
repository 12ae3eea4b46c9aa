"""Metrics of image quality.

kid             Kernel Inception Distance (KID), on features and as a Keras metric
fid             Fréchet Inception Distance (FID), on features
features        the extractors that both use: CLIP's image tower, Inception v3
clip_score      CLIP score: how well images fit their captions
reconstruction  PSNR, SSIM, edge error and edge energy of an autoencoder or upscaler
"""

from keras_sd.metrics.features import ClipFeatures, InceptionFeatures, PublishedInceptionFeatures, extract
from keras_sd.metrics.fid import frechet_inception_distance
from keras_sd.metrics.kid import (
    KID,
    KernelInceptionDistance,
    kernel_inception_distance,
    paired_kernel_inception_distance,
    polynomial_mmd,
)
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio, structural_similarity

__all__ = [
    "KID",
    "ClipFeatures",
    "InceptionFeatures",
    "KernelInceptionDistance",
    "PublishedInceptionFeatures",
    "extract",
    "frechet_inception_distance",
    "kernel_inception_distance",
    "paired_kernel_inception_distance",
    "peak_signal_to_noise_ratio",
    "polynomial_mmd",
    "structural_similarity",
]
