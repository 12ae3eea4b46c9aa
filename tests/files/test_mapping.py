"""Files mapped into memory: where arrays come from, and memory that is given back."""

import os
from pathlib import Path

import numpy as np

from keras_sd.files.mapping import map_file, origin_of, release


def test_a_view_knows_its_place(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.arange(1000, dtype="float32").tobytes())
    array = map_file(path)[400:].view("float32").reshape(30, 30)
    assert array[0, 0] == 100 and not array.flags.writeable
    first, later = origin_of(array), origin_of(array.T[1:, 2:])
    assert first.file == later.file and (first.offset, later.offset) == (400, 400 + 4 * 61)
    assert origin_of(array.copy()) is None and origin_of(np.zeros(3)) is None


def test_a_changed_file_is_another_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    before = origin_of(map_file(path))
    assert origin_of(map_file(path)) == before
    times = path.stat()
    path.write_bytes(b"1" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy with its times, of the same size
    assert origin_of(map_file(path)) != before


def test_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").shape == (0,)


def test_memory_is_given_back(tmp_path):
    path = tmp_path / "file"
    np.ones(1_000_005, "float32").tofile(path)
    data = map_file(path).view("float32")
    first, second = data[:1_000_000], data[1_000_000:]
    for view in (first, first.reshape(1000, 1000).T, first[::-1]):  # kernels are released transposed
        assert first.sum() == 1e6
        before = mapped_bytes(path)
        release(view)
        assert before > 3_900_000 and mapped_bytes(path) < 100_000
    assert first.sum() == 1e6 and second.sum() == 5  # read again
    release(np.ones(3))  # memory of its own is left alone


def mapped_bytes(path):
    """Bytes of a file's map that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))
