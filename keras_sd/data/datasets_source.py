"""Random access to data sets of the `datasets` library: the hub's, parquet, arrow and WebDataset's tars."""

import copy
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_sd.data.catalogue import examine_stored, stored_hashes
from keras_sd.data.dataset_library import keep_stream, open_dataset, open_streams
from keras_sd.data.faults import Faults, first_line
from keras_sd.data.folders import digest
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import StoredImage, read_frame
from keras_sd.errors import UserError
from keras_sd.files.json_files import shown

_CAPTION_COLUMNS = ("text", "caption", "captions", "txt")


class DatasetsSource:
    """One split of a data set of the `datasets` library; its images are read from memory-mapped files.

    Args:
        name: a hub name `owner/name`, a file, a pattern or a folder of parquet, arrow or tar files, or a
            folder that the library has saved.
        split: "train", "validation" or another one.
        image_size: side in pixels of the square that an image is cropped and resized to.
        need_captions: False reads no captions.
        config_name: the data set's configuration, if it has several.
        image_column, caption_column: the columns; by default the only one of images, and the first of `text`,
            `caption`, `captions` and `txt`. A list of texts is several captions of one image.
        on_bad_sample: "error" names all faulty examples; "skip" leaves them out and counts them.
        streaming: fetch only the columns of images and captions, example by example, and keep them.
        max_samples: with streaming, fetch only so many examples, the first ones; None fetches all.

    Attributes:
        notes: what the user should know of the data, each in a line.

    Raises:
        UserError: the library is missing, the data set cannot be read, has no such split or column, or an
            example is faulty.
    """

    def __init__(
        self,
        name: str | Path,
        split: str,
        image_size: int,
        need_captions: bool = True,
        *,
        config_name: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        on_bad_sample: str = "error",
        streaming: bool = False,
        max_samples: int | None = None,
    ) -> None:
        self.name, self.split, self.image_size = str(name), split, image_size
        self.notes: list[str] = []
        splits = (open_streams if streaming else open_dataset)(str(name), config_name)
        if split not in splits:
            raise UserError(f"data set {name}: no split {split!r}; it has {', '.join(splits)}")
        table = splits[split]
        self._image_column = _image_column(table.features or {}, self.name, image_column)
        column = _caption_column(table.features, self.name, caption_column) if need_captions else None
        if streaming:
            names = [self._image_column, *([column] if column else [])]
            kept = importlib.import_module("datasets").Features({one: table.features[one] for one in names})
            table = keep_stream(self.name, config_name, split, names, max_samples, kept)
        self._identity = _identity(table, self._image_column)
        features = importlib.import_module("datasets")
        self._images = table.select_columns([self._image_column]).cast_column(
            self._image_column, features.Image(decode=False)
        )
        self._count = len(table)
        faults = Faults(f"data set {name}, {split}", on_bad_sample)
        captions = _captions(table, self, column, faults) if column else [()] * self._count
        on_fault = lambda index, error: faults.add(error)  # noqa: E731
        found = examine_stored(self._identity, self._count, self._stored, on_fault)
        good = [index for index, one in enumerate(found) if one is not None and captions[index] is not None]
        faults.raise_or_note(len(good), self.notes)
        if not good:
            raise UserError(f"data set {name}: no examples in {split}; give one with images")
        self._indices = np.array(good)
        self._captions = [captions[index] or () for index in good]
        sizes = [(one.height, one.width) for index in good if (one := found[index]) is not None]
        self._sizes = np.array(sizes, "int32")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str), path (str)."""
        frame = frame_of(tuple(self._sizes[index].tolist()), (self.image_size, self.image_size))
        return {"image": self.read(index, frame), **self.details(index)}

    def details(self, index: int) -> dict:
        """Keys: captions (tuple of str), path (str), which names the example; no image is read."""
        return {"captions": self._captions[index], "path": self._place(int(self._indices[index]))}

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        return read_frame(self._stored(int(self._indices[index])), frame)

    def sizes(self) -> np.ndarray:
        """Return (height, width) of each upright image in pixels, int32 (n, 2); no image is read."""
        return self._sizes

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of each image's bytes."""
        keys = stored_hashes(self._identity, self._count, self._stored)
        return [keys[index] for index in self._indices]

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example."""
        return self._captions

    def at_size(self, image_size: int) -> "DatasetsSource":
        """Return the same examples at another size."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def fingerprint(self) -> str:
        """Return the SHA-256 of the contents of all images and of their captions."""
        return digest(["datasets", self.content_keys(), [list(captions) for captions in self._captions]])

    def _place(self, index: int) -> str:
        return f"data set {self.name}, {self.split} {index}"

    def _stored(self, index: int) -> StoredImage:
        """Return an image's file by its index in the table."""
        place = self._place(index)
        try:
            value = self._images[index][self._image_column]
        except Exception as error:
            raise UserError(f"{place}: cannot be read ({first_line(error)}); download it again") from error
        content, path = (value or {}).get("bytes"), (value or {}).get("path")
        if content is None and path:
            if not os.path.isfile(path):  # a pipe would never end
                raise UserError(f"{place}: {path} is no file; put it back")
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"{place}: {path} cannot be read; put it back") from error
        if content is None:
            raise UserError(f"{place}: has no image; remove the example")
        return StoredImage(place, content)


