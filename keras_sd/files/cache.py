"""The cache folder: compiled programs, converted weights, and what else another process can use again."""

import contextlib
import functools
import os
import stat
import tempfile
import time
import warnings
from pathlib import Path

VARIABLE = "KERAS_SD_CACHE"
"""The environment variable that names the folder. An empty value turns the cache off, and so does "off"."""

PARTIAL = ".partial"
"""The ending of a file that is not yet whole."""

_LEFT_SECONDS = 86400.0
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
    not used.
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
        except OSError:
            return None
    return folder


def is_own(status: os.stat_result) -> bool:
    """Return whether a file of this status belongs to the user of this process."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files that were used longest ago until the others take no more than `limit` bytes.

    Files ending in `.partial`, which a process that was killed has left, are removed after a day.
    """
    entries = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at the same time
            status = entry.stat(follow_symlinks=False)
            is_left = entry.name.endswith(PARTIAL) and status.st_mtime < time.time() - _LEFT_SECONDS
            entries.append((0 if is_left else status.st_mtime, status.st_size, entry.path))
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
