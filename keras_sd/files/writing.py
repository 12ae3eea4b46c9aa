"""Atomic writing: each file is written under a temporary name and renamed once it is on disk.

A full disk, a kill or an exception leaves the previous file unchanged.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path

from keras_sd.arguments import checked_path
from keras_sd.errors import FULL_DISK, UserError

_ENDING = ".partial"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}" + re.escape(_ENDING))
_ABANDONED_SECONDS = 24 * 60 * 60
_tidied = set()  # folders in which this process has looked for abandoned files


@contextlib.contextmanager
def replaced(path):
    """Yield a temporary path beside a file; at the end, what was written there replaces the file.

    Args:
        path: the file. Its folder is created if necessary. A symbolic link is kept and its target replaced;
            the permissions of an existing file are kept.

    Raises:
        UserError: the file cannot be written. After any exception the file is unchanged.
    """
    place = Path(os.path.realpath(checked_path("path", path)))
    check_replaceable(place)
    staging = _temporary(place.parent)
    try:
        with write_errors_in_one_line(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            # Some libraries create files with other permissions.
            mode = (place if place.exists() else staging).stat().st_mode
            yield staging
            os.chmod(staging, mode & 0o7777)
            sync(staging)
            os.replace(staging, place)
            sync(place.parent)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path, last=None):
    """Yield an empty temporary folder; at the end, its files are moved into the folder `path`.

    A new folder appears in one rename. In an existing folder, files of the same names are replaced one after
    the other, and other files stay.

    Args:
        path: the folder.
        last: the name of the file to replace last, such as an index.

    Raises:
        UserError: it cannot be written. After any exception before the first file is moved, the folder is
            unchanged.
    """
    place = Path(os.path.realpath(checked_path("path", path)))
    is_new = not place.exists()
    staging = _temporary(place.parent if is_new else place)
    try:
        with write_errors_in_one_line(path):
            staging.mkdir(parents=True)
            yield staging
            paths = sorted(staging.rglob("*"), key=lambda one: (one.name == last, one))
            for one in (*paths, staging):
                sync(one)
            if is_new:
                os.rename(staging, place)
                sync(place.parent)
                return
            files = {file: place / file.relative_to(staging) for file in paths if file.is_file()}
            for target in files.values():
                check_replaceable(target)
            for file, target in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path, text):
    """Write a text file in UTF-8 atomically."""
    with replaced(path) as staging:
        staging.write_bytes(utf8(text))


def utf8(text):
    """Encode a text as UTF-8. Surrogates from file names that are not UTF-8 are escaped, as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path, values, indent=2):
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def check_replaceable(path):
    """Raise a UserError if a path exists and is no regular file: a rename would replace a device's node."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # there is none, or writing it fails with a message of its own
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: not a plain file (a device, a pipe or a socket); choose another place")


@contextlib.contextmanager
def write_errors_in_one_line(path):
    """Turn the operating system's errors into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {write_fault(error)}") from error
    except UserError as error:
        # The message names a file in a temporary folder, which means nothing to the user.
        if isinstance(error.__cause__, OSError) and _ENDING in str(error):
            raise UserError(f"{path}: {write_fault(error.__cause__)}") from error.__cause__
        raise


def write_fault(error):
    """Return the fault and the remedy for an `OSError` while a file was written."""
    remedy = "free some space or choose another place" if error.errno in FULL_DISK else "choose another place"
    return f"cannot be written ({error.strerror}); {remedy}"


def sync(path):
    """Sync a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _temporary(folder):
    """Return a hidden, short temporary name that no other process or thread uses."""
    if folder not in _tidied:
        _tidied.add(folder)
        _remove_abandoned(folder)
    return folder / f".{secrets.token_hex(8)}{_ENDING}"


def _remove_abandoned(folder):
    """Remove temporary files of processes that were killed; those of a model take gigabytes."""
    with contextlib.suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name)]:
            latest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
            if time.time() - latest < _ABANDONED_SECONDS:
                continue  # another process may still be writing it
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
