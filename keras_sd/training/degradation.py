"""How training images of upscalers are made small."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from keras_sd.models.pixels import resized

# Filters by which images from any source may have been shrunk.
_FILTERS = (
    *(Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.HAMMING),
    *(Image.Resampling.BICUBIC, Image.Resampling.LANCZOS),
)
_BLURRED = 0.25  # share of images that are blurred before they are shrunk
_LARGEST_BLUR = 0.7  # standard deviation in pixels of the large image


def shrunk(
    image: npt.NDArray[np.uint8], factor: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Return a uint8 image `(height, width, 3)`, sometimes blurred, shrunk by a random filter."""
    opened = Image.fromarray(image)
    if generator.random() < _BLURRED:
        opened = opened.filter(ImageFilter.GaussianBlur(generator.uniform(0, _LARGEST_BLUR)))
    height, width = image.shape[:2]
    method = _FILTERS[generator.integers(len(_FILTERS))]
    return resized(np.asarray(opened), (height // factor, width // factor), method)
