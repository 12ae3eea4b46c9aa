"""Entries of the cache folder: files whose contents are checked when they are read."""

import hashlib
import os
import secrets

from keras_sd.files.cache import PARTIAL, open_entry, remove_oldest

CACHE_BYTES = 2**29  # the UNet of Stable Diffusion takes 0.3 MB
_SHA256_BYTES = 32


def read_entry(entry):
    """Return the content of an entry; None if there is none, or a damaged one."""
    try:
        with open_entry(entry) as file:
            digest, content = file.read(_SHA256_BYTES), file.read()
        os.utime(entry)  # pruning goes by the time of the last use
    except OSError:
        return None
    return content if hashlib.sha256(content).digest() == digest else None


def write_entry(entry, content, limit=CACHE_BYTES):
    """Write an entry, and remove those that were used longest ago where all take more than `limit` bytes."""
    staging = entry.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        with open(staging, "xb", opener=_for_owner) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(staging, entry)
        remove_oldest(entry.parent, limit)
    except OSError:
        staging.unlink(missing_ok=True)


def _for_owner(path, flags):
    return os.open(path, flags, 0o600)
