"""Finds the images below a folder, and what lies beside them."""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from keras_sd.data.faults import warn_once
from keras_sd.data.images import FORMATS, HEIF_PACKAGE, SUFFIXES, format_of
from keras_sd.errors import UserError, missing_package
from keras_sd.files.json_files import shown

# Suffixes of image formats that are not read here. Such a file is sometimes a JPEG nevertheless.
_OTHER_IMAGES = {
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".ico", ".icns", ".cur"),
    *(".psd", ".psb", ".xcf", ".kra", ".svg", ".svgz", ".eps", ".ai", ".pcx", ".dib", ".dds", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".wdp", ".jxr", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".nrw"),
    *(".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef", ".srw", ".x3f", ".iiq", ".3fr", ".erf"),
    *(".kdc", ".dcr", ".mrw"),
}
_HEIF = (".heic", ".heif", ".hif")
# Suffixes of other files beside images: captions, tables, side-cars, caches, notes.
COMPANIONS = {
    *(".txt", ".caption", ".captions", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".xml"),
    *(".xmp", ".aae", ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".log", ".ini", ".db", ".npz"),
    *(".npy", ".safetensors", ".py", ".lock"),
}
"""Suffixes of files beside images that are no images."""

# Files that every training run writes before its first sample image; only the command writes the first.
_RUN_SIGNS = ("run.json", "logs/metrics.jsonl")
_NAMED = 3  # a warning names this many suffixes, and files of each
_EXCLUDED = re.compile(r"(\.|@eaDir|__MACOSX)")


@dataclasses.dataclass
class Listing:
    """The files of a folder, by their paths relative to it.

    Attributes:
        folder: the folder.
        images: its images, sorted.
        others: its other files, and whether each is a link.
        left_out: of these, the files that may be images.
    """

    folder: Path
    images: list[str]
    others: dict[str, bool]
    left_out: list[str]

    def without(self, below: Path) -> "Listing":
        """Return the listing without the files of a folder, if it lies below this one."""
        try:
            name = str(below.resolve().relative_to(self.folder.resolve())) + os.sep
        except ValueError:
            return self
        return Listing(
            self.folder,
            [image for image in self.images if not image.startswith(name)],
            {other: is_link for other, is_link in self.others.items() if not other.startswith(name)},
            [other for other in self.left_out if not other.startswith(name)],
        )


def no_folder(path: Path) -> UserError:
    """Return the error for a path that is no folder."""
    if path.exists():
        return UserError(f"{path}: a file, not a folder; give the folder that holds the images")
    return UserError(f"{path}: no such folder; give a folder with images")


def image_paths(folder: Path, on_error: Callable[[Path, UserError], None] | None = None) -> list[Path]:
    """Return the paths of the images below a folder, sorted by name, without hidden ones and `validation`.

    Images that training runs wrote are left out with a warning. A sub-folder that is a symbolic link is an
    error, unless its target lies in the folder as well. A file without a suffix, or with the suffix of
    another format, is an image if its content is one. Other files that may be images are left out with a
    warning that counts and names them.

    Args:
        on_error: called with the path and the UserError of each image or link that leads out of the folder;
            the path is then left out.

    Raises:
        UserError: there is no such folder or no image in it, or, without `on_error`, a path leads out of it.
    """
    return [folder / name for name in list_folder(folder, on_error).images]


def list_folder(folder: Path, on_error: Callable[[Path, UserError], None] | None = None) -> Listing:
    """Return the files below a folder; arguments and errors are those of `image_paths`."""
    if not folder.is_dir():
        raise no_folder(folder)
    images: list[str] = []
    others: dict[str, bool] = {}
    left_out = collections.defaultdict(list)
    for file in _files(folder):
        path = folder / file.name if file.is_link else None
        try:
            if path is not None and path.is_dir():
                _check_linked_folder(path, folder)
            elif _is_image(folder, file):
                if path is not None:
                    inside(path, folder, path.name)
                images.append(file.name)
            elif not file.is_folder and (path is None or path.is_file()):
                others[file.name] = file.is_link
                if file.suffix and file.suffix not in COMPANIONS:
                    left_out[file.suffix].append(file.name)
        except UserError as error:
            if on_error is None:
                raise
            on_error(folder / file.name, error)
    if not images:
        only = f" that are read, but {_listed(left_out)}" if left_out else ""
        remedy = f"{_for_heif(left_out)}add PNG, JPEG, WebP or TIFF files"
        raise UserError(f"{folder}: no images in this folder{only}; {remedy}")
    if left_out:
        warn_once(
            f"{folder}: left out are {_listed(left_out)}; {_for_heif(left_out)}convert images among them to "
            "PNG, JPEG, WebP or TIFF"
        )
    return Listing(folder, images, others, [name for names in left_out.values() for name in names])


class _File(NamedTuple):
    """A file, link or folder: its path relative to the listed folder, and what it is.

    The suffix is in small letters, with its dot; empty if there is none.
    """

    name: str
    suffix: str
    is_folder: bool
    is_link: bool


