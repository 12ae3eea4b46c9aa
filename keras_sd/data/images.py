"""Reading images that come from outside: checked formats and sizes, square crops."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from keras_sd.errors import UserError
from keras_sd.files.image_files import check_plain
from keras_sd.models.pixels import WHITE

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that are read; a file's format is told by its content, not by its name."""

SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".avif"),
}
"""Names that are taken for images; those of other formats than `FORMATS` are refused, not passed over."""

MINIMUM_SIDE = 16

# The first bytes of a file may promise any number of pixels: as many are read as this memory holds. A pixel
# takes so many bytes at the worst moment, as measured: decoded in Pillow's layout, joined with white, and for
# WebP in its library's canvases.
_MEMORY = 500_000_000
_BYTES_OF_JPEG = 2  # which is made smaller while it is decoded
_BYTES_OF_PROGRESSIVE = 8  # JPEGs that are held as coefficients until their last byte
_BYTES_OF_WEBP = {"RGB": 20, "RGBA": 22}
_BYTES_OF_MODE = {"1": 4, "L": 4, "RGB": 4, "CMYK": 4, "RGBA": 8, "P": 12, "PA": 12, "LA": 12}
_BYTES_OF_OTHER = 16
_BYTES_WHOLE = 5  # more, where an image is wanted as large as it is
# Images with more are made smaller as they are decoded, where a smaller one is wanted in the end.
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
"""What makes an image upright, for each orientation of EXIF."""

_READERS = {"PNG": PngImageFile, "JPEG": JpegImageFile, "BMP": BmpImageFile, "WEBP": WebPImageFile}

_ORIENTATION = 0x0112

# Filters of warnings belong to the whole process, and images are read by threads.
_FILTERING = threading.Lock()


def check_image(path: Path) -> bool:
    """Refuse what cannot become a training image, without decoding pixels where that can be avoided.

    Returns:
        Whether it can be made upright: False if its EXIF block is damaged; it is then taken as it is stored.

    Raises:
        UserError: not a file, not readable, another format, too large, too small, or truncated.
    """
    with _open(path) as image, _damage_told(path):
        is_upright = _orientation(image) is not None
        if image.format == "PNG":
            image.verify()  # every chunk and its checksum
        elif not _has_end(path, image):
            image.load()
    return is_upright


def read_square(path: Path, size: int, tell: Callable[[Path], None] | None = None) -> np.ndarray:
    """The image's centre square, uint8 (size, size, 3), transparency on white, upright.

    Args:
        tell: called with the path of an image whose EXIF block is damaged, which is taken as it is stored; by
            default that is a warning.

    Raises:
        UserError: as `check_image`.
    """
    with _open(path) as image, _damage_told(path):
        return square(_upright(image, path, tell, (size, size)), size)


def read_image(
    path: Path,
    size: tuple[int, int] | None = None,
    tell: Callable[[Path], None] | None = None,
    smallest_side: int | None = None,
) -> np.ndarray:
    """The whole image as uint8 (height, width, 3), upright, transparency on white.

    Args:
        size: (height, width) to scale it to with Lanczos, where it is another.
        tell: as `read_square` takes it.
        smallest_side: an image of very many pixels may be made smaller, its sides no shorter than this.

    Raises:
        UserError: as `check_image`; an image of very many pixels is wanted as it is.
    """
    wanted = size or (smallest_side and (smallest_side, smallest_side))
    with _open(path) as image, _damage_told(path):
        if wanted is None:
            _check_pixels(image, path, _BYTES_WHOLE)
        image = _on_white(_upright(image, path, tell, wanted))
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_mask(
    path: Path, size: tuple[int, int] | None = None, tell: Callable[[Path], None] | None = None
) -> np.ndarray:
    """An image as a mask, bool (height, width): True where it is white, from 128 of 255.

    What is transparent is False. People also paint in any colour on a transparent layer: where no opaque part
    is white, all that is opaque is True, as in AUTOMATIC1111's web interface.

    Args:
        size: (height, width) to scale it to; a pixel is True if anything in it is white, so that no line is
            lost.
        tell: as `read_square` takes it.

    Raises:
        UserError: as `check_image`, or nothing is white.
    """
    with _open(path) as image, _damage_told(path):
        _check_pixels(image, path, _BYTES_WHOLE)
        image = _in_eight_bits(_upright(image, path, tell))
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


