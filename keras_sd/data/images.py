"""Reads image files from users: checks format and size, rotates by EXIF, crops and resizes."""

import contextlib
import importlib.util
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.tiff import check_tiff
from keras_sd.errors import UserError, missing_package
from keras_sd.files.image_files import check_plain
from keras_sd.models.pixels import WHITE

HEIF_PACKAGE = "pillow_heif"
"""The optional package that reads photos of phones (HEIC)."""

_READERS = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
}
if features.check("avif"):  # in Pillow's own wheels since 11.3
    from PIL.AvifImagePlugin import AvifImageFile

    _READERS["AVIF"] = AvifImageFile

if importlib.util.find_spec(HEIF_PACKAGE):
    _READERS["HEIF"] = importlib.import_module(HEIF_PACKAGE).HeifImageFile

FORMATS = tuple(_READERS)
"""Formats that are read; a file's format is recognised by its content, not by its name."""

SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".avif"),
}
if "HEIF" in FORMATS:
    SUFFIXES |= {".heic", ".heif", ".hif"}
"""Suffixes that count as images; a file in another format than `FORMATS` is an error, not skipped."""

MINIMUM_SIDE = 16

# A file's header may claim any number of pixels. An image is read only if it fits into this many bytes. The
# bytes per pixel are measured peaks: the image decoded in Pillow's layout, composed on white, and for WebP
# the canvases of its library.
_MEMORY = 500_000_000
_BYTES_OF_JPEG = 2  # JPEGs are reduced while they are decoded
_BYTES_OF_PROGRESSIVE = 8  # progressive JPEGs are held as coefficients until their last byte
_BYTES_OF_WEBP = {"RGB": 20, "RGBA": 22}
_BYTES_OF_AVIF = {"RGB": 20, "RGBA": 26}  # twice the planes of 8 bits, and two copies
# A copy for the rotation; the strips or tiles of libtiff have a limit of their own.
_BYTES_OF_TIFF = {"1": 4, "L": 4, "RGB": 8, "RGBX": 8, "CMYK": 8, "YCbCr": 8}
_BYTES_OF_FORMAT = {
    "WEBP": _BYTES_OF_WEBP,
    "AVIF": _BYTES_OF_AVIF,
    "HEIF": _BYTES_OF_AVIF,
    "TIFF": _BYTES_OF_TIFF,
}
_BYTES_OF_MODE = {"1": 4, "L": 4, "RGB": 4, "CMYK": 4, "RGBA": 8, "P": 12, "PA": 12, "LA": 12}
_BYTES_OF_OTHER = 16
_BYTES_WHOLE = 5  # additional bytes per pixel for an image that is read at its own size
# Larger images are reduced while they are decoded if a smaller one was asked for.
_MANY_PIXELS = 30_000_000
_REDUCIBLE = ("L", "RGB", "RGBA", "CMYK", "YCbCr")

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that rotates or flips an image upright, by EXIF orientation."""

_ORIENTATION = 0x0112

# Warning filters are global to the process, and several threads read images.
_FILTERING = threading.Lock()


class StoredImage(NamedTuple):
    """An image file that is stored in another file, and its name in messages; it is read as a `Path` is."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Return the content as an open file."""
        return io.BytesIO(self.content)


class Examined(NamedTuple):
    """What `examine_image` finds: the upright size in pixels, and whether EXIF told how to rotate."""

    height: int
    width: int
    has_sound_exif: bool


