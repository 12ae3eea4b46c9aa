"""A part of the examples of a source."""

import copy
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_sd.data.captions import Captions

if TYPE_CHECKING:
    from keras_sd.data.framing import Frame


class ChosenSource:
    """Some examples of a source, as a source.

    Args:
        source: the source.
        indices: the examples, in order, int (n,).

    Attributes:
        notes: what the user should know of the data, each in a line.
        is_drawn: whether its images are drawn at any size.
    """

    def __init__(self, source: Any, indices: np.ndarray) -> None:
        self.source, self._indices = source, indices
        self.is_drawn = getattr(source, "is_drawn", False)
        self.notes = [*getattr(source, "notes", ()), f"{len(indices)} of {len(source)} examples are taken"]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        """Return the example of the source."""
        return self.source[int(self._indices[index])]

    def details(self, index: int) -> dict:
        """Return what the source tells of the example; no image is read."""
        return self.source.details(int(self._indices[index]))

    def read(self, index: int, frame: "Frame") -> np.ndarray:
        """Return what a frame takes of an image, uint8 (height, width, 3)."""
        return self.source.read(int(self._indices[index]), frame)

    @property
    def has_masks(self) -> bool:
        """Whether `read_mask` gives the masks of images."""
        return bool(getattr(self.source, "has_masks", False))

    def read_mask(self, index: int, frame: "Frame") -> np.ndarray:
        """Return what a frame takes of an image's mask, uint8 (height, width)."""
        return self.source.read_mask(int(self._indices[index]), frame)

    def mask_keys(self) -> list[str]:
        """Return a text for each image that names its mask's content."""
        return self._of(self.source.mask_keys())

    def sizes(self) -> np.ndarray:
        """Return (height, width) of each upright image in pixels, int (n, 2)."""
        return np.asarray(self.source.sizes())[self._indices]

    def content_keys(self) -> list[str]:
        """Return the SHA-256 of each image's content."""
        return self._of(self.source.content_keys())

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example."""
        return self._of(self.source.captions())

    def caption_rules(self) -> list[Captions] | None:
        """Return how the captions of each example are drawn; None if all are fixed or of one rule."""
        rules = self.source.caption_rules() if hasattr(self.source, "caption_rules") else None
        return None if rules is None else self._of(rules)

    def repeats(self) -> np.ndarray | None:
        """Return how often an epoch shows each image; None: once."""
        repeats = self.source.repeats() if hasattr(self.source, "repeats") else None
        return None if repeats is None else np.asarray(repeats)[self._indices]

    def fingerprint(self) -> str:
        """Return a SHA-256 of the source's fingerprint and of what is taken."""
        described = json.dumps([self.source.fingerprint(), self._indices.tolist()])
        return hashlib.sha256(f"chosen {described}".encode()).hexdigest()

    def at_size(self, image_size: int) -> "ChosenSource":
        """Return the same examples at another size."""
        source = copy.copy(self)
        source.source = self.source.at_size(image_size)
        return source

    def _of(self, values: list[Any]) -> list[Any]:
        return [values[index] for index in self._indices]


def chosen(source: Any, most: int | None, seed: int) -> Any:
    """Return a source of at most so many of the examples, in their order, which the seed chooses."""
    if most is None or len(source) <= most:
        return source
    return ChosenSource(source, np.sort(np.random.default_rng(seed).permutation(len(source))[:most]))
