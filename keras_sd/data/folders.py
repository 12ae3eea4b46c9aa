"""A folder of images with captions, in a metadata file or in a text file beside each image."""

import copy
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from keras_sd.arguments import checked_path
from keras_sd.data.caption_files import METADATA, CaptionFiles, read_captions, repeats_of
from keras_sd.data.catalogue import content_hashes, examine_images
from keras_sd.data.faults import Faults, warn_once
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import MINIMUM_SIDE, read_frame
from keras_sd.data.listing import holds_images, image_paths, list_folder, no_folder
from keras_sd.data.masks import MaskFiles, Masks
from keras_sd.errors import UserError

__all__ = ["METADATA", "FolderSource", "count_images", "digest", "image_paths", "no_folder", "split_folder"]

_NAMED = 5  # a note names this many folders


class FolderSource:
    """Random access to the captioned images below a folder.

    Captions are in `metadata.jsonl`, one object with `file_name` and `text` on each line, or in
    `metadata.csv` (as in Hugging Face's imagefolder), or in a text file beside each image with the image's
    stem, one caption a line (as in kohya's scripts). All files are checked on construction, before any long
    work; what was found is remembered (`data.catalogue`). Images that the metadata does not name are left
    out with a warning.

    Args:
        folder: the folder; its sub-folders are read too, except `validation`. Images in a sub-folder `10_cat`
            are repeated ten times in an epoch, as in kohya's scripts.
        image_size: side in pixels of the square that an image is cropped and resized to.
        need_captions: False reads every image below the folder and no captions.
        caption_files: where captions are.
        on_bad_sample: "error" names all faulty examples; "skip" leaves them out and counts them.
        masks: where masks of the images are; without any, all of an image counts.

    Attributes:
        notes: what the user should know of the data, each in a line.

    Raises:
        UserError: an example is faulty, or all are; `BadSamples` if several are.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        need_captions: bool = True,
        *,
        caption_files: CaptionFiles | None = None,
        on_bad_sample: str = "error",
        masks: MaskFiles | None = None,
    ) -> None:
        self.folder = checked_path("folder", folder)
        self.image_size = image_size
        self.notes: list[str] = []
        faults = Faults(self.folder, on_bad_sample)
        try:
            listing = list_folder(self.folder, lambda path, error: faults.add(error))
        except UserError:
            faults.raise_or_note(0, self.notes)
            raise
        if masks is not None and masks.mask_data_dir is not None:
            listing = listing.without(masks.mask_data_dir)
        captions: dict[str, tuple[str, ...]] = dict.fromkeys(listing.images, ())
        if need_captions:
            captions = read_captions(listing, caption_files or CaptionFiles(), faults.add, self.notes)
        elif caption_files is not None:
            for argument, value in dataclasses.asdict(caption_files).items():
                if value is not None:
                    raise UserError(f"{argument}: has no effect where captions are not read; leave it out")
        names = [name for name in listing.images if name in captions]
        paths = [self.folder / name for name in names]
        found = examine_images(paths, lambda path, error: faults.add(error))
        self._masks: Masks | None = None
        if masks:
            arguments = names, found, lambda path, error: faults.add(error), self.notes
            self._masks = Masks(masks, self.folder, *arguments)
            masked = self._masks
            found = [one if name in masked else None for name, one in zip(names, found, strict=True)]
        faults.raise_or_note(len(paths) - found.count(None), self.notes)
        good = [(path, name, one) for path, name, one in zip(paths, names, found, strict=True) if one]
        self._examples = [(path, captions[name]) for path, name, _ in good]
        self._states = np.array([_state(path) for path, _ in self._examples], "int64").reshape(-1, 2)
        self._sizes = np.array([(one.height, one.width) for *_, one in good], "int32").reshape(-1, 2)
        self._has_changed = False
        # One warning for all images with damaged EXIF, whether found here or while reading.
        self._damaged = [path for path, _, one in good if not one.has_sound_exif]
        if self._damaged:
            self._warn_of_damaged()
        self._note_repeats()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str), path (str)."""
        frame = frame_of(tuple(self._sizes[index].tolist()), (self.image_size, self.image_size))
        return {"image": self.read(index, frame), **self.details(index)}

    def details(self, index: int) -> dict:
        """Keys: captions (tuple of str), path (str); no file is read."""
        path, captions = self._examples[index]
        return {"captions": captions, "path": str(path)}

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3).

        Raises:
            UserError: the file is missing or damaged, or was replaced by an image of another size.
        """
        path = self._examples[index][0]
        if not self._has_changed and tuple(self._states[index]) != _state(path):
            self._has_changed = True
            warn_once(
                f"{self.folder}: images have changed since the start, the first is {self._name(path)!r}; the "
                "run is not one of the data set as it was then"
            )
        return read_frame(path, frame, self._damage_found)

    @property
    def has_masks(self) -> bool:
        """Whether `read_mask` gives the masks of images."""
        return self._masks is not None

    def read_mask(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image's mask, uint8 (height, width); errors are those of `read`."""
        return self._checked_masks().read(self._name(self._examples[index][0]), frame)

    def mask_keys(self) -> list[str]:
        """Return a text for each image that names its mask's content."""
        return self._checked_masks().keys([self._name(path) for path, _ in self._examples])

    def _checked_masks(self) -> Masks:
        if self._masks is None:
            raise UserError(f"{self.folder}: was opened without masks; give `masks`")
        return self._masks

    def _damage_found(self, path: Path) -> None:
        if not self._damaged:
            self._damaged.append(path)
            self._warn_of_damaged()

    def _warn_of_damaged(self) -> None:
        first = self._damaged[0].relative_to(self.folder)
        warn_once(
            f"{self.folder}: images with a damaged EXIF block are not rotated: "
            f"{len(self._damaged)}, the first is {str(first)!r}; rotate those that lie on their sides"
        )

    def _note_repeats(self) -> None:
        counts: dict[str, list[int]] = {}
        for path, _ in self._examples:
            name = self._name(path)
            of_folder = repeats_of(name)
            if of_folder:
                counts.setdefault(name.partition(os.sep)[0], [of_folder[0], 0])[1] += 1
        if counts:
            told = [f"{name!r} ({count} images) {times}" for name, (times, count) in counts.items()]
            more = f", and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
            self.notes.append(
                f"{self.folder}: repeats in an epoch, by names of folders: {', '.join(told[:_NAMED])}{more}"
            )

    def _name(self, path: Path) -> str:
        """Return the path relative to the folder; `Path.relative_to` takes ten times as long."""
        start = str(self.folder)
        return str(path)[len(start) :].lstrip(os.sep) if self.folder.parts else str(path)

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

    def sizes(self) -> np.ndarray:
        """Return (height, width) of each upright image in pixels, int32 (n, 2); no image is read."""
        return self._sizes

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of each file's bytes; files that have not changed since are not read again.

        Raises:
            UserError: an image cannot be read.
        """
        return content_hashes([path for path, _ in self._examples])

    def repeats(self) -> np.ndarray | None:
        """Return how often an epoch shows each image, by kohya's names of folders (`10_cat`); None: once."""
        of_folders = [repeats_of(self._name(path)) for path, _ in self._examples]
        if not any(of_folders):
            return None
        return np.asarray([1 if found is None else found[0] for found in of_folders])

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
                state = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be found ({error.strerror}); put it back") from error
            name = self._name(path).replace(os.sep, "/")
            described.append([name, state.st_size, state.st_mtime_ns, *captions])
            if self._masks is not None:
                described[-1] += self._masks.described(self._name(path))
        return digest(["folder", described])


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size and modification time; -1 if it is gone, which reading it tells."""
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def digest(value: object) -> str:
    """Return the SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
        outside = [path.name for path in names if holds_images(path)]
        if outside:
            warn_once(
                f"{folder}: has a sub-folder 'train', so that images elsewhere in it are left out: in "
                f"{len(outside)} places, the first is {outside[0]!r}; move them into {folder / 'train'}"
            )
    return folder / split


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
