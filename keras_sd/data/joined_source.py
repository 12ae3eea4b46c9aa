"""The examples of several sources as one source, with repeats or weights."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sd.data.captions import Captions
from keras_sd.data.dataset_config import DatasetConfig
from keras_sd.data.folders import digest
from keras_sd.data.framing import Frame
from keras_sd.data.masks import mask_keys, read_mask

_PARTS = 20  # the smallest repeats of weighted sources, so that shares are within a few percent


class ConfiguredSource:
    """The examples of the sources of a `dataset_config.DatasetConfig`, one after the other.

    Args:
        config: the configuration.
        sources: the source of each of its subsets.

    Attributes:
        notes: what the user should know of the data, each in a line.
    """

    def __init__(self, config: DatasetConfig, sources: Sequence[Any]) -> None:
        self.config, self.sources = config, list(sources)
        self.notes = [note for source in sources for note in getattr(source, "notes", ())]
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Any, int]:
        """Return the source of an example, and the example's index in it."""
        if not 0 <= index < len(self):
            raise IndexError("out of range")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[number], index - int(self._starts[number])

    def __getitem__(self, index: int) -> dict:
        """Return the example of its source."""
        source, place = self._find(index)
        return source[place]

    def details(self, index: int) -> dict:
        """Return what the source tells of the example; no image is read."""
        source, place = self._find(index)
        return source.details(place)

    def read(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        source, place = self._find(index)
        return source.read(place, frame)

    @property
    def has_masks(self) -> bool:
        """Whether one of the sources has masks; in the others all of an image counts."""
        return any(getattr(source, "has_masks", False) for source in self.sources)

    def read_mask(self, index: int, frame: Frame) -> np.ndarray:
        """Return what a frame takes of an image's mask, uint8 (height, width)."""
        source, place = self._find(index)
        return read_mask(source, place, frame)

    def mask_keys(self) -> list[str]:
        """Return a text for each image that names its mask's content."""
        return [key for source in self.sources for key in mask_keys(source)]

    def sizes(self) -> np.ndarray:
        """Return (height, width) of each upright image in pixels, int (n, 2)."""
        return np.concatenate([source.sizes() for source in self.sources])

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of each image's content."""
        return [key for source in self.sources for key in source.content_keys()]

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example."""
        return [captions for source in self.sources for captions in source.captions()]

    def caption_rules(self) -> list[Captions] | None:
        """Return how the captions of each example are drawn; None if all are fixed."""
        if all(subset.captions.is_fixed for subset in self.config.subsets):
            return None
        pairs = zip(self.config.subsets, self.sources, strict=True)
        return [subset.captions for subset, source in pairs for _ in range(len(source))]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the sources' fingerprints."""
        return digest(["joined", [source.fingerprint() for source in self.sources]])

    def repeats(self) -> np.ndarray:
        """Return how often an epoch shows each image, int (n,).

        Weights become the nearest repeats, of which the smallest is 20, so that shares are right to 3 %.
        """
        own = [_repeats(source) for source in self.sources]
        if self.config.subsets[0].weight is None:
            factors = [subset.num_repeats for subset in self.config.subsets]
        else:
            shares = [subset.weight / one.sum() for subset, one in zip(self.config.subsets, own, strict=True)]
            factors = [round(_PARTS * share / min(shares)) for share in shares]
            factors = [factor // np.gcd.reduce(factors) for factor in factors]
        return np.concatenate([factor * one for factor, one in zip(factors, own, strict=True)])

    def at_size(self, image_size: int) -> "ConfiguredSource":
        """Return the same examples at another size."""
        source = copy.copy(self)
        source.sources = [one.at_size(image_size) for one in self.sources]
        return source


def _repeats(source: Any) -> np.ndarray:
    repeats = source.repeats() if hasattr(source, "repeats") else None
    return np.ones(len(source), int) if repeats is None else np.asarray(repeats)
