"""Images as cameras, phones and programs write them, whole and damaged."""

import io
import os
import struct
import subprocess
import sys
import warnings

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from keras_sd.data import images
from keras_sd.data.images import check_image, examine_image, format_of, read_image, read_mask, read_square
from keras_sd.errors import UserError

EXIF = b"Exif\0\0"
ORIENTATION = 0x0112


def ifd(*entries, count=None, following=0):
    """A block of EXIF: entries of (tag, type, count, four bytes of value)."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    number = len(entries) if count is None else count
    return EXIF + b"II*\0\x08\0\0\0" + struct.pack("<H", number) + packed + struct.pack("<I", following)


DAMAGED_EXIF = {
    "no header": EXIF + b"no TIFF at all",
    "cut header": EXIF + b"II*",
    "cut directory": EXIF + b"II*\0\x08\0\0\0\x05",
    "no directory": EXIF + b"II*\0\xff\xff\0\0",
    "entries missing": ifd((0x010F, 2, 4, b"abc\0"), count=40),
    "value outside": ifd((0x010F, 2, 4000, b"\xff\xff\xff\x7f")),
}


def gradient(height=30, width=40):
    """Every corner of another colour."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 99)], -1).astype(
        "uint8"
    )


def all_readings(path):
    """An image by each of the functions that read one: all of it, and the centre square."""
    return read_image(path), read_square(path, 30)


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_leaves_the_image_as_it_is_stored(tmp_path, kind, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path, exif=DAMAGED_EXIF[kind], lossless=True)
    assert check_image(path) is False
    with pytest.warns(UserWarning) as told:
        whole, square = all_readings(path)
    assert [str(warning.message).startswith(f"{path}: its EXIF block is damaged") for warning in told] == [
        True
    ] * 2
    assert np.abs(whole.astype(int) - gradient()).mean() < 8 and square.shape == (30, 30, 3)
    named = []
    read_square(path, 16, on_damage=named.append)
    assert named == [path]


def test_a_damaged_block_that_tells_the_orientation_is_obeyed(tmp_path, recwarn):
    block = ifd((ORIENTATION, 3, 1, b"\x03\0\0\0"), (0x927C, 7, 4000, b"\xff\xff\0\0"))
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=block)
    assert check_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gradient()[::-1, ::-1])
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_orientation_is_that_of_pillow(tmp_path, orientation, suffix, recwarn):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(gradient()).save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), expected)
    assert check_image(tmp_path / f"a.{suffix}") and not recwarn.list


def test_an_orientation_of_another_type_is_none(tmp_path, recwarn):
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=ifd((ORIENTATION, 2, 4, b"six\0")))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gradient())
    assert not recwarn.list


