"""A folder of images with captions, in `metadata.jsonl` or in a text file beside each image."""

import collections
import copy
import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from typing_extensions import TypedDict

from keras_sd.data.images import FORMATS, MINIMUM_SIDE, SUFFIXES, check_image, format_of, read_square
from keras_sd.errors import UserError
from keras_sd.files import json_files
from keras_sd.files.json_files import shown

METADATA = "metadata.jsonl"

# Suffixes of image formats that are not read here. Such a file is sometimes a JPEG nevertheless.
_OTHER_IMAGES = {
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".ico", ".icns", ".cur"),
    *(".psd", ".psb", ".xcf", ".kra", ".svg", ".svgz", ".eps", ".ai", ".pcx", ".dib", ".dds", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".wdp", ".jxr", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".nrw"),
    *(".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef", ".srw", ".x3f", ".iiq", ".3fr", ".erf"),
    *(".kdc", ".dcr", ".mrw"),
}
# Suffixes of other files beside images: captions, tables, side-cars, caches, notes.
_COMPANIONS = {
    *(".txt", ".caption", ".captions", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".xml"),
    *(".xmp", ".aae", ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".log", ".ini", ".db", ".npz"),
    *(".npy", ".safetensors", ".py", ".lock"),
}
# Files that every training run writes before its first sample image; only the command writes the first.
_RUN_SIGNS = ("run.json", "logs/metrics.jsonl")
_NAMED = 3  # a warning names this many suffixes, and files of each


class FolderSource:
    """Random access to the captioned images below a folder.

    Captions are in `metadata.jsonl`, one object with `file_name` and `text` on each line (as in Hugging
    Face's imagefolder), or in a text file beside each image with the image's stem, one caption a line (as
    in kohya's scripts). All files are checked on construction, before any long work. Images that
    `metadata.jsonl` does not name are left out with a warning.

    Args:
        folder: the folder; its sub-folders are read too, except `validation`.
        image_size: side in pixels of the square that an image is cropped and resized to.
        need_captions: False reads every image below the folder and no captions.

    Raises:
        UserError: names the first faulty file.
    """

    def __init__(self, folder: str | Path, image_size: int, need_captions: bool = True) -> None:
        self.folder = Path(folder)
        self.image_size = image_size
        images = image_paths(self.folder)
        if not need_captions:
            captions: dict[Path, tuple[str, ...]] = dict.fromkeys(images, ())
        elif (self.folder / METADATA).exists():
            captions = _metadata_captions(self.folder, images)
        else:
            captions = _text_captions(self.folder, images)
        # One warning for all images with damaged EXIF, whether found here or while reading.
        self._damaged = [path for path in captions if not check_image(path)]
        if self._damaged:
            self._warn_of_damaged()
        self._examples = [(path, captions[path]) for path in images if path in captions]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str), path (str)."""
        path, captions = self._examples[index]
        image = read_square(path, self.image_size, self._damage_found)
        return {"image": image, "captions": captions, "path": str(path)}

    def _damage_found(self, path: Path) -> None:
        if not self._damaged:
            self._damaged.append(path)
            self._warn_of_damaged()

    def _warn_of_damaged(self) -> None:
        first = self._damaged[0].relative_to(self.folder)
        _warn_once(
            f"{self.folder}: images with a damaged EXIF block are not rotated: "
            f"{len(self._damaged)}, the first is {str(first)!r}; rotate those that lie on their sides"
        )

    def at_size(self, image_size: int) -> "FolderSource":
        """Return the same images at another size, without checking the files again."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def with_captions(self, captions: tuple[str, ...]) -> "FolderSource":
        """Return the same images, all with these captions."""
        source = copy.copy(self)
        source._examples = [(path, captions) for path, _ in self._examples]
        return source

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example; no image is read."""
        return [captions for _, captions in self._examples]

    def fingerprint(self) -> str:
        """Return the SHA-256 of each image's relative path, size, modification time and captions.

        It stays the same when the folder is moved or renamed, or copied with modification times (`cp -a`,
        `rsync -t`).

        Raises:
            UserError: an image is no longer there.
        """
        described = []
        for path, captions in self._examples:
            try:
                state = path.stat()
            except OSError as error:
                raise UserError(f"{path}: cannot be found ({error.strerror}); put it back") from error
            name = path.relative_to(self.folder).as_posix()
            described.append([name, state.st_size, state.st_mtime_ns, *captions])
        return digest(["folder", described])


def no_folder(path: Path) -> UserError:
    """Return the error for a path that is no folder."""
    if path.exists():
        return UserError(f"{path}: a file, not a folder; give the folder that holds the images")
    return UserError(f"{path}: no such folder; give a folder with images")


def digest(value: object) -> str:
    """Return the SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    if not folder.is_dir():
        raise no_folder(folder)
    paths, left_out = [], collections.defaultdict(list)
    for path in _without_runs(folder, sorted(folder.rglob("*"))):
        parts = path.relative_to(folder).parts
        if _is_excluded(parts):
            continue
        try:
            if path.is_symlink() and path.is_dir():
                _check_linked_folder(path, folder)
            elif _is_image(path):
                paths.append(_inside(path, folder, path.name))
            elif path.suffix and path.suffix.lower() not in _COMPANIONS and path.is_file():
                left_out[path.suffix.lower()].append(parts)
        except UserError as error:
            if on_error is None:
                raise
            on_error(path, error)
    if not paths:
        only = f" that are read, but {_listed(left_out)}" if left_out else ""
        raise UserError(f"{folder}: no images in this folder{only}; add PNG, JPEG, WebP or BMP files")
    if left_out:
        _warn_once(
            f"{folder}: left out are {_listed(left_out)}; convert images among them to PNG, JPEG, WebP or BMP"
        )
    return paths


