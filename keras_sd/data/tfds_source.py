"""Random access to TensorFlow Datasets, read without TensorFlow where their files allow it."""

import copy
import functools
import importlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from keras_sd.data.faults import first_line
from keras_sd.data.folders import digest
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import framed
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

    Raises:
        UserError: TFDS or the data set is missing, or it has no such split, no images or no captions.
    """

    def __init__(self, name: str, split: str, image_size: int, need_captions: bool = True):
        self.image_size = image_size
        builder = prepared_builder(name)
        features = builder.info.features
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise UserError(f"data set {name}: no split {split!r}; it has {splits}")
        if "image" not in features or getattr(features["image"], "shape", ())[-1:] not in ((1,), (3,), (4,)):
            raise UserError(f"data set {name}: no feature 'image'; choose a data set of images")
        self._caption_feature = next((key for key in _CAPTION_FEATURES if key in features), None)
        self._class_names = getattr(features["label"], "names", None) if "label" in features else None
        if need_captions and not self._caption_feature and not self._class_names:
            raise UserError(f"data set {name}: neither captions nor classes; choose one with captions")
        self._identity = ["tfds", builder.info.full_name, split]
        self._examples = builder.as_data_source(split=split)
        # Reading captions or sizes decodes no image.
        decoding = importlib.import_module("tensorflow_datasets").decode
        decoders = {"image": decoding.SkipDecoding()}
        self._encoded = builder.as_data_source(split=split, decoders=decoders)
        self._shape = features["image"].shape
        self._sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions (tuple of str)."""
        example = self._examples[index]
        image = _image(example)
        frame = frame_of((image.height, image.width), (self.image_size, self.image_size))
        return {"image": framed(image, frame), "captions": self._captions(example)}

    def details(self, index: int) -> dict:
        """Keys: captions (tuple of str)."""
        return {"captions": self._captions(self._encoded[index])}

    def sizes(self) -> np.ndarray:
        """Return height and width in pixels of each image, int (n, 2); this reads all examples once."""
        if self._sizes is None:
            shape = self._shape[:2]
            if None in shape:
                self._sizes = np.array(
                    [_encoded_size(example["image"]) for example in self._encoded], "int32"
                )
            else:
                self._sizes = np.broadcast_to(np.array(shape, "int32"), (len(self), 2))
        return self._sizes

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        return framed(_image(self._examples[index]), frame)

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of the data set's name, configuration, version and split, and each index."""
        return [digest([*self._identity, index]) for index in range(len(self))]

    def at_size(self, image_size: int) -> "TFDSSource":
        """Return the same examples at another size."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example; this reads all examples."""
        return [self._captions(self._encoded[index]) for index in range(len(self))]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the data set's name, configuration and version, and of the split."""
        return digest(self._identity)

    def _captions(self, example: dict) -> tuple[str, ...]:
        if self._caption_feature:
            values = np.atleast_1d(np.asarray(example[self._caption_feature], dtype=object))
            return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)
        if self._class_names:
            name = self._class_names[int(example["label"])].replace("_", " ")
            article = "an" if name[:1] in "aeiou" else "a"
            return (name, f"a photo of {article} {name}")
        return ()


def _image(example: dict) -> Image.Image:
    pixels = np.asarray(example["image"])
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _encoded_size(encoded: bytes) -> tuple[int, int]:
    """Return height and width of an encoded image, of which only the header is read."""
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        return image.height, image.width


def knows_name(name: str) -> bool:
    """Return whether the first word of a name is a data set of TFDS, or is prepared in its folder."""
    word = name.partition("/")[0].partition(":")[0]
    if not is_installed("tensorflow_datasets"):
        return False
    datasets = importlib.import_module("tensorflow_datasets")
    files = importlib.import_module("tensorflow_datasets.core.utils.file_utils")
    places = (Path(place) / word for place in files.list_data_dirs())
    return word == "emoji_captions" or word in datasets.list_builders() or any(map(Path.is_dir, places))


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
