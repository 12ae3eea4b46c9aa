"""A folder of photographs as people have them, of every shape, mode and format, with captions."""

import numpy as np
import skimage.data
from PIL import Image

_TURNED = 6  # EXIF's orientation of a camera held upright
_ORIENTATION = 0x0112


def make_photographs(folder, count=None):
    """Writes them, or the first of them, each with its caption in a text file beside it.

    Args:
        folder: made.
        count: how many; all by default.
    """
    folder.mkdir(parents=True)
    for name, write in list(_PHOTOGRAPHS.items())[:count]:
        caption = write(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def _photograph(name):
    """One of the photographs that scikit-image's wheel holds, which nothing is downloaded for."""
    found = getattr(skimage.data, name)()
    return Image.fromarray(found[0] if isinstance(found, tuple) else found)


def _landscape(path):
    _photograph("coffee").save(path, quality=92)
    return "a cup of coffee on a wooden table"


def _portrait(path):
    _photograph("astronaut").crop((96, 0, 416, 512)).save(path, quality=92)
    return "an astronaut in an orange suit, smiling"


def _turned(path):
    """Lies on its side, and says so, as a phone writes it."""
    exif = Image.Exif()
    exif[_ORIENTATION] = _TURNED
    _photograph("rocket").transpose(Image.Transpose.ROTATE_90).save(path, quality=92, exif=exif)
    return "a rocket before its start, at night"


def _grey(path):
    _photograph("camera").save(path, quality=92)
    return "a photographer with his camera, in black and white"


def _for_print(path):
    _photograph("chelsea").convert("CMYK").save(path, quality=92)
    return "a ginger cat, close"


def _transparent(path):
    _photograph("logo").save(path)
    return "the logo of scikit-image"


def _sixteen_bits(path):
    pixels = np.asarray(_photograph("moon")).astype("uint16") * 257
    Image.fromarray(pixels).save(path)
    return "craters on the moon"


def _of_two_lenses(path):
    """A JPEG with a second image behind the first, as many phones write it."""
    left, right = (Image.fromarray(pixels) for pixels in skimage.data.stereo_motorcycle()[:2])
    left.save(path, format="MPO", save_all=True, append_images=[right])
    return "a motorcycle in a workshop"


def _large(path):
    """Twelve megapixels."""
    _photograph("hubble_deep_field").resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=85)
    return "galaxies in deep space"


def _indexed(path):
    _photograph("immunohistochemistry").quantize(64).save(path)
    return "stained tissue under a microscope"


_PHOTOGRAPHS = {
    "landscape.jpg": _landscape,
    "portrait.jpeg": _portrait,
    "turned.jpg": _turned,
    "grey.jpg": _grey,
    "for print.jpg": _for_print,
    "transparent.png": _transparent,
    "sixteen bits.png": _sixteen_bits,
    "of two lenses.jpg": _of_two_lenses,
    "large.JPG": _large,
    "indexed.png": _indexed,
}