def _is_excluded(parts: tuple[str, ...]) -> bool:
    """Return whether a relative path is in `validation`, hidden, or an operating system's side-car."""
    return parts[:1] == ("validation",) or any(part.startswith((".", "@eaDir", "__MACOSX")) for part in parts)


def _without_runs(folder: Path, paths: list[Path]) -> list[Path]:
    """Return the paths that do not lie in the folder of a training run; warn if images are left out."""
    runs = {parent for parent in {path.parent for path in paths} if _is_run(parent)}
    if folder in runs:  # the folder itself is a run folder: leave out its outputs only
        runs = runs - {folder} | {folder / "samples", folder / "logs"}
    if not runs:
        return paths
    kept = [path for path in paths if runs.isdisjoint(path.parents)]
    images = [path for path in paths if path.suffix.lower() in SUFFIXES and not runs.isdisjoint(path.parents)]
    if images:
        first = str(images[0].relative_to(folder))
        _warn_once(f"{folder}: images that training runs wrote into it are left out, the first is {first!r}")
    return kept


def _is_run(folder: Path) -> bool:
    return any((folder / sign).is_file() for sign in _RUN_SIGNS)


def _check_linked_folder(path: Path, folder: Path) -> None:
    """Raise a UserError for a link to a folder of images, unless that folder lies in `folder` as well."""
    place, whole = path.resolve(), folder.resolve()
    if place.is_relative_to(whole) and not _is_excluded(place.relative_to(whole).parts):
        return
    if _holds_images(path):
        name = str(path.relative_to(folder))
        raise UserError(
            f"{folder}: sub-folder {name!r} is a link, which is not followed; copy it into the folder"
        )


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    return (not suffix or suffix in _OTHER_IMAGES) and path.is_file() and format_of(path) in FORMATS


def _listed(left_out: dict[str, list[tuple[str, ...]]]) -> str:
    """Return files by suffix, the most frequent first: "3 files (2 .heic: 'a.heic', ...; 1 .tga: ...)"."""
    most = sorted(left_out, key=lambda suffix: -len(left_out[suffix]))
    parts = []
    for suffix in most[:_NAMED]:
        names = [repr("/".join(file)) for file in left_out[suffix]]
        more = ", ..." if len(names) > _NAMED else ""
        parts.append(f"{len(names)} {suffix}: {', '.join(names[:_NAMED])}{more}")
    others = sum(len(left_out[suffix]) for suffix in most[_NAMED:])
    if others:
        parts.append(f"{others} others: {', '.join(most[_NAMED:])}")
    count = sum(map(len, left_out.values()))
    return f"{count} {'file' if count == 1 else 'files'} ({'; '.join(parts)})"


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of a split: the sub-folder of that name or, for "train", the folder itself.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    if not (folder / split).is_dir():
        if split == "train":
            return folder
        raise UserError(f"{folder}: no sub-folder {split!r}; put held-out images into {folder / split}")
    if split == "train":
        names = (path for path in sorted(folder.iterdir()) if path.name not in ("train", "validation"))
        outside = [path.name for path in names if _holds_images(path)]
        if outside:
            _warn_once(
                f"{folder}: has a sub-folder 'train', so that images elsewhere in it are left out: in "
                f"{len(outside)} places, the first is {outside[0]!r}; move them into {folder / 'train'}"
            )
    return folder / split


