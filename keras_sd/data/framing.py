"""How images become the arrays of a batch: resized and cropped to the size of a bucket, and flipped."""

import copy
import dataclasses
import functools
from typing import Any, Self

import numpy as np

from keras_sd.data import buckets
from keras_sd.data.buckets import Size
from keras_sd.data.chosen_source import ChosenSource
from keras_sd.errors import UserError

CROPS = ("center", "random")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "nearest")

_NAMED = 3  # an error names so many images
_VERSION = 1  # of the pixels that a frame names; encodings that are kept depend on it


@dataclasses.dataclass(frozen=True)
class Frame:
    """What is taken of one image: a part of it, resized.

    Attributes:
        original: height and width of the whole upright image, in pixels.
        box: top, left, bottom and right of the part, in pixels of the upright image; fractions count.
        size: height and width in pixels that the part is resized to.
        flip: whether the result is mirrored, left to right.
        interpolation: one of `INTERPOLATIONS`.
    """

    original: Size
    box: tuple[float, float, float, float]
    size: Size
    flip: bool = False
    interpolation: str = "lanczos"

    @property
    def scale(self) -> float:
        """Pixels of the image, along a side, for a pixel of the result."""
        top, left, bottom, right = self.box
        return min((bottom - top) / self.size[0], (right - left) / self.size[1])

    def key(self) -> str:
        """Return a text that names all of the frame that affects the pixels."""
        box = ",".join(f"{side:.17g}" for side in self.box)
        height, width = self.size
        flipped = " flipped" if self.flip else ""
        return f"{_VERSION} {height}x{width} of {box} {self.interpolation}{flipped}"


