"""The cache folder: compiled programs, converted weights, and what else another process can use again."""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
import warnings
from pathlib import Path
from typing import BinaryIO

VARIABLE = "KERAS_SD_CACHE"
"""The environment variable that names the folder. An empty value turns the cache off, and so does "off"."""

PARTIAL = ".partial"
"""The ending of a file that is not yet whole."""

_LEFT_SECONDS = 86400.0
# TensorFlow ends in an error where it cannot write into a cache that it was given.
_LEAST_BYTES = 2**28
# Of files that are not yet whole: ours, and TensorFlow's compiled programs.
_UNFINISHED = (PARTIAL, ".tmp")
_OFF = ("", "0", "off", "no", "none", "false")


def cache_root():
    """Return the cache folder of this package, or None if there is no cache.

    A folder that `KERAS_SD_CACHE` names and that cannot be used is told in one warning.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "keras_sd")
    root = os.environ.get(VARIABLE, str(default))
    if root.lower() in _OFF:
        return None
    fault = _fault_of(root)
    if fault is None:
        return Path(root).expanduser()
    if VARIABLE in os.environ:
        _warn_once(f"{VARIABLE} {root}: {fault}, so there is no cache; name another folder, or off")
    return None


def private_folder(*names: str) -> Path | None:
    """Make a folder in the cache that nobody else can write to; None if there is no cache.

    What it holds is run or trusted. So one warning tells of a folder that belongs to another user, and it is
    not used; and what others have left in one that they could write to is removed.
    """
    root = cache_root()
    if root is None:
        return None
    folder = root
    for name in names:
        folder = folder / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if not is_own(status) or not stat.S_ISDIR(status.st_mode):
                _warn_once(
                    f"{folder}: belongs to another user or is a link, so it is not used; let {VARIABLE} "
                    "name a folder of your own"
                )
                return None
            if status.st_mode & 0o077:
                folder.chmod(0o700)
                if status.st_mode & 0o022:
                    _remove_of_others(folder)
        except OSError as error:
            _warn_once(f"{folder}: {error.strerror}, so it is not used; remove it, or change its permissions")
            return None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            _warn_once(f"{folder}: no permission, so it is not used; remove it, or change its permissions")
            return None
    return folder


def _remove_of_others(folder):
    for entry in os.scandir(folder):
        if is_own(entry.stat(follow_symlinks=False)):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def open_entry(path: Path) -> BinaryIO:
    """Open a file of the cache to be read.

    Raises:
        OSError: there is none, it is no file (a pipe would be waited for), or it belongs to another user.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not is_own(status):
            raise PermissionError(f"{path}: is no file of one's own")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_own(status: os.stat_result) -> bool:
    """Return whether a file of this status belongs to the user of this process."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files that were used longest ago until the others take no more than `limit` bytes.

    Unfinished files, which a process that was killed has left, are removed after a day; pipes and links at
    once, as who reads one would wait or be led elsewhere.
    """
    entries = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at the same time
            status = entry.stat(follow_symlinks=False)
            is_left = entry.name.endswith(_UNFINISHED) and status.st_mtime < time.time() - _LEFT_SECONDS
            is_odd = not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode)
            entries.append((0 if is_left or is_odd else status.st_mtime, status.st_size, entry.path))
    size = sum(entry[1] for entry in entries)
    for used, length, path in sorted(entries):
        if used and size <= limit:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        size -= length


@functools.cache
def _fault_of(root):
    """Make the folder; return why nothing can be written into it, or None."""
    try:
        folder = Path(root).expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a file system may be read-only
        free = shutil.disk_usage(folder).free
        if free < _LEAST_BYTES:
            return f"has {free / 2**20:.0f} MiB left, and needs {_LEAST_BYTES / 2**20:.0f}"
    except FileExistsError:
        return "is no folder"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    except RuntimeError:
        return "there is no such home"
    return None


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)
