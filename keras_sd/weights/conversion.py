"""Published tensors in the layout and precision of Keras variables, kept for the next process.

Opening a model transposes each kernel, so it reads and writes all weights. The result is kept in the cache
folder: a later opening maps it into memory and copies nothing. An entry is named by all that it depends on:
the identity of the model's files, and of each tensor the place in its file, shape, strides, type and the
layout and type of the variable. It is written only if all values are finite, so a later opening need not
check them. Its mapping is private: training changes the process's own pages and never the file.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keras_sd import backend
from keras_sd.files.cache import PARTIAL, open_entry, private_folder, remove_oldest
from keras_sd.files.mapping import origin_of, release

SMALLEST = 64 * 2**20
"""The bytes of converted weights below which converting takes no longer than using the cache."""

THREAD = "keras_sd weights cache"
"""The name of the thread that writes an entry to disk; the process ends only after it."""

# Both precisions of Stable Diffusion 1.5, or one of SDXL; single precision of the former has 4.3 GB.
_CACHE_BYTES = 16 * 2**30
# No entry is written that would leave less of the disk than this.
_FREE_BYTES = 4 * 2**30


class Conversion(NamedTuple):
    """A published tensor with the axes of its variable, and the type of the variable."""

    array: npt.NDArray[Any]
    dtype: str


def convert(conversions: Sequence[Conversion]) -> tuple[list[npt.NDArray[Any]], list[int]]:
    """Return the arrays of variables, and the indices of those that hold NaN or infinity."""
    shapes = [conversion.array.shape for conversion in conversions]
    dtypes = [conversion.dtype for conversion in conversions]
    size = sum(map(backend.aligned_size, shapes, dtypes))
    entry = _entry_of(conversions) if size >= SMALLEST else None
    kept = _read(entry, size) if entry else None
    if kept is not None:
        return backend.aligned_arrays(kept, shapes, dtypes), []
    with _new_memory(entry, size) as memory:
        arrays = backend.aligned_arrays(memory.bytes, shapes, dtypes)
        # NumPy releases the GIL while it copies.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            finite = list(threads.map(_convert_one, conversions, arrays))
        del arrays
        memory.is_sound = all(finite)
    bad = [index for index, is_finite in enumerate(finite) if not is_finite]
    return backend.aligned_arrays(memory.bytes, shapes, dtypes), bad


def _convert_one(conversion, target):
    """Copy a tensor into the array of its variable; return whether all values are finite there."""
    backend.copy_values(conversion.array, target)
    release(conversion.array)
    return is_finite(target)


def is_finite(array: npt.NDArray[Any]) -> bool:
    """Return whether an array holds neither NaN nor infinity."""
    # A finite sum proves that all terms are finite, and needs no temporary array.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum(dtype="float32")) or np.isfinite(array).all())


def _entry_of(conversions):
    """Return the path of the cache's entry; None without a cache, or if a tensor is no view of a file."""
    origins = [origin_of(conversion.array) for conversion in conversions]
    folder = None if None in origins else private_folder("weights")
    if folder is None or not hasattr(os, "posix_fallocate"):
        return None
    parts = [
        (*origin, array.shape, array.strides, array.dtype.name, dtype)
        for origin, (array, dtype) in zip(origins, conversions, strict=True)
    ]
    return folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _ending(entry):
    """Return the bytes after the arrays, which show that the file is whole and the one of its name."""
    return bytes.fromhex(entry.name)


def _read(entry, size):
    """Return the bytes of an entry's arrays, mapped into memory, or None."""
    ending = _ending(entry)
    try:
        with open_entry(entry) as opened:
            file = opened.fileno()
            if os.fstat(file).st_size != size + len(ending) or os.pread(file, len(ending), size) != ending:
                return None
            with contextlib.suppress(OSError):  # a cache that is read-only now
                os.utime(entry)  # pruning goes by the time of the last use
            return _private(file, size)
    except OSError:
        return None


def _private(file, size):
    """Return an array of a file's bytes that can be written to without changing the file."""
    return np.frombuffer(mmap.mmap(file, size, access=mmap.ACCESS_COPY), np.uint8)


class _Memory:
    """Bytes to convert weights into.

    Attributes:
        bytes: an array of them.
        is_sound: whether the values may be kept.
    """

    def __init__(self, memory):
        self.bytes = memory
        self.is_sound = False


@contextlib.contextmanager
def _new_memory(entry: Path | None, size: int) -> Iterator[_Memory]:
    """Give memory of a new file for an entry, or memory of its own where no file can be written.

    After the block the memory is private. A thread then writes the file to disk and gives it its name, if
    its values are sound.
    """
    file, staging = _allocated(entry, size) if entry else (None, None)
    if file is None:
        yield _Memory(backend.aligned_memory(size))
        return
    memory = _Memory(np.frombuffer(mmap.mmap(file, size), np.uint8))
    try:
        yield memory
        memory.bytes = _private(file, size)
    except BaseException:
        memory.is_sound = False
        raise
    finally:
        if memory.is_sound:
            threading.Thread(target=_finish, args=(file, staging, entry), name=THREAD).start()
        else:
            os.close(file)
            staging.unlink(missing_ok=True)


def _allocated(entry, size):
    """Return a new file with space for an entry, and its path; None and None where that cannot be."""
    ending, staging = _ending(entry), entry.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        if shutil.disk_usage(entry.parent).free < size + _FREE_BYTES:
            return None, None
        file = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None, None
    try:
        # Without its space a page that does not fit on the disk would end the process.
        os.posix_fallocate(file, 0, size + len(ending))
        os.pwrite(file, ending, size)
    except OSError:
        os.close(file)
        staging.unlink(missing_ok=True)
        return None, None
    return file, staging


def _finish(file, staging, entry):
    """Write a file to disk and give it its name; then remove the entries that were used longest ago."""
    with contextlib.suppress(OSError):
        try:
            size = os.fstat(file).st_size
            os.fsync(file)
            os.replace(staging, entry)
        finally:
            os.close(file)
            staging.unlink(missing_ok=True)
        remove_oldest(entry.parent, max(_CACHE_BYTES, size))
