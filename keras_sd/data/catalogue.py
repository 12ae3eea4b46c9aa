"""Remembers what checking image files found, so that the next start of a data set opens none of them.

An entry holds a file's absolute path, size and modification time, its upright height and width, whether its
EXIF block is sound, and the SHA-256 of its bytes. It counts only while size and time are the same. The
entries are in one SQLite file in the cache folder. It is never needed: a damaged one is rebuilt with a
message, and without a cache folder (`KERAS_SD_CACHE` empty) or with one that cannot be written, files are
opened each time. Faults are not remembered.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import sqlite3
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from keras_sd.data.images import Examined, StoredImage, examine_image
from keras_sd.errors import UserError
from keras_sd.files.cache import private_folder
from keras_sd.progress import Progress

OnFault = Callable[[Any, UserError], None]

FILE = "images.sqlite"
"""The name of the catalogue in the cache folder."""

# What passes today may be refused by other rules, or by a Pillow that was built without a format.
_RULES = f"3, Pillow {PIL.__version__}"
# A file that was written this recently may be written again without a change of its time.
_SETTLED_NS = 2_000_000_000
_WINDOW = 1024  # files that threads take at once, and that a kill loses at most
_LOCK_SECONDS = 10.0
_TABLE = (
    "CREATE TABLE IF NOT EXISTS images "
    "(path BLOB PRIMARY KEY, size INTEGER, modified INTEGER, examined BLOB, sha256 BLOB) WITHOUT ROWID"
)
_SELECT = "SELECT path, size, modified, examined, sha256 FROM images WHERE path >= ? AND path < ?"
_SAME = "size = excluded.size AND modified = excluded.modified"
_INSERT = f"""
    INSERT INTO images VALUES (?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET
    examined = CASE WHEN {_SAME} THEN COALESCE(excluded.examined, examined) ELSE excluded.examined END,
    sha256 = CASE WHEN {_SAME} THEN COALESCE(excluded.sha256, sha256) ELSE excluded.sha256 END,
    size = excluded.size, modified = excluded.modified
"""
_DELETE = "DELETE FROM images WHERE path = ?"
# SQLite's codes of a file that can be made anew. Others are of the place: locked, full, not writable.
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA)


def examine_images(paths: Sequence[Path], on_fault: OnFault | None = None) -> list[Examined | None]:
    """Check image files in threads, as `examine_image` does; those that are remembered are not opened.

    Args:
        on_fault: called with the path and the UserError of each file that cannot be used, in order; its
            result is None. By default the first error is raised.

    Raises:
        UserError: as `examine_image`.
    """
    found = _remembered(_of_paths(paths), "examined", lambda index: examine_image(paths[index]))
    return _sound(found, lambda index: paths[index], on_fault)


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's bytes, in hexadecimal; those that are remembered are not read.

    Raises:
        UserError: a file cannot be read.
    """

    def find(index: int) -> bytes:
        path = paths[index]
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); put it back, or make it readable"
            ) from error

    return [found.hex() for found in _sound(_remembered(_of_paths(paths), "sha256", find), paths.__getitem__)]


def examine_stored(
    name: str, count: int, read: Callable[[int], StoredImage], on_fault: OnFault | None = None
) -> list[Examined | None]:
    """Check images that are stored in another file, as `examine_images` does.

    Args:
        name: what names the other file and its content; nothing is remembered under an empty name.
        count: number of images.
        read: returns an image by its index.
        on_fault: called with the index and the UserError of each image that cannot be used.
    """
    found = _remembered(_of_store(name, count), "examined", lambda index: examine_image(read(index)))
    return _sound(found, int, on_fault)


def stored_hashes(name: str, count: int, read: Callable[[int], StoredImage]) -> list[str]:
    """Return the SHA-256 of each image's bytes; the arguments are those of `examine_stored`."""
    found = _remembered(
        _of_store(name, count), "sha256", lambda index: hashlib.sha256(read(index).content).digest()
    )
    return [one.hex() for one in _sound(found, int)]


def _sound(found: list[Any], place: Callable[[int], Any], on_fault: OnFault | None = None) -> list[Any]:
    """Return results with None in place of errors, which are reported or raised."""
    for index, result in enumerate(found):
        if isinstance(result, UserError):
            if on_fault is None:
                raise result
            on_fault(place(index), result)
    return [None if isinstance(result, UserError) else result for result in found]


class _Key(NamedTuple):
    """What names an image, and the size and the time of change of its file; None if it is not there."""

    name: bytes
    state: tuple[int, int] | None


def _of_paths(paths: Sequence[Path]) -> list[_Key]:
    return [_Key(os.fsencode(os.path.abspath(path)), _state(path)) for path in paths]


