"""Files are there whole or not at all, whatever happens while they are written."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.outputs import check_output
from keras_sd.errors import UserError
from keras_sd.files.image_files import save_gif, save_png
from keras_sd.files.writing import replaced, replaced_folder, write_json
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.weights.safetensors_files import write_safetensors
from tests import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")

# Each writes a file or a folder of more than the bytes that a process of the tests may write into one file.
WRITERS = {
    "image.png": lambda path: save_png(PIXELS, path),
    "walk.gif": lambda path: save_gif(np.stack([PIXELS, PIXELS[::-1]]), path),
    "report.json": lambda path: write_json(path, {"values": list(range(5000))}),
    "lora.safetensors": lambda path: write_safetensors(path, {"weight": np.zeros(5000, "float32")}),
    "tokenizer": lambda path: Tokenizer.clip().save(path),
    "model": lambda path: tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(path),
    "model.safetensors": lambda path: tiny.pipeline().save(path),
}


def contents(folder):
    """The bytes of all files below a folder, and the names of the folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


LITTLE_SPACE = """if True:
    import resource, sys
    from pathlib import Path
    from keras_sd.errors import UserError
    from tests.files.test_writing import WRITERS
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    for folder in sys.argv[1:]:
        for name, write in WRITERS.items():
            try:
                write(Path(folder, name))
            except UserError as error:
                print(error)
"""


def test_what_was_there_outlives_a_disk_without_space(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / "earlier" / name)
    (tmp_path / "none").mkdir()
    folders = [tmp_path / name for name in ("earlier", "none")]
    before = [contents(folder) for folder in folders]
    command = [sys.executable, "-c", LITTLE_SPACE, *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [folder / name for folder in folders for name in WRITERS]
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path}") and ".partial" not in line
        assert "File too large" in line and "free some space" in line
    after = [contents(folder) for folder in folders]
    after[1].pop(tmp_path / "none" / "tokenizer", None)  # an empty folder
    assert after == before


def test_a_fault_leaves_nothing_behind(tmp_path):
    for new in ("new.txt", "folder/new.txt"):
        with pytest.raises(ZeroDivisionError), replaced(tmp_path / new) as staging:
            staging.write_text("half")
            raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "model") as staging:
        (staging / "unet").mkdir()
        (staging / "unet" / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "model").exists()


def test_what_killed_processes_have_left_is_removed_after_a_day(tmp_path):
    names = [f".{digit * 16}.partial" for digit in "0123"] + [".notes.partial"]
    for name in (names[0], names[1], names[4]):
        (tmp_path / name).write_text("half")
    for name in (names[2], names[3]):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_text("half")
    old = time.time() - 2 * 24 * 60 * 60
    for path in [path for path in tmp_path.rglob("*") if names[1] not in str(path)]:
        os.utime(path, (old, old))
    (tmp_path / names[3] / "unet" / "model.safetensors").write_text("still being written")
    write_json(tmp_path / "file.json", {})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file.json", names[1], names[3], names[4]}


def test_paths_that_are_no_utf8_are_read_back(tmp_path):
    values = {"a\\\udce9": os.fsdecode(b"caf\xe9"), "other": "café"}
    write_json(tmp_path / "file.json", values)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == values and "café" in text


def test_links_and_permissions_stay(tmp_path):
    (tmp_path / "file.json").write_text("old")
    (tmp_path / "file.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("file.json")
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "link.json", {})
        write_safetensors(tmp_path / "new.safetensors", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").read_text() == "{}\n"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file.json": 0o640, "link.json": 0o640, "new.safetensors": 0o644}


def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    save_png(PIXELS, path)
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS)
    with pytest.raises(UserError, match="File name too long"):
        save_png(PIXELS, path.with_name("x" + path.name))


def test_other_files_of_a_folder_stay(tmp_path):
    (tmp_path / "unet").mkdir()
    for name in ("README.md", "unet/config.json", "index.json"):
        (tmp_path / name).write_text("old")
    with replaced_folder(tmp_path, last="index.json") as staging:
        (staging / "unet").mkdir()
        for name in ("unet/config.json", "unet/weights", "index.json"):
            (staging / name).write_text("new")
        assert Path(tmp_path, "index.json").read_text() == "old"
    texts = {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert texts.pop("README.md") == "old" and set(texts.values()) == {"new"} and len(texts) == 3


def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    pipes = [tmp_path / "a.png", folder / "config.json"]
    for pipe in pipes:
        os.mkfifo(pipe)
    (tmp_path / "link.png").symlink_to("a.png")
    for path in (tmp_path / "a.png", tmp_path / "link.png"):
        with pytest.raises(UserError, match="a.png: not a plain file"):
            save_png(PIXELS, path)
        with pytest.raises(UserError, match="a.png: not a plain file"):
            check_output(path, ".png", overwrite=True)
    with pytest.raises(UserError, match="config.json: not a plain file"), replaced_folder(folder) as staging:
        for name in ("aaa", "config.json"):
            (staging / name).write_text("new")
    assert all(pipe.is_fifo() for pipe in pipes) and os.listdir(folder) == ["config.json"]