def format_of(path: Path) -> str | None:
    """The format of an image file by its first bytes, or None for what is no image that is known here.

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
    """The centre square of a Pillow image, resized with Lanczos to uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(_on_white(image), (size, size), Image.Resampling.LANCZOS))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype("uint8"))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """The image in 8 bits of RGB, transparency on white."""
    image = _in_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return _composed(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _composed(image: Image.Image) -> Image.Image:
    """An image with transparency on white, strip by strip: all at once would take three times its memory."""
    result = Image.new("RGB", image.size)
    rows = max(1, _MANY_PIXELS // 8 // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises at damaged bytes, of many types, into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None):
            raise _unreadable(path, error) from error
        raise _truncated(path) from error


@contextlib.contextmanager
def _pillow_silent() -> Iterator[None]:
    """Keeps Pillow's warnings back: they name no file, and its limit of pixels is looser than ours."""
    with _FILTERING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _upright(
    image: Image.Image,
    path: Path,
    tell: Callable[[Path], None] | None,
    wanted: tuple[int, int] | None = None,
) -> Image.Image:
    """The image turned as its camera says; as it is stored where that cannot be read, which is told."""
    factor = _reduction(image, wanted)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))  # which JPEGs know how to do
        factor = _reduction(image, wanted)
    image.load()
    orientation = _orientation(image)
    if orientation is None:
        (tell or _warn_of_exif)(path)
    if factor > 1:
        image = (image if image.mode in _REDUCIBLE else image.convert("RGBA")).reduce(factor)
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def _reduction(image: Image.Image, wanted: tuple[int, int] | None) -> int:
    """How many times smaller an image of very many pixels can be made, with twice the sides wanted."""
    if wanted is None or image.width * image.height <= _MANY_PIXELS:
        return 1
    return max(1, min(image.size) // (2 * max(wanted)))


def _warn_of_exif(path: Path) -> None:
    warnings.warn(
        f"{path}: its EXIF block is damaged, so it is taken as it is stored; turn it if it lies on its side",
        stacklevel=4,
    )


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation, from 1 to 8, or None if there is a block of EXIF that cannot be read."""
    with _pillow_silent():
        try:
            # The method of the base: that of PNG decodes the whole image to find what stands behind it.
            orientation = Image.Image.getexif(image).get(_ORIENTATION)
            if orientation is None and image.info.get("exif"):
                # What opened the image may have met the fault before, and Pillow keeps what it had by then.
                warnings.filterwarnings("error", module=r"PIL\.")
                Image.Exif().load(image.info["exif"])
            return orientation if orientation in _TRANSPOSITIONS else 1
        except MemoryError:
            raise
        except Exception:  # struct.error, SyntaxError, KeyError, TypeError, ...: damage has many types
            return None


def _open(path: Path) -> Image.Image:
    """Read the header only, and refuse by it."""
    try:
        check_plain(path, "image")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such image file; add it, or remove what names it") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    found, wanted = format_of(path), " or ".join(FORMATS)
    if found is None:
        raise UserError(f"{path}: not an image; replace it by {wanted}")
    if found not in FORMATS:
        raise UserError(f"{path}: holds {found}, which is not read; convert it to {wanted}")
    with _damage_told(path), _pillow_silent():
        # Each reads the header only. Pillow's own way in has another limit of pixels, and takes what phones
        # put behind the first image (MPO) for more to read.
        image = _READERS[found](path)
    try:
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


def _check_pixels(image: Image.Image, path: Path, more_bytes: int = 0) -> None:
    """Refuses an image that would take too much memory, with so many bytes more for each pixel."""
    if image.format == "JPEG":
        size = _BYTES_OF_PROGRESSIVE if image.info.get("progressive") else _BYTES_OF_JPEG
    else:
        by_mode = _BYTES_OF_WEBP if image.format == "WEBP" else _BYTES_OF_MODE
        size = by_mode.get(image.mode, _BYTES_OF_OTHER)
    most = _MEMORY // (size + more_bytes)
    if image.width * image.height > most:
        sides = f"{image.width} x {image.height}"
        raise UserError(
            f"{path}: more than {most // 1_000_000} million pixels ({sides}); scale it down or remove it"
        )


def _has_end(path: Path, image: Image.Image) -> bool:
    """Whether the file is seen to be whole from its size or its last bytes."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if image.format == "WEBP":  # "RIFF", then the length of what follows
            return length >= int.from_bytes(head[4:8], "little") + 8
        if image.format == "JPEG":
            # Two bytes mark the end, before a few kilobytes that some cameras append.
            # In a smaller file a thumbnail's end could be taken for it, so it has to be last.
            file.seek(max(length - 65536, 0))
            tail = file.read()
            return b"\xff\xd9" in tail if length > 65536 else tail.rstrip(b"\0").endswith(b"\xff\xd9")
    return False


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable")


def _truncated(path: Path) -> UserError:
    return UserError(f"{path}: truncated or damaged image; replace the file")
