"""Conversion of uint8 images and masks to the range [-1, 1] of the models, and back."""

import numpy as np
from PIL import Image

from keras_sd.arguments import Images, Tensor, checked_images
from keras_sd.errors import UserError

WHITE = 128
"""The smallest value of a mask that counts as white."""


def as_images(images):
    """Return one image `(height, width, 3)`, or several, as uint8 `(n, height, width, 3)`.

    Raises:
        UserError: the type or the shape is another one.
    """
    images = checked_images("images", images, "(n, height, width, 3)", "(height, width, 3)")
    return images if images.ndim == 4 else images[None]


def images_to_unit(images: Tensor) -> Tensor:
    """Convert images in [0, 255], an array or a tensor, to float32 in [-1, 1].

    XLA divides by a constant with another rounding than NumPy.
    """
    if isinstance(images, np.ndarray):
        images = images.astype("float32")
    else:
        from keras import ops  # here, as files are read without a backend

        images = ops.cast(images, "float32")
    return images / np.float32(127.5) - np.float32(1)


def images_from_unit(images: Tensor) -> Images:
    """Round images in [-1, 1] to uint8.

    Raises:
        UserError: a value is not finite; it would become black.
    """
    images = np.asarray(images)
    if not np.isfinite(images).all():
        raise UserError(
            "images: the model computed numbers that are not finite; take float32, or less guidance"
        )
    return np.clip(np.round((images + 1.0) * 127.5), 0, 255).astype("uint8")


def as_masks(mask, size):
    """Return one mask `(height, width)`, or several, as bool `(n, height, width, 1)`; white is True.

    Args:
        size: of the image, `(height, width)`.

    Raises:
        UserError: the type or the shape is another one, or a mask has no white.
    """
    mask = np.asarray(mask)
    if mask.dtype not in (np.uint8, np.bool_) or mask.ndim not in (2, 3) or not mask.size:
        raise UserError(
            f"mask of type {mask.dtype} and shape {mask.shape}: give uint8 or bool of shape (height, width)"
        )
    if mask.shape[-2:] != tuple(size):
        has_channels = mask.shape[:2] == tuple(size)
        fault = f"has shape {mask.shape}" if has_channels else f"is {mask.shape[-1]}x{mask.shape[-2]}"
        remedy = "give it without channels" if has_channels else "scale it to the image's size"
        raise UserError(f"mask: {fault}, the image {size[1]}x{size[0]}; {remedy}")
    masks = mask if mask.dtype == np.bool_ else mask >= WHITE
    masks = masks.reshape(-1, *mask.shape[-2:], 1)
    empty = np.flatnonzero(~masks.any(axis=(1, 2, 3)))
    if len(empty):
        which = "mask" if len(masks) == 1 else f"mask {empty[0]}"
        brightest = mask.reshape(len(masks), -1).max(axis=1)[empty[0]]
        raise UserError(
            f"{which}: has no white, so nothing would be made anew; white is from {WHITE}, and its brightest "
            f"value is {int(brightest)}"
        )
    return masks


def any_white(masks, factor):
    """Shrink masks by `factor`: a cell is white if any of its pixels is, so thin lines are kept.

    Args:
        masks: bool `(n, height, width, 1)`; the sides are multiples of `factor`.
    """
    count, height, width, _ = masks.shape
    cells = masks.reshape(count, height // factor, factor, width // factor, factor, 1)
    return cells.any(axis=(2, 4))


def resized(
    image: Images, size: tuple[int, int], method: Image.Resampling = Image.Resampling.BICUBIC
) -> Images:
    """Return a uint8 image `(h, w, 3)` interpolated to the size `(height, width)`."""
    image = checked_images("image", image, "(height, width, 3)")
    return np.asarray(Image.fromarray(image).resize(tuple(size)[::-1], method))
