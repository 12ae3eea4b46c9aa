"""Files that are mapped into memory: arrays whose bytes stay on disk until they are used."""

import mmap
import os
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Identity = tuple[int, ...]
"""What changes with a file's content: device, inode, size, times of modification and of change (ns)."""

_identities: "weakref.WeakKeyDictionary[mmap.mmap, Identity]" = weakref.WeakKeyDictionary()


class Origin(NamedTuple):
    """Where the bytes of an array come from: a file, and the place of the first element in it."""

    file: Identity
    offset: int


def map_file(path: str | Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file as a read-only array; an empty file has an array of its own.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not status.st_size:
            return np.zeros(0, np.uint8)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _identities[mapped] = identity_of(status)
    return np.frombuffer(mapped, np.uint8)


def identity_of(status: os.stat_result) -> Identity:
    """Return the identity of a file of this status."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def origin_of(array: npt.NDArray[Any]) -> Origin | None:
    """Return where an array's bytes come from; None unless it is a view of a file of `map_file`."""
    mapped = _mapped(array)
    if mapped not in _identities:
        return None
    return Origin(_identities[mapped], array.ctypes.data - _address(mapped))


def release(array: npt.NDArray[Any]) -> None:
    """Release the memory of a mapped array's pages; a later use reads them from disk again."""
    mapped = _mapped(array)
    if mapped is None or not array.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    # A transposed view has the same bytes; those between the elements of another view are read again, too.
    spans = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    start = array.ctypes.data - _address(mapped)
    begin = start + sum(span for span in spans if span < 0)
    end = start + sum(span for span in spans if span > 0) + array.itemsize
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)


def _mapped(array):
    """Return the mapping whose memory an array views, or None."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) else None


def _address(mapped):
    return np.frombuffer(mapped, np.uint8).ctypes.data
