"""Sources of captioned images, and the input pipeline over them.

A source is a random-access sequence of dictionaries with `image`, uint8 (height, width, 3), and `captions`, a
tuple of str. `batches` turns a source into an endless Grain data set whose order and random draws are
functions of (seed, position) alone.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import numpy as np

from keras_sd.data.emoji import load_emoji
from keras_sd.data.folders import FolderSource
from keras_sd.data.tfds_source import TFDSSource, prepared_builder
from keras_sd.errors import UserError


class EmojiSource:
    """One split of the emoji pictures, kept in memory once read.

    Args:
        split: "train" or "validation".
        image_size: side of the pictures.
        style: "twemoji" or "openmoji": whose pictures.
    """

    def __init__(self, split: str = "train", image_size: int = 64, style: str = "twemoji"):
        self.emoji = [emoji for emoji in load_emoji() if emoji.split == split]
        if not self.emoji:
            raise UserError(f"data set emoji: no split {split!r}; it has train, validation")
        self.image_size = image_size
        self.style = style
        self._images = [None] * len(self.emoji)

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> dict:
        """Keys: image uint8 (image_size, image_size, 3), captions, code, concept."""
        emoji = self.emoji[index]
        if self._images[index] is None:
            self._images[index] = emoji.load(self.image_size, self.style)
        return {
            "image": self._images[index],
            "captions": emoji.captions,
            "code": emoji.code,
            "concept": emoji.concept,
        }

    def repeats(self, base: int = 4) -> np.ndarray:
        """How often an epoch shows each picture: base concepts `base` times, their variants once."""
        return np.asarray([base if emoji.code == emoji.concept else 1 for emoji in self.emoji])


# Data sets that come with packages, and in whose style they are drawn.
_EMOJI = {"emoji": "twemoji", "openmoji": "openmoji"}


def available_splits(name_or_path: str) -> tuple[str, ...]:
    """The splits that `load_source` offers: "train" and, if images are held out, "validation"."""
    if name_or_path in _EMOJI:
        return ("train", "validation")
    path = Path(name_or_path)
    if path.is_dir():
        return ("train", "validation") if (path / "validation").is_dir() else ("train",)
    return tuple(prepared_builder(name_or_path).info.splits)


def load_source(
    name_or_path: str, split: str, image_size: int, need_captions: bool = True
) -> EmojiSource | FolderSource | TFDSSource:
    """Open and check a source of images.

    Args:
        name_or_path: "emoji", "openmoji" (the same emoji in another style), an existing folder, or the name
            of a TFDS data set.
        split: "train" or "validation". In a folder each may be a sub-folder of that name; without a
            sub-folder `train` the folder itself is the training split.
        image_size: side of the square that images are cropped and resized to.
        need_captions: False opens images that have no captions.

    Raises:
        UserError: the source is missing, empty or damaged, or has no such split.
    """
    if name_or_path in _EMOJI:
        return EmojiSource(split, image_size, _EMOJI[name_or_path])
    path = Path(name_or_path)
    if path.is_dir():
        if split == "train" and not (path / split).is_dir():
            return FolderSource(path, image_size, need_captions)
        if not (path / split).is_dir():
            raise UserError(f"{path}: no sub-folder {split!r}; put held-out images into {path / split}")
        return FolderSource(path / split, image_size, need_captions)
    if not re.fullmatch(r"[a-z]\w*(/[\w.-]+)?(:[\d.*]+)?", name_or_path):  # not of the form of a TFDS name
        raise UserError(
            f"{name_or_path}: no such folder; give a folder with images, `emoji`, `openmoji` or a TFDS name"
        )
    return TFDSSource(name_or_path, split, image_size, need_captions)


def batches(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    draw: Callable[[dict, np.random.Generator], dict],
    start: int = 0,
    shuffle: bool = True,
    repeats: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Endless batches of `draw(example, generator)`, stacked to arrays (batch_size / process_count, ...).

    Position p of the stream, counted over all batches from the very first one, has an example and a generator
    (NumPy's Philox with a key made from `seed` and counter p) that depend on (seed, p) only. Thus batches do
    not depend on `start`, on the number of processes or of threads, or on what was drawn before.

    Args:
        source: random-access examples.
        batch_size: examples in a batch over all processes.
        seed: of order and draws, from 0 to 2**32 - 1.
        draw: turns an example into a dictionary of arrays, all their randomness from the generator, which is
            valid during the call only. Called from several threads.
        start: number of the first batch, as when a run is resumed; costs nothing.
        shuffle: every epoch in a permutation of its own, else in the source's order.
        repeats: how often an epoch shows each example; once by default.
        process_index: which of the contiguous slices of each batch this process reads.
        process_count: number of processes; divides `batch_size`.

    Raises:
        UserError: an empty source, or a batch size or seed that cannot be.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size}: not a positive multiple of {process_count} processes; change it"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: out of range; give one from 0 to {2**32 - 1}")
    order = np.repeat(np.arange(len(source)), 1 if repeats is None else repeats)
    if not len(order):
        raise UserError("data set: no examples; give one with images")

    # Threads that read ahead are in two epochs at a time. Grain's own shuffling is made for large data sets:
    # to find the next of four examples takes it five milliseconds.
    @functools.lru_cache(maxsize=2)
    def order_of(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(order) if shuffle else order

    def example(position: int, generator: np.random.Generator) -> dict:
        epoch, place = divmod(position, len(order))
        return draw(source[int(order_of(epoch)[place])], generator)

    # As good as endless; Grain's own endless repetition is too long for batches of one.
    dataset = grain.MapDataset.range(2**60).random_map(example, seed=seed)
    # Slices of all processes are batches of one stream: process i reads number i, n + i, 2 n + i, ...
    dataset = dataset.batch(batch_size // process_count)
    dataset = dataset[start * process_count + process_index :: process_count]
    threads = min(8, os.cpu_count() or 1)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
