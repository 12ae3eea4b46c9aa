"""Aspect-ratio buckets: a few image sizes of equal area, and which of them an image goes into.

A batch holds images of one bucket, so a training step is compiled once for each bucket. The grid of sizes is
a function of the resolution and the number of buckets alone: an added image changes the bucket of no other.
The idea is that of NovelAI (2022).
"""

import numpy as np

from keras_sd.errors import UserError

LARGEST_RATIO = 2.0
"""Width by height of the widest bucket; the narrowest has its inverse."""

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_grid(resolution: int, count: int) -> list[Size]:
    """Return the sizes (height, width) of at most `count` buckets, from the narrowest to the widest.

    Ratios are spaced evenly by their logarithm from 1:2 to 2:1. The square has exactly the side `resolution`,
    and no bucket has a larger area, so none needs more memory. An even `count` gives one bucket fewer, as the
    square, the most frequent shape, is always among them. At low resolutions some ratios may have one size.

    Sides are multiples of 8 at 128 pixels, 16 at 256, 32 at 512, and 64 from 1024. On images whose ratios are
    log-uniform between 1:2 and 2:1, nine buckets then crop 4.1 to 4.5 % of the area away; multiples of 64 at
    512 pixels crop 5.6 %, and multiples of 8 at 512 pixels 4.3 %. Larger multiples leave more levels of the
    UNet with even sides.

    Args:
        resolution: side in pixels of the square, a multiple of 8.
        count: the largest number of buckets; 1 gives the square alone.

    Raises:
        UserError: an argument is out of range.
    """
    if resolution < 8 or resolution % 8:
        raise UserError(f"resolution {resolution}: does not fit; give a multiple of 8")
    if count < 1:
        raise UserError(f"aspect_ratio_buckets {count}: too few; give 1 (squares alone) or more")
    multiple = _multiple(resolution)
    each_side = (count - 1) // 2
    square = (resolution, resolution)
    wide = {
        _size(resolution, LARGEST_RATIO ** (step / each_side), multiple) for step in range(1, each_side + 1)
    }
    narrow = {(width, height) for height, width in wide}
    return sorted({square} | wide | narrow, key=lambda size: size[1] / size[0])


def _multiple(resolution):
    """Return the multiple of a bucket's sides: a sixteenth of the resolution, as a power of two."""
    return next((multiple for multiple in (64, 32, 16) if multiple * 16 <= resolution), 8)


def _size(resolution, ratio, multiple):
    """Return the size of the nearest ratio whose sides are multiples next to the exact ones."""
    width, height = resolution * ratio**0.5, resolution / ratio**0.5
    fitting = [
        (rows, columns)
        for rows in _around(height, multiple)
        for columns in _around(width, multiple)
        if rows * columns <= resolution**2
    ]
    return min(fitting, key=lambda size: (abs(np.log(size[1] / size[0] / ratio)), -size[0] * size[1]))


def _around(side, multiple):
    below = max(int(side // multiple), 1) * multiple
    return below, below + multiple


def assign(sizes: np.ndarray, grid: list[Size]) -> np.ndarray:
    """Return the index in the grid of the bucket that crops least of each image, int (n,).

    Args:
        sizes: height and width of each image, int (n, 2).
        grid: as `bucket_grid` returns it, from the narrowest to the widest.
    """
    ratios = _log_ratios(grid)
    # The share that is cropped away grows with the distance of the logarithms.
    return np.searchsorted((ratios[1:] + ratios[:-1]) / 2, _log_ratios(sizes))


def cropped_shares(sizes: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return the share of each image's area that is cropped away, float (n,).

    Args:
        sizes: height and width of each image, int (n, 2).
        frames: height and width that each image is resized and cropped to, int (n, 2).
    """
    return 1 - np.exp(-np.abs(_log_ratios(sizes) - _log_ratios(frames)))


def enlargements(sizes: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return the factor by which each image's sides are scaled to cover its frame, float (n,)."""
    return np.max(np.asarray(frames, float) / np.asarray(sizes, float), axis=1)


def _log_ratios(sizes):
    heights, widths = np.asarray(sizes, float).reshape(-1, 2).T
    return np.log(widths / heights)


def merge_small(
    buckets: np.ndarray, grid: list[Size], smallest: int, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Move the images of buckets that an epoch shows fewer than `smallest` images of into a neighbour.

    The smallest bucket goes first, into its neighbour of the nearest ratio among those in use, until every
    bucket in use has enough images, or one bucket is left.

    Args:
        buckets: index in the grid of each image's bucket, int (n,).
        smallest: images that a bucket needs, such as those of a batch.
        repeats: how often an epoch shows each image, and so how often it counts, int (n,); by default once.

    Returns:
        The new buckets, and the pairs of a bucket and the one that it was merged into.
    """
    buckets, merged = np.array(buckets), []
    ratios = _log_ratios(grid)
    while True:
        used = np.unique(buckets)
        counts = np.bincount(buckets, repeats, minlength=len(grid))
        if len(used) < 2 or counts[used].min() >= smallest:
            return buckets, merged
        small = used[np.argmin(counts[used])]
        others = used[used != small]
        nearest = others[np.argmin(np.abs(ratios[others] - ratios[small]))]
        buckets[buckets == small] = nearest
        merged.append((int(small), int(nearest)))
