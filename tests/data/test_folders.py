import io
import json
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.folders import FolderSource
from keras_sd.data.images import read_square
from keras_sd.data.sources import available_splits, load_source
from keras_sd.errors import BadSamples, UserError
from keras_sd.training.logs import MetricsLog

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path, colour=RED, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def png(width, height, data=b"", kept=None):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)[:kept]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.fixture
def folder(tmp_path):
    """Two captioned images, which pass."""
    save(tmp_path / "a.png")
    save(tmp_path / "deep" / "b.jpg", BLUE)
    blue = {"file_name": "deep/b.jpg", "text": "a blue square"}
    metadata(tmp_path, blue, {"file_name": "a.png", "text": "rot 🟥"})
    return tmp_path


def fault(folder, need_captions=True):
    with pytest.raises(UserError) as caught:
        load_source(str(folder), "train", 16, need_captions)
    line = str(caught.value)
    assert "\n" not in line and ";" in line  # the fault, then the remedy
    return line


def test_metadata(folder):
    source = load_source(str(folder), "train", 16)
    assert len(source) == 2
    assert [source[i]["captions"] for i in range(2)] == [("rot 🟥",), ("a blue square",)]
    assert source[0]["image"].shape == (16, 16, 3) and source[0]["image"].dtype == np.uint8
    assert (source[0]["image"] == RED).all()


def test_text_files(tmp_path):
    save(tmp_path / "a.webp", lossless=True)
    save(tmp_path / "b.bmp")
    (tmp_path / "a.txt").write_bytes("\ufeffa red square\r\nred\r\n".encode())
    (tmp_path / "b.txt").write_text("another")
    source = FolderSource(tmp_path, 16)
    assert [source[i]["captions"] for i in range(2)] == [("a red square", "red"), ("another",)]


def test_without_captions(tmp_path):
    save(tmp_path / "a.png")
    line = fault(tmp_path)
    assert "a.png: no caption" in line and "metadata.jsonl" in line
    assert load_source(str(tmp_path), "train", 16, need_captions=False)[0]["captions"] == ()


def test_splits(folder):
    assert available_splits(str(folder)) == ("train",)
    with pytest.raises(UserError, match="no sub-folder 'validation'"):
        load_source(str(folder), "validation", 16)
    save(folder / "validation" / "c.png")
    (folder / "validation" / "c.txt").write_text("held out")
    assert available_splits(str(folder)) == ("train", "validation")
    assert load_source(str(folder), "validation", 16)[0]["captions"] == ("held out",)
    assert len(load_source(str(folder), "train", 16)) == 2


def test_another_size(folder, monkeypatch):
    source = load_source(folder, "train", 16)
    (folder / "a.png").write_bytes(b"no image at all")  # no file is checked again
    other = source.at_size(24)
    assert other[1]["image"].shape == (24, 24, 3) and source[1]["image"].shape == (16, 16, 3)
    assert other.captions() == source.captions() == [("rot 🟥",), ("a blue square",)]
    assert other.with_captions(("a square",)).captions() == [("a square",)] * 2


def test_fingerprint(folder):
    first = load_source(folder, "train", 16)
    prints = [first.fingerprint()]
    assert prints == [load_source(folder, "train", 32).fingerprint()]
    moved = folder.rename(folder.with_name("moved"))
    assert load_source(moved, "train", 16).fingerprint() == prints[0]
    with pytest.raises(UserError, match="a.png: cannot be found"):
        first.fingerprint()

    def changed():
        prints.append(load_source(moved, "train", 16).fingerprint())
        return prints[-1] not in prints[:-1]

    os.utime(moved / "a.png", ns=(0, 5))
    assert changed()
    metadata(moved, {"file_name": "deep/b.jpg", "text": "blue"}, {"file_name": "a.png", "text": "red"})
    assert changed()
    (moved / "a.png").rename(moved / "c.png")
    metadata(moved, {"file_name": "deep/b.jpg", "text": "blue"}, {"file_name": "c.png", "text": "red"})
    assert changed()
    assert load_source(moved, "train", 16, need_captions=False).fingerprint() not in prints