def _holds_images(path: Path) -> bool:
    """Return whether a path has an image suffix, or is a folder with an image that no training run wrote."""
    if path.name.startswith("."):
        return False
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    images = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return any(
        not any(_is_run(path / parent) for parent in image.relative_to(path).parents) for image in images
    )


def count_images(folder: Path) -> int:
    """Return the number of images below a folder; 0 if there is no such folder.

    Raises:
        UserError: one of them cannot be used for training.
    """
    try:
        image_paths(folder, lambda path, error: None)
    except UserError:
        if not folder.exists() or folder.is_dir():
            return 0
        raise
    return len(FolderSource(folder, MINIMUM_SIDE, need_captions=False))


@functools.cache
def _warn_once(message: str) -> None:
    """Warn once in a process. Python's own filter forgets past warnings when Pillow's are suppressed."""
    warnings.warn(message, stacklevel=3)


def _inside(path: Path, folder: Path, name: str) -> Path:
    """Return the path, if it stays within the folder when links and ".." are resolved."""
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # too long a name, a loop of links
        raise UserError(
            f"{folder}: file {shown(name)} cannot be found ({shown(str(error))}); correct its name"
        ) from error
    if not place.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: file {shown(name)} lies outside the folder; copy it into the folder")
    return path


def _read_text(path: Path) -> str:
    try:
        text = json_files.read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; put it back") from error
    if not text.strip():
        raise UserError(f"{path}: empty; write a caption into it")
    return text


def _metadata_captions(folder: Path, images: list[Path]) -> dict[Path, tuple[str, ...]]:
    metadata = folder / METADATA
    by_place = {path.resolve(): path for path in images}
    captions: dict[Path, tuple[str, ...]] = {}
    for number, line in enumerate(json_files.read_lines(metadata), start=1):
        if not line.strip():
            continue
        place = f"{metadata}, line {number}"
        name, text = _metadata_entry(line, place)
        path = _inside(folder / name, folder, name)
        image = by_place.get(path.resolve())
        if image is None:
            raise UserError(
                f"{place}: no image {shown(name)} in the folder; add the image or remove the line"
            )
        if image in captions:
            raise UserError(f"{place}: second caption for {shown(name)}; keep one line for each image")
        captions[image] = (text,)
    if not captions:
        raise UserError(f"{metadata}: empty; write a caption into it")
    missing = [path for path in images if path not in captions]
    if missing:
        # The captioner skips images that it cannot read; such a folder is still a valid data set.
        _warn_once(
            f"{metadata}: {len(captions)} captions for {len(images)} images; {len(missing)} are left out, "
            f"the first is {str(missing[0].relative_to(folder))!r}"
        )
    return captions


class MetadataLine(TypedDict):
    """The shape of a line of `metadata.jsonl`."""

    file_name: str
    text: str


def _metadata_entry(line: str, place: str) -> tuple[str, str]:
    remedy = 'write {"file_name": "image.png", "text": "a caption"}'
    entry = json_files.parse_json(line, place, MetadataLine, remedy=remedy, file_names=True)
    for key in ("file_name", "text"):
        if not entry[key].strip():
            raise UserError(f'{place}: no "{key}"; {remedy}')
    try:
        entry["text"].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: not valid Unicode (a lone surrogate); write the line anew") from error
    return entry["file_name"], entry["text"].strip()


def _text_captions(folder: Path, images: list[Path]) -> dict[Path, tuple[str, ...]]:
    captions = {}
    for path in images:
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UserError(
                f"{path}: no caption; write {text.name} beside it, or {METADATA} in {folder} "
                '(lines with "file_name" and "text")'
            )
        _inside(text, folder, text.name)
        captions[path] = tuple(line.strip() for line in _read_text(text).splitlines() if line.strip())
    owners = collections.Counter(path.with_suffix(".txt") for path in images)
    shared = [path for path in images if owners[path.with_suffix(".txt")] > 1]
    if shared:
        _warn_once(
            f"{folder}: {len(shared)} images share their name, apart from the suffix, and their caption, the "
            f"first is {str(shared[0].relative_to(folder))!r}; rename them if they are not the same image"
        )
    used = {path.with_suffix(".txt") for path in images}
    orphans = {text for parent in {path.parent for path in images} for text in parent.glob("*.txt")} - used
    orphans = [text for text in orphans if not _is_of_left_out(text)]
    if orphans:
        raise UserError(f"{min(orphans)}: a caption without an image; add the image or remove the file")
    return captions


def _is_of_left_out(text: Path) -> bool:
    """Return whether a caption file belongs to a file that is left out, such as a HEIC image."""
    beside = (path for path in text.parent.iterdir() if path.stem == text.stem)
    return any(path.suffix.lower() not in _COMPANIONS for path in beside)