def test_the_first_image_of_a_phone_is_taken(tmp_path, recwarn):
    path = tmp_path / "a.jpg"
    first, second = (Image.fromarray(pixels) for pixels in (gradient(), 255 - gradient()))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    first.save(path, format="MPO", save_all=True, append_images=[second], exif=exif, quality=95)
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert check_image(path) and format_of(path) == "JPEG"
    expected = np.rot90(gradient(), -1).astype(int)
    assert np.abs(read_image(path) - expected).mean() < 4
    assert read_square(path, 16).shape == (16, 16, 3)
    # Its index of images damaged, byte by byte.
    whole = path.read_bytes()
    start = whole.index(b"MPF\0") + 4
    for place in range(start, start + 80):
        for value in (0, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            check_image(path)
            assert np.abs(read_image(path) - expected).mean() < 4
    assert not recwarn.list


def test_profiles_and_thumbnails_that_are_damaged(tmp_path, recwarn):
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 12)).save(thumbnail, format="JPEG")
    cut = thumbnail.getvalue()[:-30]
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        image = Image.fromarray(gradient())
        image.save(
            path, icc_profile=b"no profile" * 20, exif=ifd((0x0100, 3, 1, b"\1\0\0\0")) + cut, lossless=True
        )
        assert check_image(path)
        assert np.abs(read_image(path).astype(int) - gradient()).mean() < 8
    # JPEGs whose profile lacks a part, and whose thumbnail ends before they do.
    data = (tmp_path / "a.jpg").read_bytes()
    place = data.index(b"ICC_PROFILE\0") + 12
    (tmp_path / "a.jpg").write_bytes(data[:place] + b"\1\7" + data[place + 2 :])
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - gradient()).mean() < 8
    (tmp_path / "a.jpg").write_bytes(data[:-200])
    with pytest.raises(UserError, match="truncated or damaged"):
        check_image(tmp_path / "a.jpg")
    assert not recwarn.list


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_modes(tmp_path, recwarn):
    colours = Image.fromarray(gradient())
    pixels, grey = gradient().astype(float), np.asarray(colours.convert("L"))
    alpha = np.linspace(0, 255, 40).astype("uint8")[None].repeat(30, 0)
    share = alpha[..., None] / 255
    deep = Image.fromarray(grey.astype("uint16") * 257)
    palette = colours.quantize(16)
    transparent = np.asarray(palette.convert("RGB")).astype(float)
    transparent[np.asarray(palette) == 3] = 255
    with_alpha = colours.copy()
    with_alpha.putalpha(Image.fromarray(alpha))
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    cases = {
        "cmyk.jpg": (colours.convert("CMYK"), pixels, {"quality": 95}),
        "grey.jpg": (Image.fromarray(grey), grey[..., None], {"quality": 95}),
        "grey.png": (Image.fromarray(grey), grey[..., None], {}),
        "la.png": (grey_alpha, grey[..., None] * share + 255 * (1 - share), {}),
        "rgba.webp": (with_alpha, pixels * share + 255 * (1 - share), {"lossless": True}),
        "deep.png": (deep, grey[..., None], {}),
        "palette.png": (palette, transparent, {"transparency": 3}),
        "bits.png": (Image.fromarray(grey > 99), 255.0 * (grey > 99)[..., None], {}),
        "key.png": (Image.fromarray(grey), np.where(grey == 99, 255, grey)[..., None], {"transparency": 99}),
    }
    for name, (image, expected, options) in cases.items():
        path = saved(tmp_path / name, image, **options)
        assert check_image(path), name
        whole, square = all_readings(path)
        difference = np.abs(whole.astype(float) - np.broadcast_to(expected, whole.shape)).mean()
        assert difference < 4, (name, difference)
        np.testing.assert_array_equal(square, whole[:, 5:35], err_msg=name)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_the_first_frame_of_an_animation(tmp_path, suffix, recwarn):
    frames = [Image.fromarray(pixels) for pixels in (gradient(), 255 - gradient(), gradient()[::-1])]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert check_image(path)
    np.testing.assert_array_equal(read_image(path), gradient())
    assert not recwarn.list


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"\xff\x0a", "JPEG XL"),
        (b"8BPS", "PSD"),
    ],
)
def test_other_formats_are_named(tmp_path, head, found):
    (tmp_path / "a.png").write_bytes(head + bytes(100))
    for read in (check_image, read_image):
        with pytest.raises(
            UserError, match=f"a.png: holds {found}, which is not read; convert it to PNG or JPEG"
        ):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "avif", "gif", "tiff"])
def test_damage_anywhere_is_one_line_or_an_image(tmp_path, suffix):
    """Bytes changed at random, most of them in the headers, where Pillow's errors have many types."""
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "maker", 72.5
    options = {} if suffix in ("bmp", "gif") else {"exif": exif, "icc_profile": b"profile" * 9}
    Image.fromarray(gradient()).save(path, **options)
    whole = np.frombuffer(path.read_bytes(), "uint8")
    generator = np.random.default_rng(0)
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for trial in range(400):
            damaged = whole.copy()
            end = len(whole) if trial % 4 == 0 else min(len(whole), 400)
            places = generator.integers(0, end, generator.integers(1, 5))
            damaged[places] = generator.integers(0, 256, len(places))
            path.write_bytes(damaged.tobytes())
            for function in (check_image, read_image):
                try:
                    function(path)
                    read += 1
                except UserError as error:
                    assert "\n" not in str(error)
    assert read > 20