def _files(folder: Path) -> list[_File]:
    """Return all below a folder, sorted, without what is hidden, in `validation` or of training runs."""
    found, of_runs = [], []
    for file, is_of_run in _walk(str(folder)):
        if not is_of_run:
            found.append(file)
        elif file.suffix in SUFFIXES:
            of_runs.append(file)

    def parts(file: _File) -> list[str]:
        return file.name.split(os.sep)

    if of_runs:
        first = min(of_runs, key=parts).name
        warn_once(f"{folder}: images that training runs wrote into it are left out, the first is {first!r}")
    return sorted(found, key=parts)


def _walk(folder: str) -> Iterator[tuple[_File, bool]]:
    """Yield all below a folder, and whether a training run wrote it; links are not followed."""
    left = [("", False)]  # sub-folders to read, and whether they are a run's
    while left:
        below, is_of_run = left.pop()
        place = os.path.join(folder, below) if below else folder
        try:
            entries = list(os.scandir(place))
        except OSError as error:
            warn_once(f"{place}: cannot be read ({error.strerror}), and is left out; make it readable")
            continue
        is_run = {"run.json", "logs"} & {entry.name for entry in entries} and _is_run(Path(place))
        # If the folder itself is a run's, only its outputs are left out.
        of_run = {"samples", "logs"} if is_run and not below else ()
        is_of_run = is_of_run or bool(is_run and below)
        for entry in entries:
            # Only the last part, as folders that are excluded are not read.
            if _EXCLUDED.match(entry.name) or (not below and entry.name == "validation"):
                continue
            name = below + os.sep + entry.name if below else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            suffix = os.path.splitext(entry.name)[1].lower().rstrip(".")
            yield _File(name, suffix, is_folder, entry.is_symlink()), is_of_run
            if is_folder:
                left.append((name, is_of_run or entry.name in of_run))


def _is_excluded(parts: tuple[str, ...]) -> bool:
    """Return whether a relative path is in `validation`, hidden, or an operating system's side-car."""
    return parts[:1] == ("validation",) or any(map(_EXCLUDED.match, parts))


def _is_run(folder: Path) -> bool:
    return any((folder / sign).is_file() for sign in _RUN_SIGNS)


def _check_linked_folder(path: Path, folder: Path) -> None:
    """Raise a UserError for a link to a folder of images, unless that folder lies in `folder` as well."""
    place, whole = path.resolve(), folder.resolve()
    if place.is_relative_to(whole) and not _is_excluded(place.relative_to(whole).parts):
        return
    if holds_images(path):
        name = str(path.relative_to(folder))
        raise UserError(
            f"{folder}: sub-folder {name!r} is a link, which is not followed; copy it into the folder"
        )


def _is_image(folder: Path, file: _File) -> bool:
    if file.suffix in SUFFIXES:
        return True
    if file.is_folder or (file.suffix and file.suffix not in _OTHER_IMAGES):
        return False
    path = folder / file.name
    return path.is_file() and format_of(path) in FORMATS


def _listed(left_out: dict[str, list[str]]) -> str:
    """Return files by suffix, the most frequent first: "3 files (2 .heic: 'a.heic', ...; 1 .tga: ...)"."""
    most = sorted(left_out, key=lambda suffix: -len(left_out[suffix]))
    parts = []
    for suffix in most[:_NAMED]:
        names = [repr(name.replace(os.sep, "/")) for name in left_out[suffix]]
        more = ", ..." if len(names) > _NAMED else ""
        parts.append(f"{len(names)} {suffix}: {', '.join(names[:_NAMED])}{more}")
    others = sum(len(left_out[suffix]) for suffix in most[_NAMED:])
    if others:
        parts.append(f"{others} others: {', '.join(most[_NAMED:])}")
    count = sum(map(len, left_out.values()))
    return f"{count} {'file' if count == 1 else 'files'} ({'; '.join(parts)})"


def _for_heif(left_out: dict[str, list[str]]) -> str:
    """Return the remedy for photos of phones that are left out, with a separator; nothing without any."""
    if "HEIF" in FORMATS or not set(_HEIF) & left_out.keys():
        return ""
    return f"{missing_package(HEIF_PACKAGE)}, or "


def holds_images(path: Path) -> bool:
    """Return whether a path has an image suffix, or is a folder with an image that no training run wrote."""
    if path.name.startswith("."):
        return False
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    images = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return any(
        not any(_is_run(path / parent) for parent in image.relative_to(path).parents) for image in images
    )


def inside(path: Path, folder: Path, name: str) -> Path:
    """Return the path, if it stays within the folder when links and ".." are resolved.

    Raises:
        UserError: it does not, or it cannot be found.
    """
    try:
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links
        raise UserError(
            f"{folder}: file {shown(name)} cannot be found ({shown(str(error))}); correct its name"
        ) from error
    if not place.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: file {shown(name)} lies outside the folder; copy it into the folder")
    return path
