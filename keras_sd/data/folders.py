"""A folder of images with captions: `metadata.jsonl` or a text file beside each image."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from keras_sd.data.images import SUFFIXES, check_image, read_image
from keras_sd.errors import UserError

METADATA = "metadata.jsonl"


class FolderSource:
    """Random access to the captioned images below a folder.

    Captions stand in `metadata.jsonl`, one object with `file_name` and `text` on each line (as in Hugging
    Face's imagefolder), or in a text file beside each image with the image's stem, one caption a line (as
    kohya's scripts read it). Everything is checked on construction, before any long work. Images that
    `metadata.jsonl` does not name are left out with a warning.

    Args:
        folder: the folder; its sub-folders are read too, save one named `validation`.
        image_size: side of the square that an image is cropped and resized to.
        need_captions: False reads every image below the folder and no captions.

    Raises:
        UserError: for the first file found at fault.
    """

    def __init__(self, folder: str | Path, image_size: int, need_captions: bool = True):
        self.folder = Path(folder)
        self.image_size = image_size
        images = image_paths(self.folder)
        if not need_captions:
            captions = dict.fromkeys(images, ())
        elif (self.folder / METADATA).exists():
            captions = _metadata_captions(self.folder, images)
        else:
            captions = _text_captions(self.folder, images)
        for path in captions:
            check_image(path)
        self._examples = [(path, captions[path]) for path in images if path in captions]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str), path (str)."""
        path, captions = self._examples[index]
        return {"image": read_image(path, self.image_size), "captions": captions, "path": str(path)}

    def at_size(self, image_size: int) -> "FolderSource":
        """The same images at another size, without looking at any file again."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def with_captions(self, captions: tuple[str, ...]) -> "FolderSource":
        """The same images, each with these captions in place of its own."""
        source = copy.copy(self)
        source._examples = [(path, captions) for path, _ in self._examples]
        return source

    def captions(self) -> list[tuple[str, ...]]:
        """The captions of every example; no image is read."""
        return [captions for _, captions in self._examples]

    def fingerprint(self) -> str:
        """The SHA-256 of each image's name within the folder, size, time of change and captions.

        It stays the same when the folder is moved or renamed. A copy has another, unless it keeps the times,
        as those of `cp -a` and `rsync -t` do.

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
    """Says that a path is no folder."""
    if path.exists():
        return UserError(f"{path}: a file, not a folder; give the folder that holds the images")
    return UserError(f"{path}: no such folder; give a folder with images")


def digest(value) -> str:
    """The SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def image_paths(folder: Path, pass_over: Callable[[Path, UserError], None] | None = None) -> list[Path]:
    """The images below a folder in the order of their names, those in `validation` and hidden ones left out.

    Args:
        pass_over: called with a path that lies outside the folder and its fault; it is then left out.

    Raises:
        UserError: there is no such folder, no image in it, or without `pass_over` one that lies outside.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    paths = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in SUFFIXES and not hidden and parts[0] != "validation":
            try:
                paths.append(_inside(path, folder, path.name))
            except UserError as error:
                if pass_over is None:
                    raise
                pass_over(path, error)
    if not paths:
        raise UserError(f"{folder}: no images in this folder; add PNG, JPEG, WebP or BMP files")
    return paths


def _inside(path: Path, folder: Path, name: str) -> Path:
    """`path` itself, if it stays within `folder` when links and ".." are followed."""
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # too long a name, a loop of links
        raise UserError(f"{folder}: file {name!r} cannot be found ({error}); correct its name") from error
    if not place.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: file {name!r} lies outside the folder; copy it into the folder")
    return path


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    if not text.strip():
        raise UserError(f"{path}: empty; write a caption into it")
    return text


def _metadata_captions(folder: Path, images: list[Path]) -> dict[Path, tuple[str, ...]]:
    metadata = folder / METADATA
    by_place = {path.resolve(): path for path in images}
    captions = {}
    for number, line in enumerate(_read_text(metadata).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{metadata}, line {number}"
        name, text = _metadata_entry(line, place)
        path = _inside(folder / name, folder, name)
        image = by_place.get(path.resolve())
        if image is None:
            raise UserError(f"{place}: no image {name!r} in the folder; add the image or remove the line")
        if image in captions:
            raise UserError(f"{place}: second caption for {name!r}; keep one line for each image")
        captions[image] = (text,)
    missing = [path for path in images if path not in captions]
    if missing:
        # The captioner passes over what it cannot read, and such a folder is a data set all the same.
        warnings.warn(
            f"{metadata}: {len(captions)} captions for {len(images)} images; {len(missing)} are left out, "
            f"the first is {str(missing[0].relative_to(folder))!r}",
            stacklevel=2,
        )
    return captions


def _metadata_entry(line: str, place: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}); write one object a line") from error
    for key in ("file_name", "text"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise UserError(f'{place}: no "{key}"; write {{"file_name": "image.png", "text": "a caption"}}')
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
    used = {path.with_suffix(".txt") for path in images}
    orphans = {text for parent in {path.parent for path in images} for text in parent.glob("*.txt")} - used
    if orphans:
        raise UserError(f"{min(orphans)}: a caption without an image; add the image or remove the file")
    return captions