def frame_of(
    original: Size,
    size: Size,
    interpolation: str = "lanczos",
    shift: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Frame:
    """Return the frame of the largest part of an image that has the ratio of `size`.

    Args:
        original: height and width of the upright image, in pixels.
        size: height and width of the result, in pixels.
        shift: where the part lies along the height and the width: 0 at the top or left, 1 at the bottom or
            right, 0.5 in the middle.
    """
    height, width = original
    ratio = size[1] / size[0]
    if width / height == ratio:
        part_height, part_width = float(height), float(width)
    elif width / height > ratio:
        part_height, part_width = float(height), ratio * height
    else:
        part_height, part_width = width / ratio, float(width)
    top, left = (height - part_height) * shift[0], (width - part_width) * shift[1]
    box = (top, left, min(top + part_height, float(height)), min(left + part_width, float(width)))
    return Frame((int(height), int(width)), box, size, flip, interpolation)


@dataclasses.dataclass(frozen=True)
class Framing:
    """How all images of a run are framed.

    Attributes:
        resolution: side in pixels of a square, whose area all buckets have.
        crop: "center" or "random", where images are cropped that are not of their bucket's ratio.
        random_flip: whether half of the images are mirrored.
        interpolation: one of `INTERPOLATIONS`.
        aspect_ratio_buckets: the largest number of sizes; 1 crops all images to squares.
        bucket_upscale: whether images that are smaller than their bucket are enlarged. Otherwise such an
            image is an error: every bucket has the same area, so no other bucket would take it, and sizes of
            a smaller area would depend on the images and be compiled besides. Squares alone are always
            enlarged where needed; a line tells how many.

    Raises:
        UserError: a value is out of range.
    """

    resolution: int
    crop: str = "center"
    random_flip: bool = False
    interpolation: str = "lanczos"
    aspect_ratio_buckets: int = 1
    bucket_upscale: bool = False

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"crop {self.crop!r}: unknown; use {' or '.join(CROPS)}")
        if self.interpolation not in INTERPOLATIONS:
            names = ", ".join(INTERPOLATIONS)
            raise UserError(f"interpolation {self.interpolation!r}: unknown; use one of {names}")
        if self.resolution < 1:
            raise UserError(f"resolution {self.resolution}: too small; give a multiple of 8")
        self.grid()

    def grid(self) -> list[Size]:
        """Return the sizes (height, width) of the buckets, in pixels."""
        if self.aspect_ratio_buckets == 1:
            return [(self.resolution, self.resolution)]  # also of a model whose size is no multiple of 8
        return buckets.bucket_grid(self.resolution, self.aspect_ratio_buckets)

    def of_squares(self) -> "Framing":
        """Return the same with the middle square of every image, which evaluations are made on."""
        return Framing(self.resolution, interpolation=self.interpolation)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the run that resumes it."""
        return dataclasses.asdict(self)


class SmallImages(UserError):
    """Images are smaller than their bucket, and are not to be enlarged.

    Attributes:
        indices: of the images, int (n,).
        names: of the first ones, with their sizes.
    """

    def __init__(self, message: str, indices: np.ndarray, names: str) -> None:
        super().__init__(message)
        self.indices, self.names = indices, names


def framed_source(
    source: Any, framing: Framing, smallest_bucket: int = 1, on_bad_sample: str = "error"
) -> "FramedSource":
    """Return a source with its images framed.

    Args:
        source, framing, smallest_bucket: as `FramedSource` takes them.
        on_bad_sample: "error", or "skip" leaves out images that are smaller than their bucket, with a note.

    Raises:
        UserError: images are too small, or all are.
    """
    left, first = source, None
    while True:  # fewer images may be in other buckets, as small buckets are merged
        try:
            framed = FramedSource(left, framing, smallest_bucket)
        except SmallImages as error:
            first = first or error
            if on_bad_sample != "skip" or len(error.indices) == len(left):
                raise first from None
            left = ChosenSource(left, np.setdiff1d(np.arange(len(left)), error.indices))
            continue
        if first is not None:
            framed.notes.append(
                f"{len(source) - len(left)} of {len(source)} images are smaller than their bucket, and are "
                f"left out: {first.names}"
            )
        return framed


def _framed(read, index, frame):
    """Return what a source reads of an image, or of its mask, flipped if the frame says so."""
    pixels = read(index, dataclasses.replace(frame, flip=False))
    return pixels[:, ::-1] if frame.flip else pixels


class FramedSource:
    """The examples of a source with their images framed: cropped and resized to the size of a bucket.

    Only `sizes()` of the source is read on construction. An image is read when it is accessed.

    Args:
        source: a source (`data.sources`).
        framing: how its images are framed.
        smallest_bucket: images that a bucket needs in an epoch, such as those of a batch, each counted as
            often as it is repeated; smaller buckets are merged into a neighbour.

    Attributes:
        bucket_sizes: sizes (height, width) of the buckets in use.
        buckets: index in `bucket_sizes` of each example's bucket, int (n,).
        merged: pairs of sizes: that of a bucket and that of the bucket that it was merged into.

    Raises:
        UserError: images are smaller than their bucket and may not be enlarged; or an option of the framing
            does not fit.
    """

    def __init__(self, source: Any, framing: Framing, smallest_bucket: int = 1) -> None:
        self.source, self.framing = source, framing
        self.notes: list[str] = []
        self._flip = False
        self._sizes = np.asarray(source.sizes()).reshape(-1, 2)
        grid = framing.grid()
        self._smallest_bucket = smallest_bucket
        places = buckets.assign(self._sizes, grid)
        places, merged = buckets.merge_small(places, grid, smallest_bucket, self.repeats())
        self.merged = [(grid[small], grid[large]) for small, large in merged]
        used, self.buckets = np.unique(places, return_inverse=True)
        self.bucket_sizes = [grid[place] for place in used]
        self._refuse_small()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example with the middle of its image, uint8 (height, width, 3) of its bucket."""
        return self._example(index, self.frame(index))

    def _example(self, index, frame):
        return {**self.source.details(index), "image": _framed(self.source.read, index, frame)}

    @property
    def has_masks(self) -> bool:
        """Whether `mask` gives the masks of images."""
        return bool(getattr(self.source, "has_masks", False))

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of `self[index]`, uint8 (height, width): of 255 the weight of each pixel."""
        return _framed(self.source.read_mask, index, self.frame(index))

    def mask_keys(self) -> list[str]:
        """Return a text for each image that names its mask's content."""
        return self.source.mask_keys()

    def frame(self, index: int) -> Frame:
        """Return the frame of `self[index]`."""
        return self._frame(index, flip=self._flip)

    def _frame(self, index, **options):
        size = self.bucket_sizes[self.buckets[index]]
        return frame_of(tuple(self._sizes[index].tolist()), size, self.framing.interpolation, **options)

    def draw_frame(self, index: int, generator: np.random.Generator) -> Frame:
        """Return a frame with a crop and a flip drawn from the generator, if the framing says so."""
        options: dict[str, Any] = {"flip": self._flip}
        if self.framing.crop == "random":
            options["shift"] = tuple(generator.random(2).tolist())
        if self.framing.random_flip:
            options["flip"] = bool(generator.random() < 0.5) != self._flip
        return self._frame(index, **options)

    def draw_example(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return an example with its image, and its `mask`, cropped and flipped as `draw_frame` says."""
        frame = self.draw_frame(index, generator)
        example = self._example(index, frame)
        return example | {"mask": _framed(self.source.read_mask, index, frame)} if self.has_masks else example

    def draw_image(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Return the image of `draw_example`, uint8 (height, width, 3)."""
        return self.draw_example(index, generator)["image"]

    def flipped(self) -> Self:
        """Return the same source with every image mirrored."""
        source = copy.copy(self)
        source._flip = not self._flip
        return source

    def squares(self) -> "FramedSource":
        """Return the same examples framed as `Framing.of_squares` says."""
        return FramedSource(self.source, self.framing.of_squares())

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example; no image is read."""
        return self.source.captions()

    def fingerprint(self) -> str:
        """Return the source's fingerprint, of the data without its framing."""
        return self.source.fingerprint()

    def frame_key(self, index: int) -> str:
        """Return a text that names all of the framing that affects the pixels of `self[index]`."""
        return self.frame(index).key()

    def content_keys(self) -> list[str]:
        """Return a SHA-256 of each image's content."""
        return self.source.content_keys()

    def repeats(self) -> np.ndarray | None:
        """Return how often an epoch shows each example; None for once."""
        return self.source.repeats() if hasattr(self.source, "repeats") else None

    @functools.cached_property
    def _frame_sizes(self):
        return np.array(self.bucket_sizes).reshape(-1, 2)[self.buckets]

    def cropped_share(self) -> float:
        """Return the mean share of the images' area that is cropped away."""
        return float(np.mean(buckets.cropped_shares(self._sizes, self._frame_sizes)))

    def _small(self):
        """Return the indices of the images that are enlarged, and the factors of all."""
        factors = buckets.enlargements(self._sizes, self._frame_sizes)
        if getattr(self.source, "is_drawn", False):
            factors = np.zeros_like(factors)
        return np.flatnonzero(factors > 1), factors

    def _refuse_small(self):
        framing = self.framing
        small, _ = self._small()
        if len(small) and framing.aspect_ratio_buckets > 1 and not framing.bucket_upscale:
            first = ", ".join(map(self._described, small[:_NAMED])) + (", ..." if len(small) > _NAMED else "")
            raise SmallImages(
                f"resolution {framing.resolution}: {len(small)} of {len(self)} images are smaller than their "
                f"bucket: {first}; enlarge them by `bucket_upscale=True`, leave them out by "
                "`on_bad_sample='skip'`, or lower `resolution`",
                small,
                first,
            )

    def _described(self, index):
        height, width = self._sizes[index]
        name = self.source.details(int(index)).get("path", f"image {index}")
        return f"{name} ({width} x {height})"

    def summary(self) -> list[str]:
        """Return lines that tell how the images fall into buckets, and what is cropped and enlarged.

        They name arguments, as errors do.
        """
        lines = list(self.notes)
        cropped = f"{self.cropped_share():.1%} of the images' area is cropped away"
        if self.framing.aspect_ratio_buckets > 1:
            counts = np.bincount(self.buckets, minlength=len(self.bucket_sizes))
            shown = ", ".join(
                f"{width} x {height}: {count}"
                for (height, width), count in zip(self.bucket_sizes, counts, strict=True)
            )
            batch = f"buckets for batches of {self._smallest_bucket}"
            lines.append(f"{batch}, width x height: images: {shown}; {cropped}")
        elif self.cropped_share() >= 0.001:
            side = self.framing.resolution
            lines.append(f"squares of {side} pixels: {cropped}; `aspect_ratio_buckets=9` crops less")
        for (height, width), (rows, columns) in self.merged:
            lines.append(
                f"bucket {width} x {height}: has fewer images in an epoch than a batch, so they go into "
                f"{columns} x {rows}"
            )
        if self.merged and len(self.bucket_sizes) == 1:
            lines.append(
                f"buckets have no effect, as all are merged for batches of {self._smallest_bucket}; give a "
                "smaller `train_batch_size`"
            )
        small, factors = self._small()
        if len(small):
            lines.append(
                f"{len(small)} of {len(self)} images are smaller than their frame and enlarged, the most by "
                f"{factors.max():.2g}: {self._described(np.argmax(factors))}"
            )
        return lines
