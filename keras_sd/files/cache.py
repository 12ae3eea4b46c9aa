"""The cache folder, for compiled programs and for embeddings of long lists of phrases."""

import os
from pathlib import Path

VARIABLE = "KERAS_SD_CACHE"
"""The environment variable that names the folder. An empty value turns the cache off, and so does "off"."""

_OFF = ("", "0", "off", "no", "none", "false")


def cache_root():
    """Return the cache folder of this package, or None if the cache is off."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "keras_sd")
    root = os.environ.get(VARIABLE, str(default))
    return None if root.lower() in _OFF else Path(root).expanduser()