def test_what_of_a_mask_is_made_anew(tmp_path):
    """White is; with transparency, white that is opaque, or all that is opaque where none of it is white."""
    stroke = np.zeros((30, 40), bool)
    stroke[4:9, 5:30] = True
    elsewhere = np.zeros((30, 40), bool)
    elsewhere[20:25, 5:30] = True

    def layer(colour, opaque, background=(255, 255, 255)):
        pixels = np.full((30, 40, 4), (*background, 0), "uint8")
        pixels[opaque] = (*colour, 255)
        return pixels

    whole = np.full((30, 40), 255, "uint8")
    white, black, red = (255, 255, 255), (0, 0, 0), (250, 20, 20)
    both = np.where(elsewhere[..., None], layer(black, elsewhere), layer(white, stroke))
    cases = {
        "white on black": (stroke * np.uint8(255), stroke),
        "grey": (stroke * np.uint8(128), stroke),
        "white on nothing": (layer(white, stroke), stroke),
        "black on nothing": (layer(black, stroke), stroke),
        "red on nothing": (layer(red, stroke, black), stroke),
        "white and black on nothing": (both, stroke),
        "no transparency": (np.dstack([layer(white, stroke, black)[..., :3], whole]), stroke),
        "an erased part": (layer(black, ~stroke), ~stroke),
        "16 bits": ((stroke * 65535).astype("uint16"), stroke),
    }
    for name, (pixels, expected) in cases.items():
        Image.fromarray(pixels).save(tmp_path / "mask.png")
        mask = read_mask(tmp_path / "mask.png")
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected, err_msg=name)
    for pixels, brightest in (
        (np.full((30, 40), 127, "uint8"), 127),
        (layer(white, stroke & elsewhere), 0),
        (np.dstack([np.zeros((30, 40, 3), "uint8"), whole]), 0),
    ):
        Image.fromarray(pixels).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match=f"has no white, .* value is {brightest}.; paint white"):
            read_mask(tmp_path / "mask.png")


def test_a_mask_keeps_its_thinnest_lines_when_it_is_scaled(tmp_path):
    pixels = np.zeros((640, 960), "uint8")
    pixels[333], pixels[5, 7] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    expected = np.zeros((16, 24), bool)
    expected[333 * 16 // 640], expected[0, 0] = True, True
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (16, 24)), expected)
    Image.fromarray(expected).save(tmp_path / "small.png")
    np.testing.assert_array_equal(
        read_mask(tmp_path / "small.png", (32, 48)), expected.repeat(2, axis=0).repeat(2, axis=1)
    )


