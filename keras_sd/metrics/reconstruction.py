"""How close an autoencoder or upscaler comes: PSNR, SSIM, edge error, and the edge energy that it keeps."""

import numpy as np

from keras_sd.arguments import Images
from keras_sd.errors import UserError

SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_CONSTANTS = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def peak_signal_to_noise_ratio(images: Images, reconstructions: Images) -> float:
    """Return the mean over the images of the peak signal-to-noise ratio (PSNR), in dB.

    Both are uint8 of shape (n, h, w, c). For each image PSNR = 10 log10(255² / MSE), where MSE is the mean
    squared difference over all its pixels and channels, in levels of 0 to 255. The ratios are averaged, not
    the errors. A perfect reconstruction has an infinite ratio and makes the mean infinite.
    """
    errors = np.array([np.mean((one - other) ** 2) for one, other in _pairs(images, reconstructions)])
    with np.errstate(divide="ignore"):
        return float(np.mean(10.0 * np.log10(255.0**2 / errors)))


def structural_similarity(images: Images, reconstructions: Images) -> float:
    """Return the mean over the images of the structural similarity (SSIM), up to 1 for equal images.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, equation 13, in Gaussian windows of 11 pixels with a standard deviation of 1.5 pixels,
    K1 = 0.01 and K2 = 0.03. It is computed in each channel; windows that reach over an edge do not count.

    Args:
        images, reconstructions: uint8 `(n, h, w, c)`, with sides of 11 pixels or more.

    Raises:
        UserError: the images have another type or shape, or are smaller than the window.
    """
    pairs = _pairs(images, reconstructions)
    height, width = np.shape(images)[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise UserError(
            f"SSIM of images of {width} x {height} pixels: smaller than its window; give {SSIM_WINDOW} "
            "pixels or more"
        )
    return float(np.mean([_similarity(one, other) for one, other in pairs]))


def _similarity(x, y):
    """Return the SSIM of two images, float64 `(h, w, c)`."""
    c1, c2 = _SSIM_CONSTANTS
    mean_x, mean_y = _windowed_mean(x), _windowed_mean(y)
    variances = _windowed_mean(x * x) - mean_x**2 + _windowed_mean(y * y) - mean_y**2
    covariance = _windowed_mean(x * y) - mean_x * mean_y
    structure = (2 * covariance + c2) / (variances + c2)
    return np.mean(structure * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1))


def _windowed_mean(image):
    """Return the mean of an image `(h, w, c)` in each Gaussian window that lies inside it."""
    distances = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(distances**2) / (2 * _SSIM_SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        size = image.shape[axis] - SSIM_WINDOW + 1
        shifted = (image.take(range(start, start + size), axis) for start in range(SSIM_WINDOW))
        image = sum(weight * each for weight, each in zip(weights, shifted, strict=True))
    return image


def edge_energy(images: Images) -> float:
    """Return the mean squared difference of neighbouring pixels, in squared levels of 0 to 255.

    The sum over horizontal and vertical neighbours, divided by the number of pixels and channels. Blur makes
    it smaller, noise larger.

    Args:
        images: uint8 `(n, h, w, c)`.

    Raises:
        UserError: the images have another type or shape.
    """
    images = _checked("images", images)
    total = 0.0
    for image in map(np.float64, images):
        total += sum((np.diff(image, axis=axis) ** 2).sum() for axis in (0, 1))
    return float(total / images.size)


def edge_energy_ratio(images: Images, others: Images) -> float:
    """Return the edge energy of others as a share of that of images: 1 keeps it, less is blurred.

    It is the ratio of the means over each set, not the mean of ratios: an image without edges has no ratio,
    and soft ones, whose ratio a little noise makes large, would rule the mean. So it also compares two sets
    that are not paired. Two sets without any edges have the ratio 1.

    Args:
        images, others: uint8 `(n, h, w, c)`; each set may have its own number and size.
    """
    return _ratio(edge_energy(images), edge_energy(others))


def _ratio(real, made):
    if real == 0:
        return 1.0 if made == 0 else float("inf")
    return made / real


class ReconstructionFigures:
    """Gathers what an evaluation of an autoencoder logs, batch by batch, so that memory does not grow."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, float] = {}

    def update(self, images: Images, reconstructions: Images) -> None:
        """Add a batch.

        Args:
            images, reconstructions: uint8 `(n, h, w, 3)`; all batches are of one size.

        Raises:
            UserError: they have another type or shape, or the shapes differ.
        """
        figures = {"psnr": peak_signal_to_noise_ratio(images, reconstructions)}
        if min(np.shape(images)[1:3]) >= SSIM_WINDOW:
            figures["ssim"] = structural_similarity(images, reconstructions)
        figures |= {"real": edge_energy(images), "made": edge_energy(reconstructions)}
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + len(images) * value
        self._count += len(images)

    def result(self) -> dict[str, float]:
        """Return the figures of all images together.

        Returns:
            `psnr` in dB, `ssim`, and `edge_energy`, the share that is kept (`edge_energy_ratio`). Images
            smaller than SSIM's window have no `ssim`.
        """
        means = {name: total / self._count for name, total in self._sums.items()}
        kept = _ratio(means.pop("real"), means.pop("made"))
        return means | {"edge_energy": kept}


def reconstruction_figures(images: Images, reconstructions: Images) -> dict[str, float]:
    """Return the figures of `ReconstructionFigures` of images that are there at once."""
    figures = ReconstructionFigures()
    figures.update(images, reconstructions)
    return figures.result()


def edge_error(images, reconstructions):
    """Return the mean absolute error of image gradients, in levels of 0 to 255 per pixel.

    Gradients are differences of neighbouring pixels, horizontally and vertically. Blur makes them too small
    at edges; ringing adds some where there are no edges. Both arguments are uint8 of shape (n, h, w, c).
    """
    pairs = _pairs(images, reconstructions)
    return float(
        np.mean([np.abs(np.diff(one - other, axis=axis)).mean() for one, other in pairs for axis in (0, 1)])
    )


def _checked(title, images):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise UserError(
            f"{title} of type {images.dtype} and shape {images.shape}: give uint8 of shape (n, h, w, c)"
        )
    return images


def _pairs(images, reconstructions):
    """Check both sets; return an iterator of pairs in float64, one by one, as they take much memory."""
    images, reconstructions = _checked("images", images), _checked("reconstructions", reconstructions)
    if images.shape != reconstructions.shape:
        raise UserError(
            f"images {images.shape} against reconstructions {reconstructions.shape}: "
            f"the shapes differ; give one reconstruction per image"
        )
    return zip(map(np.float64, images), map(np.float64, reconstructions), strict=True)
