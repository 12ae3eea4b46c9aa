"""The compilation cache: programs compiled by XLA are kept for the next process.

Importing this module does nothing. `keep_programs` sets the cache up before the first weight is created or
the first function is compiled.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import warnings
from pathlib import Path

import keras

from keras_sd.backend import compat
from keras_sd.files.cache import private_folder, remove_oldest

_CACHE_BYTES = 4 * 2**30
_FLAG = "--tf_xla_persistent_cache_directory="


def cache_folder():
    """Make and return the folder of compiled programs, or None if there is no cache.

    Machine code is valid for one processor and one version of the backend only, so both are in the name.
    """
    name, processor = keras.backend.backend(), processor_lines()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a nightly build
        return None
    if not processor:
        return None
    digest = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:16]
    return private_folder("xla", f"{name}-{version}-{digest}")


@functools.cache
def processor_lines():
    """Return Linux's lines that name the processor and what it can do, sorted; none on another system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def forget_programs():
    """Neither read nor write compiled programs from now on.

    XLA for a processor ends the process with a segmentation fault when it runs a kept program that gathers
    shards of weights from several virtual devices (JAX 0.10).
    """
    import jax

    keep_programs()  # which would turn it on later
    jax.config.update("jax_enable_compilation_cache", False)


@functools.cache
def keep_programs():
    """Make XLA read and write its programs in `cache_folder`.

    A folder that the user has set for the backend is kept. TensorFlow reads its flags once, when it computes
    or lists its devices for the first time; if that has happened before, there is no cache.
    """
    folder = cache_folder()
    if folder is None:
        return
    flags = os.environ.get("TF_XLA_FLAGS")
    if keras.backend.backend() == "tensorflow" and _FLAG in (flags or ""):
        return
    with contextlib.suppress(OSError):
        remove_oldest(folder, _CACHE_BYTES)
    # A program that cannot be read or written is compiled.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        os.environ["TF_XLA_FLAGS"] = f"{flags or ''} {_FLAG}{folder}".strip()
        tf.config.list_physical_devices()  # reads the flags
        # Child processes get the unchanged environment, and set up their own cache.
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