def examine_image(path: Path | StoredImage) -> Examined:
    """Check that a file can be used as a training image: its header, its checksums and its pixels.

    Returns:
        The size of the upright image, and False if the EXIF block is damaged, so that the image is read
        unrotated.

    Raises:
        UserError: not a file, not readable, another format, too large, too small, or pixels that cannot be
            decoded.
    """
    with _open(path) as image, _damage_as_user_error(path):
        late = {}
        if image.format == "PNG":
            late = {} if "exif" in image.info else _late_exif(path)
            image.verify()  # every chunk and its checksum, after which it has to be opened anew
            image = _open(path)
        with image:
            image.info |= late
            _load_tiff(image)
            size, orientation = image.size, _orientation(image)
            # An eighth of a JPEG's size in grey takes all of its data, too, and a quarter of the time.
            image.draft("L", (size[0] // 8, size[1] // 8))
            image.load()
    return Examined(*_upright_size(size, orientation), orientation is not None)


def check_image(path: Path) -> bool:
    """Return whether an image's EXIF block is sound; raise what `examine_image` raises."""
    return examine_image(path).has_sound_exif


def read_frame(
    path: Path | StoredImage,
    frame: Frame,
    on_damage: Callable[[Any], None] | None = None,
    of: str = "colours",
) -> np.ndarray:
    """Return a part of an image, resized: uint8 (height, width, 3), upright, transparency on white.

    Args:
        of: "colours"; or "alpha" or "brightness" for one channel, uint8 (height, width). Transparent pixels
            have no brightness, and an image without an alpha channel is opaque.
        on_damage: called with the path if the EXIF block is damaged, so that the image is not rotated. By
            default there is a warning.

    Raises:
        UserError: as `check_image`, or the image no longer has the size that the frame was made for.
    """
    with _open(path) as image, _damage_as_user_error(path):
        upright, reduced, found = _upright(
            image, path, frame.scale / 2, on_damage, frame.interpolation != "nearest"
        )
        if found != frame.original:
            sides = [f"{width} x {height}" for height, width in (found, frame.original)]
            raise UserError(f"{path}: is {sides[0]} pixels now, but was {sides[1]}; start again")
        return framed(upright, frame, reduced, of)


def framed(image: Image.Image, frame: Frame, reduced: float = 1, of: str = "colours") -> np.ndarray:
    """Return what a frame takes of a Pillow image: uint8 (height, width, 3), transparency on white.

    Args:
        image: upright.
        reduced: the factor by which the image's sides are already smaller.
        of: as `read_frame` takes it.
    """
    top, left, bottom, right = (side / reduced for side in frame.box)
    box = left, top, min(right, image.width), min(bottom, image.height)
    method = Image.Resampling[frame.interpolation.upper()]
    converted = {"colours": _on_white, "alpha": _alpha, "brightness": _brightness}[of](image)
    pixels = np.asarray(converted.resize(frame.size[::-1], method, box))
    return pixels[:, ::-1] if frame.flip else pixels


def has_transparency(path: Path | StoredImage) -> bool:
    """Return whether an image has an alpha channel or a transparent colour, by its header.

    Raises:
        UserError: as `check_image`.
    """
    with _open(path) as image, _damage_as_user_error(path):
        return image.has_transparency_data


def read_square(path: Path, size: int, on_damage: Callable[[Path], None] | None = None) -> np.ndarray:
    """Return the centre square of an image, uint8 (size, size, 3), upright, transparency on white.

    Args:
        on_damage: as `read_frame` takes it.

    Raises:
        UserError: as `check_image`.
    """
    with _open(path) as image, _damage_as_user_error(path):
        upright, reduced, original = _upright(image, path, min(image.size) / size / 2, on_damage)
        return framed(upright, frame_of(original, (size, size)), reduced)


def read_image(
    path: Path, size: tuple[int, int] | None = None, smallest_side: int | None = None
) -> np.ndarray:
    """Return the whole image as uint8 (height, width, 3), upright, transparency on white.

    Args:
        size: (height, width) to resize to with Lanczos; None keeps the size.
        smallest_side: allows a very large image to be reduced, with both sides at least this long.

    Raises:
        UserError: as `check_image`, or a very large image is to be read at its own size.
    """
    wanted = size or (smallest_side and (smallest_side, smallest_side))
    with _open(path) as image, _damage_as_user_error(path):
        if wanted is None:
            _check_pixels(image, path, _BYTES_WHOLE)
        is_large = wanted is not None and image.width * image.height > _MANY_PIXELS
        upright, *_ = _upright(image, path, min(image.size) / (2 * max(wanted)) if wanted and is_large else 1)
        image = _on_white(upright)
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return an image as a mask, bool (height, width): True where it is white, from 128 of 255.

    Transparent pixels are False. People also paint in other colours on a transparent layer: if no opaque
    pixel is white, all opaque pixels are True, as in AUTOMATIC1111's web UI.

    Args:
        size: (height, width) to resize to; a pixel is True if any part of it is white, so that thin lines
            survive.

    Raises:
        UserError: as `check_image`, or no pixel is white.
    """
    with _open(path) as image, _damage_as_user_error(path):
        _check_pixels(image, path, _BYTES_WHOLE)
        upright, *_ = _upright(image, path)
        image = _in_eight_bits(upright)
        opaque = np.ones(image.size[::-1], bool)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            opaque = np.asarray(image.getchannel("A")) >= WHITE
        values = np.asarray(image.convert("RGB").convert("L"))
    mask = opaque & (values >= WHITE)
    if not mask.any() and not opaque.all():
        mask = opaque
    if not mask.any():
        raise UserError(
            f"{path}: has no white, so nothing would be made anew (white is from {WHITE}, and its brightest "
            f"value is {values[opaque].max(initial=0)}); paint white what is to change"
        )
    if size is not None and mask.shape != size:
        shares = Image.fromarray(mask.astype("float32")).resize(size[::-1], Image.Resampling.BOX)
        mask = np.asarray(shares) > 0
    return mask


def format_of(path: Path | StoredImage) -> str | None:
    """Return the format of an image file by its first bytes, or None if it is unknown.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise _unreadable(path, error) from error
    if head[4:8] == b"ftyp":
        return {b"avi": "AVIF", b"hei": "HEIF", b"hev": "HEIF", b"mif": "HEIF", b"msf": "HEIF"}.get(
            head[8:11]
        )
    if head.startswith(b"RIFF"):
        return "WEBP" if head[8:12] == b"WEBP" else None
    starts = {
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"\xff\xd8": "JPEG",
        b"BM": "BMP",
        b"GIF8": "GIF",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"8BPS": "PSD",
        b"\xff\x0a": "JPEG XL",
        b"\0\0\0\x0cJXL ": "JPEG XL",
        b"\0\0\0\x0cjP": "JPEG 2000",
    }
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def square(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre square of a Pillow image, resized with Lanczos to uint8 (size, size, 3)."""
    return framed(image, frame_of((image.height, image.width), (size, size)))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype("uint8"))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in 8 bits of RGB, transparency on white."""
    image = _in_eight_bits(image)
    if image.has_transparency_data:
        return _composed(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image:
    """Return the opacity of an image's pixels, 8 bits."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _brightness(image: Image.Image) -> Image.Image:
    """Return the brightness of an image's pixels, 8 bits; transparent ones are black."""
    image = _in_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB").convert("L")
    image = image.convert("RGBA")
    return ImageChops.multiply(image.convert("RGB").convert("L"), image.getchannel("A"))


def _composed(image: Image.Image) -> Image.Image:
    """Compose an image with transparency on white, in strips: all at once would triple the memory."""
    result = Image.new("RGB", image.size)
    rows = max(1, _MANY_PIXELS // 8 // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


@contextlib.contextmanager
def _damage_as_user_error(path: Path | StoredImage) -> Iterator[None]:
    """Turn Pillow's many exceptions for damaged files into a `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None):
            raise _unreadable(path, error) from error
        raise UserError(f"{path}: truncated or damaged image; replace the file") from error


@contextlib.contextmanager
def _pillow_silent() -> Iterator[None]:
    """Suppress Pillow's warnings: they do not name the file, and its pixel limit is looser than ours."""
    with _FILTERING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _upright(
    image: Image.Image,
    path: Path | StoredImage,
    most: float = 1,
    on_damage: Callable[[Any], None] | None = None,
    may_average: bool = True,
) -> tuple[Image.Image, int, tuple[int, int]]:
    """Return the image rotated by its EXIF orientation; unrotated, with a warning, if its EXIF is damaged.

    Args:
        most: the largest factor by which its sides may become smaller, for less time and memory.
        may_average: whether a pixel may be the mean of several.

    Returns:
        The image, the factor by which its sides are smaller, and its height and width before that. JPEGs are
        decoded at a half, a quarter or an eighth of their size. Other images are reduced if they are very
        large.
    """
    _load_tiff(image)
    size, reduced = image.size, 1
    if most >= 2 and may_average:
        # Only has an effect on JPEGs; the box is the whole image in pixels of the smaller one.
        drafted = image.draft(None, (int(size[0] / most), int(size[1] / most)))
        if drafted is not None:
            reduced = round(size[0] / drafted[1][2])
    image.load()
    orientation = _orientation(image)
    if orientation is None:
        (on_damage or _warn_of_exif)(path)
    factor = int(most / reduced)
    if factor > 1 and image.width * image.height > _MANY_PIXELS:
        image = (image if image.mode in _REDUCIBLE else image.convert("RGBA")).reduce(factor)
        reduced *= factor
    if orientation in _TRANSPOSITIONS:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    return image, reduced, _upright_size(size, orientation)


def _load_tiff(image: Image.Image) -> None:
    """Decode a TIFF, which newer versions of Pillow also rotate by its EXIF; do nothing to other formats."""
    if image.format == "TIFF":
        image.load()


def _upright_size(size: tuple[int, int], orientation: int | None) -> tuple[int, int]:
    """Return height and width of an image, of Pillow's `size`, once it is rotated by its orientation."""
    width, height = size
    return (width, height) if orientation is not None and orientation >= 5 else (height, width)


def _late_exif(path: Path | StoredImage) -> dict[str, bytes]:
    """Return the EXIF block that follows the pixels of a PNG, as Pillow names it; nothing without one."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return {"exif": b"Exif\0\0" + file.read(min(length, 1 << 20))}
            file.seek(length + 4, os.SEEK_CUR)
    return {}


def _warn_of_exif(path: Path | StoredImage) -> None:
    warnings.warn(
        f"{path}: its EXIF block is damaged, so the image is not rotated; rotate it if it lies on its side",
        stacklevel=4,
    )


def _orientation(image: Image.Image) -> int | None:
    """Return EXIF's orientation, from 1 to 8, or None if there is an EXIF block that cannot be read."""
    with _pillow_silent():
        try:
            # The base class's method: that of PNG decodes the whole image to read the chunks after it.
            orientation = Image.Image.getexif(image).get(_ORIENTATION)
            if orientation is None and image.info.get("exif"):
                # Pillow may have met the fault while it opened the image, and keeps the entries read so far.
                warnings.filterwarnings("error", module=r"PIL\.")
                Image.Exif().load(image.info["exif"])
            return orientation if orientation in _TRANSPOSITIONS else 1
        except MemoryError:
            raise
        except Exception:  # damage raises many types: struct.error, SyntaxError, KeyError, TypeError, ...
            return None


def _open(path: Path | StoredImage) -> Image.Image:
    """Open an image by its header alone, after all checks that the header allows."""
    try:
        if isinstance(path, Path):
            check_plain(path, "image")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such image file; add it, or remove what names it") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    found, wanted = format_of(path), " or ".join(FORMATS)
    if found is None:
        raise UserError(f"{path}: not an image; replace it by {wanted}")
    if found not in FORMATS:
        remedy = missing_package(HEIF_PACKAGE, "convert it") if found == "HEIF" else f"convert it to {wanted}"
        raise UserError(f"{path}: holds {found}, which is not read; {remedy}")
    with _damage_as_user_error(path), _pillow_silent():
        # Each of these reads the header only. `Image.open` has another pixel limit, and opens the second
        # image that phones append to a JPEG (MPO).
        image = _READERS[found](path if isinstance(path, Path) else path.open())
    try:
        if isinstance(image, TiffImageFile):
            with _damage_as_user_error(path):
                check_tiff(image, path)
        _check_pixels(image, path)
        if min(image.size) < MINIMUM_SIDE:
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels, but {MINIMUM_SIDE} a side are needed; "
                "remove or replace it"
            )
    except UserError:
        image.close()
        raise
    return image


def _check_pixels(image: Image.Image, path: Path | StoredImage, more_bytes: int = 0) -> None:
    """Raise a UserError for an image that needs too much memory, with `more_bytes` added for each pixel."""
    if image.format == "JPEG":
        size = _BYTES_OF_PROGRESSIVE if image.info.get("progressive") else _BYTES_OF_JPEG
    else:
        by_mode = _BYTES_OF_FORMAT.get(image.format or "", _BYTES_OF_MODE)
        size = by_mode.get(image.mode, _BYTES_OF_OTHER)
    most = _MEMORY // (size + more_bytes)
    if image.width * image.height > most:
        sides = f"{image.width} x {image.height}"
        raise UserError(
            f"{path}: more than {most // 1_000_000} million pixels ({sides}); scale it down or remove it"
        )


def _unreadable(path: Path | StoredImage, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable")
