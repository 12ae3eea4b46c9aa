"""Tiling of large images: a function is applied to overlapping tiles, and the results are blended."""

import numpy as np

from keras_sd.errors import UserError


def in_tiles(function, inputs, *, tile, overlap, scale):
    """Apply a function to overlapping tiles of its inputs and blend the results.

    All tiles have the same shape, so that a function is compiled once: the last tile of a row or column is
    moved inward. In an overlap, the weight of each tile falls linearly to its edge. The function cannot use
    values beyond a tile, so results near a seam differ slightly from those without tiles.

    Args:
        function: takes `(n, tile, tile, channels)` and returns `(n, scale * tile, scale * tile, ...)`, as
            tensors or arrays.
        inputs: NumPy array `(n, height, width, channels)`. A side shorter than `tile` is one tile.
        tile: side of a tile in input positions.
        overlap: smallest overlap of neighbouring tiles in input positions.
        scale: output positions per input position; 8 for decoding, 1 / 8 for encoding. Multiplied by `tile`,
            `overlap` and the sides of the inputs it must be a whole number.

    Returns:
        NumPy array `(n, scale * height, scale * width, ...)`, float32.

    Raises:
        UserError: a tile is not larger than the overlap, or a length is no whole number of output positions.
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
    """Return slices of length `tile` that cover a side; neighbours overlap by `overlap` or more."""
    if side <= tile:
        return [slice(0, side)]
    starts = (min(start, side - tile) for start in range(0, side - overlap, tile - overlap))
    return [slice(start, start + tile) for start in starts]


def _scaled(span, scale):
    return slice(round(span.start * scale), round(span.stop * scale))


def _canvas(inputs, part, scale):
    """Return zeros for the sum of the weighted tiles, and for the sum of their weights."""
    height, width = (round(side * scale) for side in inputs.shape[1:3])
    total = np.zeros((len(inputs), height, width, part.shape[-1]), "float32")
    return total, np.zeros((height, width, 1), "float32")


def _ramp(length, overlap):
    """Return weights along a side of a tile: 1 inside, falling linearly over `overlap` to each end."""
    distance = np.arange(length) + 0.5
    return np.minimum(1.0, np.minimum(distance, distance[::-1]) / max(overlap, 0.5))
