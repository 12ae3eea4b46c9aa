"""Programs compiled by XLA are kept for the next process.

Nothing happens when this is imported: `keep_programs` sets the cache up when the first weight is made or the
first function is compiled, whichever comes first.
"""

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

import keras

from keras_sd.backend import compat
from keras_sd.files.cache import cache_root

_CACHE_BYTES = 4 * 2**30
_FLAG = "--tf_xla_persistent_cache_directory="


def cache_folder():
    """Return the folder of compiled programs, or None where none are kept.

    Machine code fits the processor and the version that it was made for and no other: both name the folder.
    """
    root = cache_root()
    if root is None:
        return None
    name = keras.backend.backend()
    try:
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        version = importlib.metadata.version(name)
    except (OSError, importlib.metadata.PackageNotFoundError):  # another system, or a nightly build
        return None
    processor = sorted(
        {line for line in information.splitlines() if line.startswith(("flags", "Features", "model name"))}
    )
    digest = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:16]
    return root / "xla" / f"{name}-{version}-{digest}"


@functools.cache
def keep_programs():
    """Make XLA look for a program in `cache_folder` before it compiles, and put it there afterwards.

    Whoever has named a folder to the backend keeps it. TensorFlow reads its flags once, when it computes or
    lists its devices for the first time: a program that has done so before has no cache there.
    """
    folder = cache_folder()
    if folder is None:
        return
    flags = os.environ.get("TF_XLA_FLAGS")
    if keras.backend.backend() == "tensorflow" and _FLAG in (flags or ""):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_oldest(folder)
    except OSError:  # a home that cannot be written to; programs are compiled each time
        return
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        os.environ["TF_XLA_FLAGS"] = f"{flags or ''} {_FLAG}{folder}".strip()
        tf.config.list_physical_devices()  # reads the flags
        # What this process starts has an environment as it was, and sets up its own.
        if flags is None:
            del os.environ["TF_XLA_FLAGS"]
        else:
            os.environ["TF_XLA_FLAGS"] = flags
        return

    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Smaller programs compile as fast as they are read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compat.write_programs_whole(folder)


def _remove_oldest(folder):
    """Remove the programs made first until those left take no more than `_CACHE_BYTES`."""
    entries = []
    for entry in os.scandir(folder):
        status = entry.stat()
        entries.append((status.st_mtime, status.st_size, entry.path))
    size = sum(entry[1] for entry in entries)
    for _, length, path in sorted(entries):
        if size <= _CACHE_BYTES:
            break
        Path(path).unlink(missing_ok=True)  # another process may have been faster
        size -= length
