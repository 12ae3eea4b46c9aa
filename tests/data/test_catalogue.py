"""What checking image files found is remembered, and never needed."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.catalogue import FILE, content_hashes, examine_images
from keras_sd.data.folders import FolderSource
from keras_sd.errors import UserError

HOUR = 3600 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KERAS_SD_CACHE", str(folder))
    return folder


def age(path, nanoseconds=HOUR):
    """Set a file's time to the past, as files that are being written are not remembered."""
    then = time.time_ns() // HOUR * HOUR - nanoseconds
    os.utime(path, ns=(then, then))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(40, 30), (30, 50), (64, 20)]):
        path = folder / f"{number}.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1  # the last one lies on its side
        Image.new("RGB", size, (number * 80, 0, 0)).save(path, exif=exif)
        age(path)
    return folder


def paths(folder):
    return sorted(folder.glob("*.jpg"))


def spoil(path):
    """Replace the bytes of a file, with the same size and time, which only reading it can notice."""
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_second_start_opens_no_image(images, cache):
    first = FolderSource(images, 16, need_captions=False)
    keys = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths(images)]
    assert first.content_keys() == keys
    assert first.sizes().tolist() == [[30, 40], [50, 30], [64, 20]]  # the last one upright
    for path in paths(images):
        spoil(path)
    second = FolderSource(images, 16, need_captions=False)
    assert second.content_keys() == keys and (second.sizes() == first.sizes()).all()
    assert second.fingerprint() == first.fingerprint()
    assert [path.name for path in (cache / "images").iterdir()] == [FILE]
    assert cache.stat().st_mode & 0o777 == 0o700 and (cache / "images" / FILE).stat().st_mode & 0o777 == 0o600


def test_checks_and_hashes_are_remembered_apart(images):
    keys = content_hashes(paths(images))
    assert examine_images(paths(images))[0].width == 40
    for path in paths(images):
        spoil(path)
    assert content_hashes(paths(images)) == keys and examine_images(paths(images))[0].width == 40


def test_a_change_is_noticed(images):
    keys = content_hashes(paths(images))
    first = paths(images)[0]
    spoil(first)
    age(first, 2 * HOUR)
    assert content_hashes(paths(images))[0] != keys[0] and content_hashes(paths(images))[1:] == keys[1:]
    with pytest.raises(UserError, match=r"0.jpg: not an image"):
        FolderSource(images, 16, need_captions=False)


def test_a_file_that_was_just_written_is_not_remembered(images):
    first = paths(images)[0]
    os.utime(first)
    examine_images([first])
    spoil(first)
    with pytest.raises(UserError, match="not an image"):
        examine_images([first])


def test_no_cache_folder(images, cache, monkeypatch):
    monkeypatch.setenv("KERAS_SD_CACHE", "")
    examine_images(paths(images))
    spoil(paths(images)[0])
    with pytest.raises(UserError, match="not an image"):
        examine_images(paths(images))
    monkeypatch.setenv("KERAS_SD_CACHE", str(images / "0.jpg"))  # a file: nothing can be kept there
    assert len(examine_images(paths(images)[1:])) == 2
    assert not cache.exists()


@pytest.mark.parametrize("fault", ["no database", "cut short", "another table", "a flipped bit"])
def test_a_damaged_catalogue_is_made_anew(images, cache, fault, recwarn):
    expected = examine_images(paths(images))
    file = cache / "images" / FILE
    if fault == "no database":
        file.write_bytes(b"no database at all" * 100)
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:3000])
    elif fault == "another table":
        file.unlink()
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE images (other)")
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE images SET examined = CAST(replace(examined, '40', '41') AS BLOB)")
    assert examine_images(paths(images)) == expected
    spoil(paths(images)[0])
    assert examine_images(paths(images)) == expected  # remembered again
    told = [str(warning.message) for warning in recwarn.list]
    assert all("damaged" in line and "made anew" in line for line in told)
    assert len(told) == (0 if fault == "a flipped bit" else 1)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_replaced_by_the_catalogue(images, cache, kind, tmp_path):
    """SQLite would write through a link, and wait for a pipe."""
    expected = examine_images(paths(images))
    file, other = cache / "images" / FILE, tmp_path / "other"
    other.write_bytes(b"")
    file.unlink()
    if kind == "link":
        file.symlink_to(other)
    else:
        os.mkfifo(file)
    assert examine_images(paths(images)) == expected and not other.read_bytes()
    spoil(paths(images)[0])
    assert file.is_file() and not file.is_symlink() and examine_images(paths(images)) == expected


def test_files_that_are_gone_are_forgotten(images, cache):
    examine_images(paths(images))
    paths(images)[0].unlink()
    age(paths(images)[0], 2 * HOUR)
    examine_images(paths(images))
    with sqlite3.connect(cache / "images" / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM images").fetchone() == (2,)


def test_two_runs_at_once_and_one_that_is_killed(images, cache):
    for number in range(3, 3000):
        os.link(images / "0.jpg", images / f"{number}.jpg")
    code = "import sys, keras_sd.data.folders as f; f.FolderSource(sys.argv[1], 16, False).content_keys()"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(images)]) for _ in range(3)]
    while not (cache / "images" / FILE).exists() and runs[0].poll() is None:
        time.sleep(0.01)
    runs[0].send_signal(signal.SIGKILL)
    assert [run.wait(60) for run in runs][1:] == [0, 0]
    files = paths(images)
    sizes = examine_images(files)
    for path in files[:3]:
        spoil(path)
    assert examine_images(files) == sizes


def test_a_second_start_is_fast(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), "uint8")).save(folder / "0.png")
    age(folder / "0.png")
    for number in range(5000):
        os.link(folder / "0.png", folder / f"{number + 1}.png")
        (folder / f"{number}.txt").write_text("a square")
    (folder / "5000.txt").write_text("a square")
    FolderSource(folder, 16)
    start = time.process_time()
    FolderSource(folder, 16)
    assert time.process_time() - start < 1  # 4 s for 20,000 where it takes 0.8 s
