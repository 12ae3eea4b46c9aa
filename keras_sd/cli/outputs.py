"""Where a command writes: told before any long work, and over nothing that the caller has not given up.

An output that is named and there already is refused without `--overwrite`; a default name gets a number.
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

from keras_sd.errors import UserError
from keras_sd.files.writing import write_fault

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there already.")


def output_option(default, help="PNG file to write.", name="--output"):
    """The options `--output` and `--overwrite` of a command that writes `default` if nothing is named."""
    named = click.option(name, show_default=f"{default}, numbered if there is one", help=help)
    return lambda command: named(overwrite_option(command))


class Output(NamedTuple):
    """A place that has been checked.

    Attributes:
        path: the file.
        overwrite: whether it may be there already.
        beside: gives the further files that are written with a path.
    """

    path: Path
    overwrite: bool
    beside: Callable[[Path], Sequence[Path]]

    def free(self):
        """The path to write to now: one with a number if another program has taken the name meanwhile."""
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
    """Makes sure that a file can be written, and over none that is to stay. Nothing is written or made.

    Args:
        path: the file that was named, or None.
        suffix: ".png", or a tuple of those that it may have.
        default: the name of a file that is taken, with the first free number, if `path` is None.
        overwrite: whether files may be there already.
        beside: the further files that are written with one.
        remedy: what else can be done about a file that is there already.

    Returns:
        An `Output`.

    Raises:
        UserError: there is one, or it has another suffix, is a folder or cannot be written.
    """
    if path is not None and not str(path).strip():
        raise UserError("--output: empty; name a file, or leave it out")
    path = _numbered(Path(default), beside, overwrite) if path is None else _named(path, suffix)
    for place in (path, *beside(path)):
        if not overwrite and _is_taken(place):
            raise UserError(f"{place}: exists; choose another name, or {remedy}")
        check_writable(place)
    return Output(path, overwrite, beside)


def check_output_folder(path, default, overwrite, is_own):
    """The same for a folder: one that is named and not empty is refused, a default one is numbered.

    Args:
        path, default, overwrite: as in `check_output`.
        is_own: whether a folder is one that the command has written; no other one is overwritten.

    Returns:
        The `Path`.
    """
    if path is None:
        path = _numbered(Path(default), lambda path: (), overwrite)
    path = Path(path)
    with _told(path):
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
    """Makes sure that a file of this name can be written, by trying it in the folder that there is.

    Raises:
        UserError: it cannot.
    """
    place = Path(os.path.realpath(path))
    with _told(path):
        folder = next(parent for parent in place.parents if os.path.lexists(parent))
        # Each name for itself, as one that is too long is not noticed below a folder that is not there yet.
        for each in (place, *(folder / name for name in place.relative_to(folder).parts)):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(each)
        tempfile.TemporaryFile(dir=folder).close()
        if place.is_file():
            place.open("ab").close()


def _named(path, suffix):
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    kinds = " or ".join(suffixes)
    with _told(path):
        # The last names a folder too, which `Path` would leave out.
        if Path(path).is_dir() or os.path.basename(path) in ("", ".", ".."):
            raise UserError(f"{path}: is a folder; name a {kinds} file in it")
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        bare = path.name.lower() in suffixes  # a name that is all suffix
        named = path.with_stem("image") if bare else path
        raise UserError(f"{path}: not a {kinds} file; name it {named.with_suffix(suffixes[0])}")
    return path


def _numbered(path, beside, overwrite):
    """The first of `image.png`, `image-1.png`, ... of which no file is there."""
    if overwrite:
        return path
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1)))
    return next(name for name in names if not any(map(_is_taken, (name, *beside(name)))))


def _is_taken(path):
    return os.path.lexists(path)


@contextlib.contextmanager
def _told(path):
    """Turns the operating system's errors about a place into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {write_fault(error)}") from error