def test_large_photos_are_read_smaller_and_within_memory(tmp_path):
    """A hundred megapixels, as phones take them, and the same as a whole, which nobody asks for."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (12_000, 9_000), (10, 200, 30)).save(path, quality=30)
    assert check_image(path)
    assert np.abs(read_square(path, 32).astype(int) - (10, 200, 30)).max() <= 3
    height, width, _ = read_image(path, smallest_side=1024).shape
    assert height >= 2048 and abs(width / height - 12 / 9) < 0.01
    with pytest.raises(UserError, match=r"more than 71 million pixels \(12000 x 9000\)"):
        read_image(path)


def test_transparency_is_laid_on_white_strip_by_strip(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 20, 4), "uint8")
    image = Image.fromarray(pixels)
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    monkeypatch.setattr(images, "_MANY_PIXELS", 8 * 20 * 5)
    np.testing.assert_array_equal(images._on_white(image), expected)


def test_what_is_no_plain_file_is_told_from_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    faults = {"pipe.png": "is not a plain file", "loop.png": "cannot be read", "x": "no such image file"}
    for name, line in faults.items():
        with pytest.raises(UserError, match=f"{name}: {line}"):
            read_image(tmp_path / name)


def test_avif_and_gif(tmp_path, recwarn):
    """AVIF with EXIF and transparency, and the first frame of a GIF."""
    alpha = np.linspace(0, 255, 40).astype("uint8")[None].repeat(30, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with_alpha = Image.fromarray(gradient())
    with_alpha.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    frames = [Image.fromarray(pixels).quantize(64) for pixels in (gradient(), 255 - gradient())]
    first = np.asarray(frames[0].convert("RGB"))
    cases = {
        "a.avif": (Image.fromarray(gradient()), gradient(), {"quality": 95}),
        "turned.avif": (Image.fromarray(gradient()), np.rot90(gradient(), -1), {"quality": 95, "exif": exif}),
        "clear.avif": (with_alpha, gradient() * share + 255 * (1 - share), {"quality": 95}),
        "a.gif": (frames[0], first, {"save_all": True, "append_images": frames[1:]}),
    }
    for name, (image, expected, options) in cases.items():
        path = saved(tmp_path / name, image, **options)
        examined = examine_image(path)
        assert (examined.height, examined.width) == expected.shape[:2], name
        assert np.abs(read_image(path).astype(float) - expected).mean() < 4, name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match="truncated or damaged"):
            examine_image(path)
    assert not recwarn.list


def with_alpha(pixels):
    """An image whose opacity rises from left to right, and what it looks like on white."""
    alpha = np.linspace(0, 255, pixels.shape[1]).astype("uint8")[None].repeat(len(pixels), 0)
    share = alpha[..., None] / 255
    image = Image.fromarray(pixels)
    image.putalpha(Image.fromarray(alpha))
    return image, pixels * share + 255 * (1 - share)


def test_heic(tmp_path, recwarn):
    """Photos of phones, on their sides, and with transparency."""
    clear, on_white = with_alpha(gradient(64, 80))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    cases = {
        "a.heic": (Image.fromarray(gradient(64, 80)), gradient(64, 80), {}),
        "turned.heic": (Image.fromarray(gradient(64, 80)), np.rot90(gradient(64, 80), -1), {"exif": exif}),
        "clear.heif": (clear, on_white, {}),
    }
    for name, (image, expected, options) in cases.items():
        path = tmp_path / name
        pillow_heif.from_pillow(image).save(
            path, quality=95, **{key: value.tobytes() for key, value in options.items()}
        )
        examined = examine_image(path)
        assert format_of(path) == "HEIF"
        assert (examined.height, examined.width) == expected.shape[:2], name
        assert np.abs(read_image(path).astype(float) - expected).mean() < 4, name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match="truncated or damaged"):
            examine_image(path)
    assert not recwarn.list


WITHOUT_HEIF = """
import sys
sys.modules["pillow_heif"] = None  # as where it is not installed
from pathlib import Path
from keras_sd.data.folders import FolderSource
from keras_sd.data.images import FORMATS, read_image
from keras_sd.errors import UserError
assert "HEIF" not in FORMATS
folder = Path(sys.argv[1])
for read in (lambda: read_image(folder / "a.heic"), lambda: FolderSource(folder, 16, need_captions=False)):
    try:
        read()
    except UserError as error:
        print(error)