def test_fingerprint_of_many_is_fast(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for number in range(1, 2000):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    source = load_source(tmp_path, "train", 16, need_captions=False)
    start = time.process_time()
    source.fingerprint()
    assert time.process_time() - start < 0.5  # 2 s for 100,000 where it takes 0.04 s


def test_empty_folder(tmp_path):
    assert "no images in this folder" in fault(tmp_path)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["{"], "line 1: not valid JSON"),
        ([{"file_name": "a.png", "text": "x"}, "[" * 100_000], "line 2: not valid JSON"),
        ([{"file_name": "a.png"}], "line 1: has no text"),
        ([{"file_name": "a.png", "text": " "}], 'line 1: no "text"'),
        ([{"text": "x"}], "line 1: has no file_name"),
        (["3"], "line 1: not a JSON dictionary"),
        ([{"file_name": "a.png", "text": "x"}] * 2, "line 2: second caption for 'a.png'"),
        ([{"file_name": "c.png", "text": "x"}], "line 1: no image 'c.png'"),
        ([{"file_name": "../a.png", "text": "x"}], "file '../a.png' lies outside the folder"),
        ([{"file_name": "/etc/passwd", "text": "x"}], "file '/etc/passwd' lies outside the folder"),
        (["", ""], "metadata.jsonl: empty"),
    ],
)
def test_bad_metadata(folder, lines, expected):
    metadata(folder, *lines)
    assert expected in fault(folder)


def test_images_without_a_line_are_left_out(folder):
    metadata(folder, {"file_name": "deep/b.jpg", "text": "x"})
    with pytest.warns(UserWarning, match="1 captions for 2 images; 1 are left out, the first is 'a.png'"):
        source = load_source(str(folder), "train", 16)
    assert [example["captions"] for example in source] == [("x",)]


def test_separator_inside_a_caption_is_not_a_line_end(folder):
    entries = [{"file_name": name, "text": "one\u2028two"} for name in ("a.png", "deep/b.jpg")]
    metadata(folder, *[json.dumps(entry, ensure_ascii=False) for entry in entries])
    assert load_source(str(folder), "train", 16)[0]["captions"] == ("one\u2028two",)


def test_not_utf8(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    assert "metadata.jsonl, line 1: not UTF-8" in fault(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt: not UTF-8" in fault(folder)


def test_text_files_of_unequal_number(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("x")
    assert "b.png: no caption; write b.txt" in fault(tmp_path)
    (tmp_path / "b.txt").write_text("\n ")
    assert "b.txt: empty" in fault(tmp_path)
    (tmp_path / "b.txt").write_text("y")
    (tmp_path / "c.txt").write_text("z")
    assert "c.txt: a caption without an image" in fault(tmp_path)


def test_link_out_of_the_folder(folder, tmp_path_factory):
    outside = save(tmp_path_factory.mktemp("outside") / "c.png")
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(outside)
    assert "file 'a.png' lies outside the folder" in fault(folder)
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to("a.png")
    assert "a.png" in fault(folder)


@pytest.mark.parametrize("run", ["runs/lora", "."])
def test_run_folders_in_the_folder_are_left_out(folder, run):
    before = load_source(str(folder), "train", 16, need_captions=False)
    MetricsLog(folder / run).log_image(1, "samples", np.zeros((20, 20, 3), "uint8"))
    with pytest.warns(UserWarning, match="images that training runs wrote into it are left out") as told:
        after = load_source(str(folder), "train", 16, need_captions=False)
    assert len(told) == 1 and "samples/step-000001.png" in str(told[0].message)
    assert len(after) == 2 and after.fingerprint() == before.fingerprint()


def test_run_folders_beside_a_training_split_are_not_told(folder):
    save(folder / "train" / "c.png")
    MetricsLog(folder / "runs" / "lora").log_image(1, "samples", np.zeros((20, 20, 3), "uint8"))
    with pytest.warns(UserWarning, match="in 2 places, the first is 'a.png'"):
        load_source(str(folder), "train", 16, need_captions=False)


def test_names_that_are_no_utf8(folder):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(folder / "a.png", folder / name)
    metadata(folder, {"file_name": name, "text": "a"}, {"file_name": "deep/b.jpg", "text": "b"})
    source = load_source(str(folder), "train", 16)
    assert len(source) == 2 and source[1]["image"].any() and source.fingerprint()


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png", "text": "a", "size": ' + "9" * 5000 + "}",
        '{"file_name": "a.png", "text": "a", "size": ' + "[" * 100_000 + "}",
        r'{"file_name": "\ud800.png", "text": "a"}',
        r'{"file_name": "a.png", "text": "a \udce9"}',
    ],
)
def test_lines_of_metadata_that_python_cannot_hold(folder, line):
    metadata(folder, {"file_name": "deep/b.jpg", "text": "b"}, line)
    assert "metadata.jsonl, line 2: not valid" in fault(folder)


