"""The cache folder, for compiled programs and for embeddings of long lists of phrases."""

import functools
import os
import tempfile
import warnings
from pathlib import Path

VARIABLE = "KERAS_SD_CACHE"
"""The environment variable that names the folder. An empty value turns the cache off, and so does "off"."""

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
