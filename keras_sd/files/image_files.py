"""Image files: PNGs and GIFs that hold their generation parameters, and contact sheets."""

import math
import re
import stat
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from keras_sd.arguments import Images, checked_images, checked_path, real_number, shown, whole_number
from keras_sd.errors import UserError
from keras_sd.files.writing import replaced, utf8

_CHUNK = "parameters"
_LONGEST_TEXT = 2**20
_OTHER_FORMATS = ("JPEG", "WEBP", "BMP", "GIF")
_NEGATIVE = "Negative prompt: "
# An item between commas: a name and a value, which is quoted as in JSON if it holds a comma or a colon. The
# pattern matches wherever it is tried, so the time is linear in the length of the text.
_PIECE = re.compile(r'([^,:]*)(?::\s*("(?:\\.|[^\\"])*"(?=,|$)|[^,]*))?(?:,|$)')
_NAME = re.compile(r"\w[\w \-/]*")

_CAPTION_SIZE = 11
_CAPTION_LINES = 3
_MARGIN = 4


def format_parameters(parameters):
    """Return the text of the `parameters` chunk, in the convention of AUTOMATIC1111's web UI.

    Args:
        parameters: dictionary with "prompt", optionally "negative_prompt", and the settings under their
            displayed names ("Steps", "Sampler", ...), in order.

    Raises:
        UserError: there is no prompt.
    """
    if not isinstance(parameters, dict) or not isinstance(parameters.get("prompt"), str):
        raise UserError(f"parameters {shown(parameters)}: no prompt; give a dictionary with `prompt`")
    settings = dict(parameters)
    lines = [settings.pop("prompt")]
    negative = settings.pop("negative_prompt", None)
    if negative:
        lines.append(_NEGATIVE + negative)
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return utf8("\n".join(lines)).decode()


def _quoted(value):
    if not re.search(r'[,:\n"]', value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _unquoted(value):
    if not value.startswith('"'):
        return value
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], value[1:-1])


def parse_parameters(text):
    """Parse a text of `format_parameters` into a dictionary; the settings are strings."""
    *lines, last = text.split("\n")
    pieces = [(match[1].strip(), match[2]) for match in _PIECE.finditer(last)]
    settings = [(name, value) for name, value in pieces if value is not None and _NAME.fullmatch(name)]
    if pieces[0] not in settings:  # a prompt without settings
        lines, settings = [*lines, last], []
    negative = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    parameters = {"prompt": "\n".join(lines[:negative])}
    if negative < len(lines):
        parameters["negative_prompt"] = "\n".join(lines[negative:]).removeprefix(_NEGATIVE)
    return parameters | {name: _unquoted(value.strip()) for name, value in settings}


def save_png(image: Images, path: str | Path, parameters: dict[str, Any] | None = None) -> None:
    """Write an image as PNG.

    Args:
        image: uint8 `(h, w, 3)`, or greyscale `(h, w)`.
        path: the file. Its folder is created if necessary; an existing file is replaced atomically.
        parameters: the generation parameters, as `format_parameters` takes them.

    Raises:
        UserError: the image has another type or shape, or the file cannot be written.
    """
    image = checked_images("image", image, "(height, width, 3)", "(height, width)")
    information = PngInfo()
    if parameters is not None:
        information.add_text(_CHUNK, format_parameters(parameters))
    with replaced(path) as staging:
        Image.fromarray(image).save(staging, format="PNG", pnginfo=information)


def save_gif(
    frames: Images, path: str | Path, frame_rate: float = 10.0, parameters: dict[str, Any] | None = None
) -> None:
    """Write images as an endless GIF; its comment holds the parameters, as in A1111's web UI.

    Args:
        frames: uint8 `(n, h, w, 3)`.
        path: the file; its folder is created if necessary.
        frame_rate: images per second; a GIF rounds the duration to hundredths of a second.
        parameters: the generation parameters, as `format_parameters` takes them.

    Raises:
        UserError: the images have another type or shape, the frame rate is out of range, or the file cannot
            be written.
    """
    frames = checked_images("frames", frames, "(n, height, width, 3)")
    frame_rate = real_number("frame_rate", frame_rate, lambda rate: 0.002 <= rate <= 100, "0.002 to 100")
    first, *others = (Image.fromarray(frame) for frame in frames)
    options = {"append_images": others, "duration": round(1000 / frame_rate), "loop": 0}
    if parameters is not None:
        options["comment"] = format_parameters(parameters).encode()
    with replaced(path) as staging:
        first.save(staging, format="GIF", save_all=True, **options)


def check_plain(path, title):
    """Check that a path is a regular file; reading a pipe or a device might never end.

    Args:
        title: the kind of file, for the message.

    Raises:
        UserError: it is not a regular file.
        FileNotFoundError: there is no such file.
    """
    mode = checked_path("path", path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise UserError(f"{path}: is {kind}; name the {title}'s own file")


def read_parameters(path: str | Path) -> dict[str, str]:
    """Return the generation parameters in a PNG or GIF; an empty dictionary if it holds none.

    Raises:
        UserError: there is no such image, or it is not a regular file.
    """
    try:
        check_plain(path, "image")
        with open(path, "rb") as file:
            is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
        # This reads the chunks before the pixels only. Pillow limits the size of compressed texts.
        with PngImageFile(path) if is_png else Image.open(path, formats=_OTHER_FORMATS) as image:
            text = image.info.get(_CHUNK) or image.info.get("comment") or ""
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
        if len(text) > _LONGEST_TEXT:
            raise ValueError("too long for parameters")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow raises many types: SyntaxError, struct.error, ValueError, ...
        raise UserError(f"{path}: not an image that can be read; give a PNG file") from error
    return parse_parameters(text) if text else {}


def image_grid(
    images: Iterable[Images], labels: Sequence[str] | None = None, columns: int | None = None, scale: int = 1
) -> Images:
    """Lay images out as a contact sheet on white, each above its label.

    Args:
        images: uint8 `(n, h, w, 3)`, or a list of such images of one size.
        labels: a text for each image, wrapped to its width and cut after three lines.
        columns: images per row; by default about as many as there are rows.
        scale: enlarges each pixel to a square of this side, so that small images have room for a label.

    Returns:
        The sheet, uint8 `(height, width, 3)`.

    Raises:
        UserError: the images have another type or shape, a number is out of range, or labels are missing.
    """
    images = checked_images(
        "images", list(images) if isinstance(images, Iterable) else images, "(n, height, width, 3)"
    )
    whole_number("scale", scale, 1)
    if columns is not None:
        whole_number("columns", columns, 1)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    if labels is not None and len(labels) != len(images):
        raise UserError(f"contact sheet: {len(labels)} labels for {len(images)} images; give one for each")
    count, height, width = images.shape[:3]
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    font = ImageFont.load_default(_CAPTION_SIZE)
    captions = [_wrap(label, font, width) for label in labels or []]
    line_height = sum(font.getmetrics())
    caption_height = line_height * max((len(lines) for lines in captions), default=0)
    cell_width, cell_height = width + _MARGIN, height + caption_height + _MARGIN
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        sheet.paste(Image.fromarray(image), (left, top))
        for line, text in enumerate(captions[index] if captions else ()):
            draw.text((left, top + height + line * line_height), text, fill="black", font=font)
    return np.asarray(sheet)


def _wrap(label, font, width):
    """Break a label into the lines that fit below an image."""
    characters = max(int(width / font.getlength("n")), 1)
    return textwrap.wrap(label, characters, max_lines=_CAPTION_LINES, placeholder="…") or [""]
