"""Clipping and dynamic thresholding of predicted samples."""

from keras import ops


def limited(sample, clip_range=None, ratio=None, largest=None):
    """Return a predicted sample, clipped or thresholded; unchanged by default.

    Args:
        sample: `(n, h, w, c)`.
        clip_range: the largest absolute value, or None.
        ratio, largest: for dynamic thresholding (Saharia et al., 2022, section 2.3). Each sample is clipped
            to the quantile `ratio` of its absolute values, limited to 1 to `largest`, and divided by it.
    """
    if ratio is not None:
        values = ops.sort(ops.reshape(ops.abs(sample), (sample.shape[0], -1)), axis=1)
        place = ratio * (values.shape[1] - 1)
        below = ops.floor(place)
        ends = [ops.take(values, ops.cast(index, "int32"), axis=1) for index in (below, ops.ceil(place))]
        quantile = ends[0] + (place - below) * (ends[1] - ends[0])
        bound = ops.minimum(ops.maximum(quantile, 1.0), largest)[:, None, None, None]
        return ops.clip(sample, -bound, bound) / bound
    if clip_range is not None:
        return ops.clip(sample, -clip_range, clip_range)
    return sample