def _identity(table: Any, column: str) -> str:
    """Return what names a column's content: the library's files with their sizes and times of change."""
    states = [(file["filename"], os.stat(file["filename"])) for file in table.cache_files]
    described = [[path, state.st_size, state.st_mtime_ns] for path, state in states]
    return f"datasets:{digest([described, len(table), column])}" if described else ""


def _image_column(features: Any, name: str, wanted: str | None) -> str:
    """Return the name of the column of images, which holds files or encoded bytes."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    listed = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if wanted is None:
        found = [column for column, kind in kinds.items() if kind == "Image"]
        # A file that pandas or another program wrote does not say that its column holds images.
        found = found or [column for column, feature in features.items() if _is_stored_image(feature)]
        if len(found) != 1:
            fault = "several columns of images" if found else "no column of images"
            raise UserError(f"data set {name}: {fault}, in {listed}; name the `image_column`")
        return found[0]
    if wanted not in features:
        raise UserError(f"image_column {shown(wanted)}: not in the data set {name}; it has {listed}")
    kind = getattr(features[wanted], "dtype", kinds[wanted])
    is_image = kinds[wanted] == "Image" or _is_stored_image(features[wanted])
    if not is_image and kind not in ("binary", "large_binary"):
        raise UserError(
            f"image_column {shown(wanted)}: holds {kind} in the data set {name}, not images; choose one of "
            f"{listed}"
        )
    return wanted


def _is_stored_image(feature: Any) -> bool:
    """Return whether a column has the bytes and the path of an image, as the library stores images."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _caption_column(features: Any, name: str, wanted: str | None) -> str:
    """Return the name of the column of captions, which holds texts or lists of texts."""
    listed = ", ".join(features)
    column = wanted or next((one for one in _CAPTION_COLUMNS if one in features), None)
    if column is None:
        raise UserError(f"data set {name}: no column of captions, only {listed}; name the `caption_column`")
    if column not in features:
        raise UserError(f"caption_column {shown(column)}: not in the data set {name}; it has {listed}")
    inner = getattr(features[column], "feature", features[column])
    if getattr(inner, "dtype", None) not in ("string", "large_string", "null"):
        kind = getattr(inner, "dtype", type(inner).__name__)
        raise UserError(
            f"caption_column {shown(column)}: holds {kind} in the data set {name}, not texts; choose one of "
            f"{listed}"
        )
    return column


def _captions(table: Any, source: DatasetsSource, column: str, faults: Faults) -> list[Any]:
    """Return the captions of each example; None for a faulty one, which is reported."""
    captions: list[tuple[str, ...] | None] = []
    lists = 0
    for index, value in enumerate(table.select_columns([column])[column]):
        texts = value if isinstance(value, list) else [value]
        lists += isinstance(value, list)
        place = f"{source._place(index)}: {column}"
        if not texts or not all(text is None or isinstance(text, str) for text in texts):
            fault = "an empty list" if not texts else f"{shown(value)} is no text"
            faults.add(UserError(f"{place}: {fault}; choose a `caption_column` of texts"))
            captions.append(None)
        elif not all(text and text.strip() for text in texts):
            faults.add(UserError(f"{place}: empty; write a caption"))
            captions.append(None)
        elif any("\0" in text for text in texts):
            faults.add(UserError(f"{place}: has a NUL character; write it as plain text"))
            captions.append(None)
        else:
            captions.append(tuple(text.strip() for text in texts))
    if lists:
        source.notes.append(
            f"data set {source.name}: {column} holds lists, and each text is a caption of its image"
        )
    return captions
