"""Random access to TensorFlow Datasets, read without TensorFlow where their files allow it."""

import copy
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from keras_sd.data.catalogue import examine_stored
from keras_sd.data.faults import Faults, first_line
from keras_sd.data.folders import digest
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import StoredImage, read_frame
from keras_sd.errors import UserError, is_installed, require
from keras_sd.files.json_files import read_json

_OWN = "tensorflow_datasets."
_line = functools.partial(first_line, longest=120)
# Keys of a `features.json` that name a Python class: the current one in its two spellings, and the old one.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_CAPTION_FEATURES = ("captions", "caption", "text")


class TFDSSource:
    """One split of a TFDS data set with the feature `image`.

    Captions come from a feature `captions`, `caption` or `text`, or else from the class names of a feature
    `label` ("a photo of a pink primrose"). TFDS prepares the data set on first use, which needs a network
    for all but `emoji_captions`, and keeps it in `TFDS_DATA_DIR`, by default `~/tensorflow_datasets`.

    Args:
        name: the data set's name in TFDS, optionally with its configuration and version.
        split: "train", "validation", or any other split of the data set.
        image_size: side in pixels of the square that an image is cropped and resized to.
        need_captions: False accepts a data set without captions and classes.
        on_bad_sample: "error" names all faulty images; "skip" leaves them out and counts them.

    Attributes:
        notes: what the user should know of the data, each in a line.

    Raises:
        UserError: TFDS or the data set is missing, or it has no such split, no images or no captions; or
            images are faulty.
    """

    def __init__(
        self,
        name: str,
        split: str,
        image_size: int,
        need_captions: bool = True,
        *,
        on_bad_sample: str = "error",
    ):
        self.image_size, self.notes = image_size, []
        self._place = f"data set {name}, {split}"
        builder = prepared_builder(name)
        features = builder.info.features
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise UserError(f"data set {name}: no split {split!r}; it has {splits}")
        image_feature = importlib.import_module("tensorflow_datasets").features.Image
        image = features["image"] if "image" in features else None
        if not isinstance(image, image_feature) or image.np_dtype not in (np.uint8, np.uint16):
            raise UserError(f"data set {name}: no feature 'image'; choose a data set of images")
        self._caption_feature = next((key for key in _CAPTION_FEATURES if key in features), None)
        self._class_names = getattr(features["label"], "names", None) if "label" in features else None
        if need_captions and not self._caption_feature and not self._class_names:
            raise UserError(f"data set {name}: neither captions nor classes; choose one with captions")
        self._identity = ["tfds", builder.info.full_name, split]
        # Reading captions decodes no image; images are decoded here, as those of folders are.
        decoding = importlib.import_module("tensorflow_datasets").decode
        decoders = {"image": decoding.SkipDecoding()}
        self._encoded = builder.as_data_source(split=split, decoders=decoders)
        self._indices = np.arange(len(self._encoded))
        faults = Faults(self._place, on_bad_sample)
        state = os.stat(Path(builder.data_path) / "dataset_info.json")
        prepared = [*self._identity, str(builder.data_path), state.st_size, state.st_mtime_ns]
        found = examine_stored(
            f"tfds:{digest(prepared)}",
            len(self._encoded),
            self._stored,
            lambda index, error: faults.add(error),
        )
        self._indices = np.array([index for index, one in enumerate(found) if one is not None], int)
        faults.raise_or_note(len(self._indices), self.notes)
        sizes = [(one.height, one.width) for one in found if one is not None]
        self._sizes = np.array(sizes, "int32").reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str)."""
        frame = frame_of(tuple(self._sizes[index].tolist()), (self.image_size, self.image_size))
        return {"image": self.read(index, frame), **self.details(index)}

    def details(self, index: int) -> dict:
        """Keys: captions (tuple of str)."""
        return {"captions": self._captions(self._encoded[int(self._indices[index])])}

    def sizes(self) -> np.ndarray:
        """Return height and width of each upright image in pixels, int32 (n, 2); no image is read."""
        return self._sizes

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        return read_frame(self._stored(int(self._indices[index])), frame)

    def _stored(self, index: int) -> StoredImage:
        """Return an image's file by its index in the split."""
        return StoredImage(f"{self._place} {index}", bytes(self._encoded[index]["image"]))

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of the data set's name, configuration, version and split, and each index."""
        return [digest([*self._identity, int(index)]) for index in self._indices]

    def at_size(self, image_size: int) -> "TFDSSource":
        """Return the same examples at another size."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example; this reads all examples."""
        return [self._captions(self._encoded[int(index)]) for index in self._indices]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the data set's name, configuration and version, and of the split."""
        left_out = len(self._encoded) - len(self._indices)
        return digest([*self._identity, self._indices.tolist()] if left_out else self._identity)

    def _captions(self, example: dict) -> tuple[str, ...]:
        if self._caption_feature:
            values = np.atleast_1d(np.asarray(example[self._caption_feature], dtype=object))
            return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)
        if self._class_names:
            name = self._class_names[int(example["label"])].replace("_", " ")
            article = "an" if name[:1] in "aeiou" else "a"
            return (name, f"a photo of {article} {name}")
        return ()


