"""Reconstruction errors of an autoencoder or upscaler: PSNR and edge error."""

import numpy as np

from keras_sd.arguments import Images
from keras_sd.errors import UserError


def peak_signal_to_noise_ratio(images: Images, reconstructions: Images) -> float:
    """Return the mean over the images of the peak signal-to-noise ratio (PSNR), in dB.

    Both are uint8 of shape (n, h, w, c). For each image PSNR = 10 log10(255² / MSE), where MSE is the mean
    squared difference over all its pixels and channels, in levels of 0 to 255. The ratios are averaged, not
    the errors. A perfect reconstruction has an infinite ratio and makes the mean infinite.
    """
    images, reconstructions = _pairs(images, reconstructions)
    errors = np.mean((images - reconstructions) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.mean(10.0 * np.log10(255.0**2 / errors)))


def edge_error(images, reconstructions):
    """Return the mean absolute error of image gradients, in levels of 0 to 255 per pixel.

    Gradients are differences of neighbouring pixels, horizontally and vertically. Blur makes them too small
    at edges; ringing adds some where there are no edges. Both arguments are uint8 of shape (n, h, w, c).
    """
    images, reconstructions = _pairs(images, reconstructions)
    differences = images - reconstructions
    return float(np.mean([np.abs(np.diff(differences, axis=axis)).mean() for axis in (1, 2)]))


def _pairs(images, reconstructions):
    images, reconstructions = np.asarray(images), np.asarray(reconstructions)
    for name, array in (("images", images), ("reconstructions", reconstructions)):
        if array.dtype != np.uint8 or array.ndim != 4 or len(array) == 0:
            raise UserError(
                f"{name} of type {array.dtype} and shape {array.shape}: give uint8 of shape (n, h, w, c)"
            )
    if images.shape != reconstructions.shape:
        raise UserError(
            f"images {images.shape} against reconstructions {reconstructions.shape}: "
            f"the shapes differ; give one reconstruction per image"
        )
    return images.astype(np.float64), reconstructions.astype(np.float64)