def test_linked_folders(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to("deep")
    (folder / "loop").symlink_to(".")
    (folder / "self").symlink_to("self")
    assert len(load_source(str(folder), "train", 16, need_captions=False)) == 2
    save(outside / "below" / "c.png")
    assert "sub-folder 'linked' is a link, which is not followed" in fault(folder)
    (folder / "linked").unlink()
    save(folder / ".hidden" / "c.png")
    (folder / "linked").symlink_to(".hidden")
    assert "sub-folder 'linked' is a link, which is not followed" in fault(folder)


def test_truncated_images(folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), "uint8"))
    for name in ("a.png", "deep/b.jpg", "c.webp", "c.bmp"):
        path = folder / name
        noise.save(path)
        whole = path.read_bytes()
        for kept in (len(whole) // 3, len(whole) - 100):
            path.write_bytes(whole[:kept])
            assert f"{path.name}: truncated or damaged" in fault(folder, need_captions=False), (name, kept)
        path.write_bytes(whole)
        assert load_source(str(folder), "train", 16, need_captions=False)
        with pytest.raises(UserError, match="truncated or damaged"):
            path.write_bytes(whole[: len(whole) // 3])
            read_square(path, 16)
        path.write_bytes(whole)


def test_pixels_that_cannot_be_decoded_are_told_by_name(folder):
    whole = png(32, 32, b"\x09" + bytes(97) * 32)  # a filter that there is none of, under a right checksum
    (folder / "a.png").write_bytes(whole)
    assert "a.png: truncated or damaged image; replace the file" in fault(folder)


def test_pixels_that_end_early_are_found_before_a_run(folder, tmp_path_factory):
    """Cut in the middle, with what only the end of a whole file has: its last marker or its last chunks."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), "uint8"))
    thumbnail = io.BytesIO()
    noise.resize((160, 120)).save(thumbnail, "JPEG", quality=95)
    photo = folder / "deep" / "b.jpg"
    noise.save(photo, quality=95, exif=b"Exif\0\0" + thumbnail.getvalue())
    whole = photo.read_bytes()
    photo.write_bytes(whole[:70_000])
    assert b"\xff\xd9" in whole[70_000 - 65_536 : 70_000]  # the thumbnail's
    (folder / "a.png").write_bytes(png(32, 32, bytes(97 * 32), kept=9))
    (folder / "c.webp").write_bytes(b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8))
    with pytest.raises(BadSamples, match="3 faulty examples") as told:
        load_source(str(folder), "train", 16, need_captions=False)
    assert {line.partition(":")[0] for line in told.value.faults} == {
        str(folder / name) for name in ("a.png", "deep/b.jpg", "c.webp")
    }


def test_large_truncated_jpeg(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), "uint8"))
    noise.save(tmp_path / "a.jpg", quality=95)
    whole = (tmp_path / "a.jpg").read_bytes()
    assert len(whole) > 2 * 65536
    assert load_source(str(tmp_path), "train", 16, need_captions=False)
    (tmp_path / "a.jpg").write_bytes(whole[:-1000])
    assert "a.jpg: truncated or damaged" in fault(tmp_path, need_captions=False)


def test_refused_images(folder):
    path = folder / "a.png"
    Image.new("RGB", (1, 1)).save(path)
    assert "a.png: 1 x 1 pixels, but 16 a side are needed" in fault(folder)
    Image.new("RGB", (40, 15)).save(path)
    assert "a.png: 40 x 15 pixels" in fault(folder)
    path.write_bytes(b"no image at all")
    assert "a.png: not an image" in fault(folder)
    path.write_bytes(b"")
    assert "a.png: not an image" in fault(folder)
    path.unlink()
    path.mkdir()
    assert "a.png: is a folder" in fault(folder)


@pytest.mark.parametrize("side", [11_200, 60_000])
def test_decompression_bomb(folder, side, recwarn):
    (folder / "a.png").write_bytes(png(side, side, bytes(1000)))
    assert "a.png: more than 125 million pixels" in fault(folder)
    assert not recwarn.list


def test_centre_square(tmp_path):
    pixels = np.zeros((20, 60, 3), "uint8")
    pixels[:, :20], pixels[:, 20:40] = RED, BLUE
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_square(tmp_path / "a.png", 20) == BLUE).all()
    assert read_square(tmp_path / "a.png", 64).shape == (64, 64, 3)


def test_modes_become_rgb_on_white(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(path)
    assert (read_square(path, 20) == 255).all()
    Image.new("LA", (20, 20), (0, 255)).save(path)
    assert (read_square(path, 20) == 0).all()
    Image.new("P", (20, 20), 0).save(path, transparency=0)
    assert (read_square(path, 20) == 255).all()
    Image.fromarray(np.full((20, 20), 0x8000, "uint16")).save(path)
    assert (read_square(path, 20) == 128).all()
    Image.new("1", (20, 20), 1).save(path)
    assert (read_square(path, 20) == 255).all()
    Image.new("CMYK", (20, 20), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert (read_square(tmp_path / "a.jpg", 20) == 255).all()


def test_orientation_of_cameras(tmp_path):
    pixels = np.zeros((20, 20, 3), "uint8")
    pixels[:10] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_square(tmp_path / "a.png", 20)
    assert (upright[10:] == 255).all() and (upright[:10] == 0).all()


LEFT_OUT = ("a.jp2", "b.JP2", "c.j2k", "d.jxl", "e.tga", "f.psd", "g.cr2", "h.ico", "deep/i.jp2", "j.mp4")


def test_files_that_are_left_out_are_counted_and_named(folder, recwarn):
    for name in LEFT_OUT:
        (folder / name).write_bytes(b"what is not read here")
    for name in (
        ".hidden.jp2",
        "notes.txt",
        "a.caption",
        "b.captions",
        "c.json",
        "d.csv",
        "LICENSE",
        "Thumbs.db",
    ):
        (folder / name).write_bytes(b"what is no image")
    (folder / "validation").mkdir()
    (folder / "validation" / "k.jp2").write_bytes(b"of another split")
    for _ in range(2):
        assert len(load_source(folder, "train", 16)) == 2
    (warning,) = recwarn.list
    line = str(warning.message)
    assert "left out are 10 files (3 .jp2: 'a.jp2', 'b.JP2', 'deep/i.jp2'; 1 .j2k: 'c.j2k'; " in line
    assert "5 others: .tga, .psd, .cr2, .ico, .mp4);" in line and "\n" not in line


def test_a_folder_of_files_that_are_left_out(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jp2").write_bytes(b"\0\0\0\x0cjP")
    assert "but 5 files (5 .jp2: '0.jp2', '1.jp2', '2.jp2', ...); add PNG" in fault(tmp_path)


def test_images_under_other_names_are_taken(tmp_path, recwarn):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    data = (tmp_path / "a.jpg").read_bytes()
    names = ["a.jpg", "b.jfif", "c.jpe", "d.HEIC", "e", "f.mpo"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    source = load_source(tmp_path, "train", 16, need_captions=False)
    assert [Path(example["path"]).name for example in source] == names
    assert all(abs(int(example["image"][0, 0, 0]) - 255) < 3 for example in source)
    assert not recwarn.list


def test_images_beside_the_training_folder_are_told(tmp_path, recwarn):
    save(tmp_path / "train" / "a.png")
    assert len(load_source(tmp_path, "train", 16, need_captions=False)) == 1
    assert not recwarn.list
    save(tmp_path / "b.png")
    save(tmp_path / "more" / "c.png")
    with pytest.warns(
        UserWarning, match="images elsewhere in it are left out: in 2 places, the first is 'b.png'"
    ):
        assert len(load_source(tmp_path, "train", 16, need_captions=False)) == 1


def test_images_that_share_a_caption_are_told(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a square")
    with pytest.warns(UserWarning, match="2 images share their name, apart from the suffix, .*'a.jpg'"):
        assert len(load_source(tmp_path, "train", 16)) == 3


def broken_exif(path, block=b"Exif\0\0II*\0\x08\0\0\0\xff\xff", size=(40, 30)):
    """A JPEG with this block of EXIF."""
    Image.new("RGB", size, RED).save(path, exif=block)
    return path


def test_damaged_exif_is_told_once_in_a_folder(tmp_path):
    for number in range(3):
        broken_exif(tmp_path / f"{number}.jpg")
    with pytest.warns(UserWarning) as told:
        source = load_source(tmp_path, "train", 16, need_captions=False)
        for example in source.at_size(32):
            assert example["image"].shape == (32, 32, 3)
        load_source(tmp_path, "train", 16, need_captions=False)
    (warning,) = told
    assert "are not rotated: 3, the first is '0.jpg'; rotate those" in str(warning.message)


def test_a_caption_of_a_file_that_is_left_out_is_left_out_with_it(tmp_path, recwarn):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a square")
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a")
    (tmp_path / "b.txt").write_text("a phone's image")
    assert len(FolderSource(tmp_path, 16)) == 1
    assert "b.jxl" in " ".join(str(warning.message) for warning in recwarn)


def test_a_folder_of_no_repeats_is_refused(tmp_path):
    (tmp_path / "0_cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "0_cat" / "a.png")
    with pytest.raises(UserError, match="0_cat: 0 repeats, so no image is shown; rename the folder"):
        FolderSource(tmp_path, "train", 16)


def test_captions_with_nul_characters_are_no_text(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a red heart".encode("utf-16-le"))
    with pytest.raises(UserError, match="a.txt: no text, as it has NUL characters; save it as UTF-8"):
        FolderSource(tmp_path, "train", 16)


def test_an_image_that_changes_is_told_once(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("red")
    source = FolderSource(tmp_path, 16)
    for name in "ab":
        Image.new("RGB", (20, 20), "blue").save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match="images have changed since the start, the first is 'a.png'") as told:
        source[0], source[1]
    assert len(told) == 1
