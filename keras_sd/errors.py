"""The exception for input that a person can mend, and the command line's way of telling it."""

import contextlib
import errno
import os

BACKENDS = ("tensorflow", "jax")


class UserError(ValueError):
    """Bad input, told in one line: the thing, the fault and the remedy.

    The command line prints the line and leaves with exit code 2.
    """


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
    """The line for an `OSError`: the place, the fault and the remedy.

    Args:
        path: the place, where the error does not tell it.
    """
    place = error.filename if error.filename is not None else path
    where = "" if place is None else f"{os.fsdecode(place) if isinstance(place, bytes) else place}: "
    return f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno, 'check the place')}"


@contextlib.contextmanager
def os_errors_in_one_line(path):
    """Turns the operating system's errors about a place, of reading and of looking, into a `UserError`.

    The command line tells such errors in one line as it is; this is for those who call the library.

    Args:
        path: the place, where an error does not tell it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(os_fault(error, path)) from error
