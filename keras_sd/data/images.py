"""Reading pictures that come from outside: checked formats and sizes, square crops."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from keras_sd.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that are read; a file's format is told by its content, not by its name."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
"""Names that are taken for pictures; those of other formats than `FORMATS` are refused, not passed over."""

MAXIMUM_PIXELS = 64_000_000
MINIMUM_SIDE = 16


def check_image(path: Path) -> None:
    """Refuse what cannot become a training picture, without decoding pixels where that can be avoided.

    Raises:
        UserError: not a file, not readable, another format, too large, too small, or truncated.
    """
    with _open(path) as image:
        try:
            if image.format == "PNG":
                image.verify()  # every chunk and its checksum
            elif not _has_end(path, image):
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise _truncated(path) from error


def read_image(path: Path, size: int) -> np.ndarray:
    """The picture's centre square, uint8 (size, size, 3), transparency on white, upright.

    Raises:
        UserError: as `check_image`.
    """
    with _open(path) as image:
        try:
            return square(ImageOps.exif_transpose(image), size)
        except (OSError, SyntaxError, ValueError) as error:
            raise _truncated(path) from error


def read_picture(path: Path, size: tuple[int, int] | None = None, mode: str = "RGB") -> np.ndarray:
    """The whole picture as uint8 (height, width, 3), upright, transparency on white.

    Args:
        size: (height, width) to scale it to with Lanczos, where it is another.
        mode: "RGB", or "L" for a mask, which is returned as (height, width).

    Raises:
        UserError: as `check_image`.
    """
    with _open(path) as image:
        try:
            image = _on_white(ImageOps.exif_transpose(image)).convert(mode)
        except (OSError, SyntaxError, ValueError) as error:
            raise _truncated(path) from error
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image)


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of a Pillow image, resized with Lanczos to uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(_on_white(image), (size, size), Image.Resampling.LANCZOS))


def _on_white(image: Image.Image) -> Image.Image:
    """The image in 8 bits of RGB, transparency on white."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open(path: Path) -> Image.Image:
    """Read the header only, and refuse by it."""
    if not path.is_file():
        raise UserError(f"{path}: no such image file; add it, or remove what names it")
    try:
        with warnings.catch_warnings():
            # The limit below is stricter than Pillow's, which warns first.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=[*FORMATS, "GIF", "TIFF"])
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image; replace it by {' or '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if getattr(error, "errno", None):
            raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
        raise _truncated(path) from error
    width, height = image.size
    fault = None
    if image.format not in FORMATS:
        fault = UserError(
            f"{path}: holds {image.format}, which is not read; convert it to {' or '.join(FORMATS)}"
        )
    elif width * height > MAXIMUM_PIXELS:
        fault = _too_large(path, f" ({width} x {height})")
    elif min(width, height) < MINIMUM_SIDE:
        fault = UserError(
            f"{path}: {width} x {height} pixels, but {MINIMUM_SIDE} a side are needed; remove or replace it"
        )
    if fault:
        image.close()
        raise fault
    return image


def _has_end(path: Path, image: Image.Image) -> bool:
    """Whether the file is seen to be whole from its size or its last bytes."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if image.format == "WEBP":  # "RIFF", then the length of what follows
            return length >= int.from_bytes(head[4:8], "little") + 8
        if image.format == "JPEG" and length > 65536:
            # Two bytes mark the end, before a few kilobytes that some cameras append.
            # In a smaller file a thumbnail's end, near the start, could be taken for it.
            file.seek(length - 65536)
            return b"\xff\xd9" in file.read()
    return False


def _truncated(path: Path) -> UserError:
    return UserError(f"{path}: truncated or damaged image; replace the file")


def _too_large(path: Path, size: str = "") -> UserError:
    limit = MAXIMUM_PIXELS // 1_000_000
    return UserError(f"{path}: more than {limit} million pixels{size}; scale it down or remove it")
