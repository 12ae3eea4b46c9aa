"""What a training run would see of a data set: counts, sizes, ratios, buckets, captions and duplicates."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_sd.data.framing import FramedSource

RATIO_EDGES = (0.5, 0.667, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
"""Width divided by height, between the classes of ratios."""

_PAIRS = 10  # of duplicates that are named
_BLOCK = 1024


@dataclasses.dataclass
class Survey:
    """The figures of a data set.

    Attributes:
        name: the data set.
        sizes: (height, width) of each image, int (n, 2).
        repeats: how often an epoch shows each image, int (n,).
        buckets: lines about buckets and what is cropped away.
        captions: number of captions of each image, int (n,).
        tokens: tokens of each distinct caption, without begin and end, int.
        cut: how many of these captions lose their end.
        room: the most tokens of a caption.
        equal: groups of images of the same content, by their names.
        similar: pairs of names and their similarity, the most similar first; None if not measured.
    """

    name: str
    sizes: npt.NDArray[np.int32]
    repeats: npt.NDArray[np.int64]
    buckets: list[str]
    captions: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    cut: int
    room: int
    equal: list[list[str]]
    similar: list[tuple[str, str, float]] | None = None

    def ratio_counts(self) -> dict[str, int]:
        """Return the number of images in each class of ratios, width to height."""
        ratios = self.sizes[:, 1] / self.sizes[:, 0]
        counts = np.bincount(np.digitize(ratios, RATIO_EDGES), minlength=len(RATIO_EDGES) + 1)
        first, *_, last = RATIO_EDGES
        pairs = zip(RATIO_EDGES, RATIO_EDGES[1:], strict=False)
        names = [f"below {first:g}", *(f"{low:g} to {high:g}" for low, high in pairs), f"from {last:g}"]
        return dict(zip(names, counts.tolist(), strict=True))

    def lines(self) -> list[str]:
        """Return the figures, a line each."""
        heights, widths = self.sizes.T
        lines = [f"{self.name}: {len(self.sizes)} images, {self.repeats.sum()} in an epoch"]
        lines.append(f"width: {_range(widths)}; height: {_range(heights)} pixels")
        ratios = ", ".join(f"{name}: {count}" for name, count in self.ratio_counts().items() if count)
        lines += [f"width / height: images: {ratios}", *self.buckets]
        if self.captions.any():
            lines.append(
                f"captions: {self.captions.sum()}, {len(self.tokens)} different; tokens: "
                f"{_range(self.tokens)}; {self.cut} are longer than {self.room} and lose their end"
            )
        if not self.equal:
            lines.append("no image is there twice")
        else:
            more = sum(map(len, self.equal)) - len(self.equal)
            groups = [" = ".join(group) for group in self.equal[:_PAIRS]]
            lines.append(f"the same image: {more} too many: {'; '.join(groups)}{_rest(self.equal)}")
        if self.similar is not None:
            pairs = [f"{one} ~ {other} ({value:.3f})" for one, other, value in self.similar[:_PAIRS]]
            shown = f": {'; '.join(pairs)}{_rest(self.similar)}" if pairs else ""
            lines.append(f"similar images: {len(self.similar)} pairs{shown}")
        return lines


def _range(values: npt.NDArray[Any]) -> str:
    if not len(values):
        return "none"
    return f"{values.min()} to {values.max()}, median {np.median(values):g}"


def _rest(groups: Sequence[Any]) -> str:
    return f"; and {len(groups) - _PAIRS} more" if len(groups) > _PAIRS else ""


def survey(name: str, source: FramedSource, tokens: Sequence[int], cut: int, room: int) -> Survey:
    """Return the figures of a framed source; each image's file is read once, for its hash.

    Args:
        name: the data set.
        source: the framed source.
        tokens: tokens of each distinct caption.
        cut: how many captions lose their end.
        room: the most tokens of a caption.
    """
    repeats = source.repeats()
    groups = collections.defaultdict(list)
    for index, key in enumerate(source.content_keys()):
        groups[key].append(index)
    return Survey(
        name,
        source.source.sizes(),
        np.ones(len(source), int) if repeats is None else np.asarray(repeats),
        source.summary(),
        np.array([len(captions) for captions in source.captions()], int),
        np.array(tokens, int),
        cut,
        room,
        [[name_of(source, index) for index in group] for group in groups.values() if len(group) > 1],
    )


def name_of(source: FramedSource, index: int) -> str:
    """Return the name of an example in lines: its file, or its number."""
    return source.source.details(index).get("path", f"image {index}")


def similar_pairs(vectors: npt.NDArray[np.float32], threshold: float) -> list[tuple[int, int, float]]:
    """Return pairs of rows whose cosine similarity reaches a threshold, the most similar first.

    Args:
        vectors: unit vectors, float32 (n, d).
        threshold: from -1 to 1.
    """
    pairs = []
    for start in range(0, len(vectors), _BLOCK):
        similarity = vectors[start : start + _BLOCK] @ vectors.T
        for row, column in zip(*np.nonzero(similarity >= threshold), strict=True):
            if start + row < column:
                pairs.append((start + int(row), int(column), float(similarity[row, column])))
    return sorted(pairs, key=lambda pair: -pair[2])
