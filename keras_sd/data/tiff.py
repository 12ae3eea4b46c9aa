"""Says which of the many kinds of TIFF are read."""

from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    ROWSPERSTRIP,
    SAMPLESPERPIXEL,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)

from keras_sd.errors import UserError

# Pillow's names. A file chooses among all of libtiff's decoders, and the size of what they allocate.
_COMPRESSIONS = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg"),
    *("tiff_ccitt", "group3", "group4"),
)
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L")
_MOST_OF_STRIP = 200_000_000  # bytes


def check_tiff(image: TiffImageFile, place: object) -> None:
    """Raise a UserError for a TIFF without 8 or 16 bits a channel, or that is packed in a rare way.

    Args:
        image: opened, but not yet decoded.
        place: the file, for the message.
    """
    tags, fault = image.tag_v2, None
    packed, bits = image.info.get("compression", "raw"), max(tags.get(BITSPERSAMPLE, (1,)))
    width, height = int(tags[IMAGEWIDTH]), int(tags[IMAGELENGTH])
    rows = min(int(tags.get(ROWSPERSTRIP, height)), height)
    width, rows = int(tags.get(TILEWIDTH, width)), int(tags.get(TILELENGTH, rows))
    size = width * rows * int(tags.get(SAMPLESPERPIXEL, 1)) * bits // 8
    is_inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == 0 and image.mode.startswith("I;16")
    if packed not in _COMPRESSIONS:
        fault = f"is packed by {packed}, which is not read"
    elif image.mode not in _MODES or is_inverted:
        kind = f"{bits} bits of mode {image.mode}" + (", with white as 0" if is_inverted else "")
        fault = f"holds {kind}, which is not read"
    elif size > _MOST_OF_STRIP:
        fault = f"has strips or tiles of {size // 1_000_000} million bytes"
    if fault is not None:
        raise UserError(f"{place}: {fault}; save it with 8 or 16 bits a channel, packed by LZW or Deflate")
