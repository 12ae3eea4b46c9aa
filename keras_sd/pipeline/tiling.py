"""Large images in parts: a function of images on overlapping tiles, whose results are blended."""

import numpy as np

from keras_sd.errors import UserError


def in_tiles(function, inputs, *, tile, overlap, scale):
    """Applies a function to overlapping tiles of its inputs and blends what it returns.

    All tiles have one shape, so a compiled function is compiled once; the last tile of a row or column is
    moved inward to end where the inputs end. Where tiles overlap, the weight of each falls linearly to its
    edge. Tiles see no further than their edges: outputs near a seam are a blend of two that differ by what
    the function takes from further away.

    Args:
        function: takes `(n, tile, tile, channels)` and returns `(n, scale * tile, scale * tile, ...)`, as
            tensors or arrays.
        inputs: NumPy array `(n, height, width, channels)`. A side shorter than `tile` is one tile.
        tile: side of a tile in positions of the inputs.
        overlap: positions that neighbouring tiles share at least.
        scale: positions of the outputs to one of the inputs; 8 for decoding, 1 / 8 for encoding. It times
            `tile`, `overlap` and the sides of the inputs must be whole numbers.

    Returns:
        NumPy array `(n, scale * height, scale * width, ...)`, float32.

    Raises:
        UserError: a tile is no larger than its overlap, or a length is no whole number of output positions.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tiles of {tile} cannot overlap by {overlap}; make them larger than their overlap")
    for length in (*inputs.shape[1:3], tile, overlap):
        if length * scale % 1:
            raise UserError(f"tiles: a side of {length} does not fit; give a multiple of {1 / scale:g}")
    rows, columns = (_spans(side, tile, overlap) for side in inputs.shape[1:3])
    total = weights = None
    for row in rows:
        for column in columns:
            part = np.asarray(function(inputs[:, row, column]), "float32")
            if total is None:
                total, weights = _canvas(inputs, part, scale)
            place = (slice(None), _scaled(row, scale), _scaled(column, scale))
            ramps = (_ramp(length, int(overlap * scale)) for length in part.shape[1:3])
            weight = np.multiply.outer(*ramps).astype("float32")[:, :, None]
            total[place] += part * weight
            weights[place[1:]] += weight
    return total / weights


def _spans(side, tile, overlap):
    """Slices of length `tile` that cover a side, each sharing at least `overlap` with the one before."""
    if side <= tile:
        return [slice(0, side)]
    starts = (min(start, side - tile) for start in range(0, side - overlap, tile - overlap))
    return [slice(start, start + tile) for start in starts]


def _scaled(span, scale):
    return slice(round(span.start * scale), round(span.stop * scale))


def _canvas(inputs, part, scale):
    """Zeros for the sum of the weighted tiles, and for the sum of their weights."""
    height, width = (round(side * scale) for side in inputs.shape[1:3])
    total = np.zeros((len(inputs), height, width, part.shape[-1]), "float32")
    return total, np.zeros((height, width, 1), "float32")


def _ramp(length, overlap):
    """Weights along one side of a tile: 1 inside, falling linearly over `overlap` positions to each end."""
    distance = np.arange(length) + 0.5
    return np.minimum(1.0, np.minimum(distance, distance[::-1]) / max(overlap, 0.5))
