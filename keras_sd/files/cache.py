"""Where things are kept that can be made again: compiled programs, and vectors of long lists of phrases."""

import os
from pathlib import Path

VARIABLE = "KERAS_SD_CACHE"
"""The environment variable that names the folder; empty, nothing is kept."""


def cache_root():
    """Return the folder for everything that this package keeps, or None where it keeps nothing."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "keras_sd")
    root = os.environ.get(VARIABLE, str(default))
    return Path(root).expanduser() if root else None
