"""Images, and what their files say of how they were made."""

import io

import numpy as np

from tests.robustness.reader import reader


def image_files():
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (20, 24, 4), "uint8")
    information = PngInfo()
    information.add_text(
        "parameters", "a cat\nNegative prompt: dog\nSteps: 3, Sampler: DDIM, Seed: 1, Size: 24x20"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, mode, options in (
        ("a.png", "RGBA", {"pnginfo": information, "exif": exif}),
        ("b.jpg", "RGB", {"exif": exif}),
        ("c.webp", "RGB", {"exif": exif}),
        ("d.bmp", "RGB", {}),
        ("e.png", "P", {}),
        ("f.png", "I;16", {}),
        ("g.jpg", "CMYK", {"progressive": True}),
        ("h.png", "LA", {}),
    ):
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(generator.integers(0, 65_536, (20, 24), "uint16"))
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name[2:], name[2:].upper()), **options)
        files[name] = buffer.getvalue()
    return files


def _bombs():
    """Images whose few bytes stand for many pixels."""
    from PIL import Image

    contents = []
    for mode, size in (
        ("1", (20_000, 20_000)),
        ("L", (9_000, 9_000)),
        ("1", (60_000, 1)),
        ("1", (1, 60_000)),
    ):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(64)]
    frames[0].save(buffer, "WEBP", save_all=True, appendimage_files=frames[1:])
    contents.append(buffer.getvalue())
    return [*contents, b"GIF89a", b"II*\0", b"\0\0\0\x18ftypheic", b"<svg/>"]


@reader(image_files, others=_bombs)
def images(folder, file):
    from keras_sd.data.images import check_image, read_image, read_mask, read_square
    from keras_sd.errors import UserError
    from keras_sd.files.image_files import read_parameters

    faults = []
    for path in [folder / file] if file else sorted(folder.iterdir()):
        for read in (
            check_image,
            read_parameters,
            lambda path: read_square(path, 16),
            read_image,
            read_mask,
        ):
            try:
                read(path)
            except UserError as error:
                faults.append(error)
    if faults:
        raise faults[0]