"""


def test_heic_without_its_package_is_a_line_with_the_command(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEIF, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = found.stdout.splitlines()
    assert len(lines) == 2 and all("pip install 'keras_sd[heif]'" in line for line in lines), found


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff(tmp_path, compression, recwarn):
    """Every kind that programs for photographs and scanners write; of several pages the first."""
    pixels = gradient()
    grey = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype("uint16")
    grey8 = (grey >> 8).astype("uint8")[..., None].repeat(3, -1)
    palette = Image.fromarray(pixels).quantize(64)
    clear, on_white = with_alpha(pixels)
    pages = {"save_all": True, "append_images": [Image.fromarray(255 - pixels)]}
    cases = {
        "rgb": (Image.fromarray(pixels), pixels, {}),
        "16 bits": (Image.fromarray(grey), grey8, {}),
        "palette": (palette, np.asarray(palette.convert("RGB")), {}),
        "cmyk": (Image.fromarray(pixels).convert("CMYK"), pixels, {}),
        "alpha": (clear, on_white, {}),
        "pages": (Image.fromarray(pixels), pixels, pages),
        "bits": (Image.fromarray(pixels[..., 0] > 127), (pixels[..., :1] > 127) * np.full(3, 255), {}),
    }
    for name, (image, expected, options) in cases.items():
        path = saved(tmp_path / f"{name}.tif", image, compression=compression, **options)
        examined = examine_image(path)
        assert (examined.height, examined.width) == expected.shape[:2], name
        assert np.abs(read_image(path).astype(float) - expected).mean() < 1, name
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = saved(tmp_path / "turned.tiff", Image.fromarray(pixels), compression=compression, exif=exif)
        # What Pillow's own function makes of a format that it does not rotate on its own.
        as_png = saved(tmp_path / "turned.png", Image.fromarray(pixels), exif=exif)
        examined, expected = examine_image(path), read_image(as_png)
        assert (examined.height, examined.width) == expected.shape[:2] and examined.has_sound_exif
        np.testing.assert_array_equal(read_image(path), expected)
        np.testing.assert_array_equal(read_square(path, 20), read_square(as_png, 20))
    path = saved(tmp_path / "a.tif", Image.fromarray(pixels), compression=compression)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match="truncated or damaged"):
        examine_image(path)
    assert not recwarn.list


def tiff(pixels, **others):
    """A TIFF of unsigned integers in one strip, written here, as Pillow writes few kinds."""
    data, (height, width, channels) = pixels.tobytes(), pixels.shape
    bits, photometric = 8 * pixels.dtype.itemsize, 1 if channels == 1 else 2
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: channels, 279: len(data)}
    entries = {number: (4, 1, value) for number, value in tags.items()}
    entries[258] = (3, channels, bits if channels == 1 else 8 + len(data))
    entries |= {number: (4, 1, value) for number, value in others.get("tags", {}).items()}
    packed = [struct.pack("<HHII", number, *entries[number]) for number in sorted(entries)]
    of_bits = struct.pack(f"<{channels}H", *[bits] * channels)
    directory = struct.pack("<H", len(packed)) + b"".join(packed) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(of_bits)) + data + of_bits + directory


def test_sixteen_bits_of_every_colour_in_a_tiff(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(gradient().astype("<u2") * 257))
    examine_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), gradient())


def test_kinds_of_tiff_that_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(gradient()[..., 0].astype("float32")))
    with pytest.raises(UserError, match="holds 32 bits of mode F, which is not read; save it with 8 or 16"):
        read_image(path)
    path = tmp_path / "b.tif"
    path.write_bytes(tiff(gradient(), tags={322: 2**15, 323: 2**15, 324: 8}))
    with pytest.raises(UserError, match="has strips or tiles of 3221 million bytes; save it"):
        examine_image(path)
    Image.fromarray(gradient()[..., 0]).save(tmp_path / "c.tif", compression="zstd")
    with pytest.raises(UserError, match="is packed by zstd, which is not read"):
        examine_image(tmp_path / "c.tif")
    path.write_bytes(tiff(gradient()[..., :1].astype("<u2"), tags={262: 0}))
    with pytest.raises(UserError, match="holds 16 bits of mode I;16, with white as 0, which is not read"):
        examine_image(path)
