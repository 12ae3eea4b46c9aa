"""Output files and folders of commands, checked before any long work.

A named output that exists is refused without `--overwrite`; a default name gets a number.
"""

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from keras_sd.cli.command import decorated
from keras_sd.errors import UserError
from keras_sd.files.writing import check_replaceable, write_errors_in_one_line

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")


def output_option(default, help="PNG file to write.", name="--output"):
    """Return a decorator that adds `--output` and `--overwrite`; `default` is the usual name."""
    named = click.option(name, show_default=f"{default}, with a number if it exists", help=help)
    return decorated(named, overwrite_option)


class Output(NamedTuple):
    """A checked output file.

    Attributes:
        path: the file.
        overwrite: whether it may exist.
        beside: returns the further files that are written with a path.
    """

    path: Path
    overwrite: bool
    beside: Callable[[Path], Sequence[Path]]

    def free(self):
        """Return the path to write to, with a number if another program has written `path` meanwhile."""
        free = _numbered(self.path, self.beside, self.overwrite)
        if free != self.path:
            line = f"{self.path}: was written by another program meanwhile; this goes to {free}"
            warnings.warn(line, stacklevel=2)
        return free


def check_output(
    path,
    suffix,
    *,
    default=None,
    overwrite=False,
    beside=lambda path: (),
    remedy="replace it with --overwrite",
):
    """Check that a file can be written and replaces none that shall stay. Nothing is written.

    Args:
        path: the named file, or None.
        suffix: a suffix such as ".png", or a tuple of the accepted ones.
        default: the file if `path` is None; it gets the first free number.
        overwrite: whether files may exist.
        beside: returns the further files that are written with a path.
        remedy: the remedy in the message for a file that exists.

    Returns:
        An `Output`.

    Raises:
        UserError: a file exists, has another suffix, is a folder or cannot be written.
    """
    path = _numbered(Path(default), beside, overwrite) if path is None else _named(path, suffix)
    for place in (path, *beside(path)):
        if not overwrite and os.path.lexists(place):
            raise UserError(f"{place}: exists; choose another name, or {remedy}")
        check_writable(place)
    return Output(path, overwrite, beside)


def check_output_folder(path, default, overwrite, is_own):
    """Check that a folder can be written: a named one must be empty, a default one gets a number.

    Args:
        path, default, overwrite: as in `check_output`.
        is_own: returns whether the command has written a folder; no other folder is overwritten.

    Returns:
        The `Path`.

    Raises:
        UserError: the folder is not empty, is a file or cannot be written.
    """
    if path is None:
        path = _numbered(Path(default), lambda path: (), overwrite)
    path = Path(path)
    with write_errors_in_one_line(path):
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise UserError(f"{path}: exists; choose another folder, or replace it with --overwrite")
            if not is_own(path):
                raise UserError(f"{path}: holds something else; choose another folder")
        elif path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; choose another place")
    check_writable(path / "x")
    return path


def check_writable(path):
    """Check that a file of this name can be written, by a trial in the nearest existing folder.

    Raises:
        UserError: it cannot.
    """
    place = Path(os.path.realpath(path))
    check_replaceable(place)
    with write_errors_in_one_line(path):
        folder = next(parent for parent in place.parents if os.path.lexists(parent))
        # Each name by itself: below a missing folder, a name that is too long is not noticed.
        for each in (place, *(folder / name for name in place.relative_to(folder).parts)):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(each)
        tempfile.TemporaryFile(dir=folder).close()
        if place.is_file():
            place.open("ab").close()


def _named(path, suffix):
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    kinds = " or ".join(suffixes)
    with write_errors_in_one_line(path):
        # `Path` would drop a last ".", which means a folder too.
        if Path(path).is_dir() or os.path.basename(path) in ("", ".", ".."):
            raise UserError(f"{path}: is a folder; name a {kinds} file in it")
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        bare = path.name.lower() in suffixes  # the name is only a suffix
        named = path.with_stem("image") if bare else path
        raise UserError(f"{path}: not a {kinds} file; name it {named.with_suffix(suffixes[0])}")
    return path


def _numbered(path, beside, overwrite):
    """Return the first of `image.png`, `image-1.png`, ... that does not exist, with the files beside it."""
    if overwrite:
        return path
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1)))
    return next(name for name in names if not any(map(os.path.lexists, (name, *beside(name)))))