def knows_name(name: str) -> bool:
    """Return whether the first word of a name is a data set of TFDS, or is prepared in its folder."""
    word = name.partition("/")[0].partition(":")[0]
    if not is_installed("tensorflow_datasets"):
        return False
    datasets = importlib.import_module("tensorflow_datasets")
    files = importlib.import_module("tensorflow_datasets.core.utils.file_utils")
    places = (Path(place) / word for place in files.list_data_dirs())
    if word == "emoji_captions" or any(map(Path.is_dir, places)):
        return True
    # Those of the community are in a place on the network, and their search imports TensorFlow.
    return word in datasets.list_builders(with_community_datasets=False)


def prepared_builder(name: str):
    """Return the TFDS builder of a data set; download and prepare the data set if necessary."""
    require("tensorflow_datasets", instead="give `emoji` or a folder with images")
    datasets = importlib.import_module("tensorflow_datasets")
    if name.partition("/")[0].partition(":")[0] == "emoji_captions":
        importlib.import_module("keras_sd.data.emoji.tfds_builder")  # registers the builder
    _refuse_foreign_features(name)
    try:
        builder = datasets.builder(name, file_format="array_record")
    except Exception as error:
        raise UserError(
            f"{name}: neither a folder nor a data set that TFDS knows ({_line(error)}); give `emoji`, the "
            "path of a folder with images, or a TFDS name such as oxford_flowers102"
        ) from error
    try:
        builder.download_and_prepare()
    except ImportError as error:  # some data sets need a package of their own to be read
        raise UserError(
            f"data set {name}: a Python package is missing ({_line(error)}); install "
            f"{error.name or 'the package'}, or give `emoji` or a folder with images"
        ) from error
    except Exception as error:
        raise UserError(
            f"data set {name}: cannot be downloaded and prepared ({_line(error)}); connect to the network, "
            "or set TFDS_DATA_DIR to the folder that holds it prepared"
        ) from error
    return builder


def _refuse_foreign_features(name: str) -> None:
    """Raise a UserError if a prepared data set's files name feature classes outside TFDS.

    TFDS would import their modules, which could be files in the current folder.
    """
    word = name.partition("/")[0].partition(":")[0]
    files = importlib.import_module("tensorflow_datasets.core.utils.file_utils")
    for place in files.list_data_dirs():
        for path in sorted((Path(place) / word).glob("**/features.json")) if word else ():
            names = _class_names(read_json(path))
            foreign = [one for one in names if "." in one and not one.startswith(_OWN)]
            if foreign:
                raise UserError(
                    f"data set {name}: {path} names the feature {foreign[0][:80]!r}, which is not TFDS' own; "
                    "do not use it"
                )


def _class_names(values) -> Iterator[str]:
    """Yield the names of Python classes in a `features.json`, at any depth."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from (value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str))
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