def _of_store(name: str, count: int) -> list[_Key]:
    return [_Key(f"{name}/{index:09d}".encode(), (0, 0) if name else None) for index in range(count)]


def _as_examined(content: bytes) -> Examined | None:
    rules, *values = content.decode().split("\n")
    return Examined(int(values[0]), int(values[1]), values[2] == "True") if rules == _RULES else None


def _remembered(keys: list[_Key], column: str, find: Callable[[int], Any]) -> list[Any]:
    """Return `find(index)`, or its UserError, for each key, from the catalogue where it is there.

    What is found is remembered.
    """
    restore = _as_examined if column == "examined" else bytes
    known = _read([key.name for key in keys], column)
    results: list[Any] = []
    for name, state in keys:
        content = known.get(name, {}).get(state) if state else None
        results.append(None if content is None else restore(content))
    missing = [index for index, result in enumerate(results) if result is None]
    if not missing:
        return results
    others = known.keys() - {key.name for key in keys}
    del known

    def find_or_fault(index: int) -> Any:
        try:
            return find(index)
        except UserError as error:
            return error

    threads = min(8, 2 * (os.cpu_count() or 1), len(missing))
    description = "checking images" if column == "examined" else "hashing images"
    bar = Progress(description, len(missing), "images", delay=2.0)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, bar:
        for start in range(0, len(missing), _WINDOW):
            window = missing[start : start + _WINDOW]
            for index, result in zip(window, pool.map(find_or_fault, window), strict=True):
                results[index] = result
                bar.update(1)
            _write(column, [(*keys[index], results[index]) for index in window])
    _forget([name for name in others if not os.path.lexists(name)])
    return results


def _state(path: Path) -> tuple[int, int] | None:
    """Return a file's size and modification time; None if it is not there, which reading it reports."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _sealed(key: bytes, state: tuple[int, int], content: bytes) -> bytes:
    """Return a content with a checksum in front, as a bit that flips on a disk would not be noticed."""
    return zlib.crc32(repr((key, state, content)).encode()).to_bytes(4, "big") + content


def _read(keys: list[bytes], column: str) -> dict[bytes, dict[tuple[int, int], bytes]]:
    """Return what a column has of files below the folder of these paths: path -> (size, time) -> content."""
    first, behind = b"", b"\xff"
    if keys and os.sep == "/":
        folder = os.path.commonpath([os.path.dirname(key) for key in (min(keys), max(keys))])
        if folder.strip(b"/"):
            first, behind = folder + b"/", folder + b"0"  # "0" follows "/"
    known: dict[bytes, dict[tuple[int, int], bytes]] = {}

    def read(connection: sqlite3.Connection) -> None:
        known.clear()
        for path, size, modified, *contents in connection.execute(_SELECT, (first, behind)):
            sealed = contents[column == "sha256"]
            known[path] = {}
            if sealed is not None and sealed == _sealed(path, (size, modified), sealed[4:]):
                known[path][size, modified] = sealed[4:]

    if keys:
        _with_catalogue(read)
    return known


def _write(column: str, found: Iterable[tuple[bytes, tuple[int, int] | None, Any]]) -> None:
    latest = time.time_ns() - _SETTLED_NS
    rows = []
    for key, state, result in found:
        if state is None or state[1] > latest or isinstance(result, UserError):
            continue
        if column == "sha256":
            rows.append((key, *state, None, _sealed(key, state, result)))
        else:
            content = "\n".join(map(str, (_RULES, *result))).encode()
            rows.append((key, *state, _sealed(key, state, content), None))
    if rows:
        _with_catalogue(lambda connection: connection.executemany(_INSERT, rows))


def _forget(keys: list[bytes]) -> None:
    if keys:
        _with_catalogue(lambda connection: connection.executemany(_DELETE, [(key,) for key in keys]))


def _remove_unless_file(path: Path) -> None:
    """Remove a link or a pipe, which SQLite would write through or wait for."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


def _with_catalogue(action: Callable[[sqlite3.Connection], object]) -> None:
    """Call `action(connection)` in one transaction; do nothing where there is no catalogue to use."""
    folder = private_folder("images")
    if folder is None:
        return
    file = folder / FILE
    for is_second in (False, True):
        try:
            _remove_unless_file(file)
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            with contextlib.closing(sqlite3.connect(file, timeout=_LOCK_SECONDS)) as connection, connection:
                connection.execute(_TABLE)
                action(connection)
            return
        except OSError:
            return
        except (sqlite3.Error, TypeError, ValueError) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if is_second or code not in _DAMAGED:
                return
            warnings.warn(f"{file}: damaged ({error}), and made anew; images are checked again", stacklevel=2)
            for path in (file, file.with_name(f"{FILE}-journal")):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
