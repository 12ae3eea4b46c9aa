"""Nearest neighbours in pixels: which real image is most similar to a generated one?

No trained network is involved. Images are shrunk by area averaging, which tolerates a shift by a pixel but
not a wrong colour or outline, and compared by Euclidean distance over RGB.
"""

import numpy as np

from keras_sd.errors import UserError

_CHUNK = 1024


def nearest(queries, gallery, size=32):
    """Find for each query the closest gallery image.

    Args:
        queries: uint8 (n, h, w, 3).
        gallery: uint8 (m, h, w, 3); its images may have another size.
        size: side in pixels to which both are shrunk before the comparison.

    Returns:
        Indices (n,) into the gallery, the lowest one in a tie, and the distances (n,) in levels of 0 to 255.
    """
    queries, gallery = shrink(queries, size), shrink(gallery, size)
    gallery_norms = np.einsum("ij,ij->i", gallery, gallery)
    indices = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _CHUNK):
        chunk = queries[start : start + _CHUNK]
        # |q - g|² without the term |q|², which is the same for all candidates.
        scores = gallery_norms - 2.0 * (chunk @ gallery.T)
        indices[start : start + _CHUNK] = np.argmin(scores, axis=1)
    distances = np.linalg.norm(queries - gallery[indices], axis=1)
    return indices, distances


def top1(queries, gallery, labels, size=32):
    """Return the share of queries whose nearest gallery image is the right one, 0 to 1.

    `labels` (n,) are the gallery indices of the right images. Gallery images with identical pixels (such as
    some flags) count as one.
    """
    indices, _ = nearest(queries, gallery, size)
    same = first_of_identical(gallery)
    return float(np.mean(same[indices] == same[np.asarray(labels)]))


def first_of_identical(images):
    """Return for each image the index of the first image with identical pixels, (n,)."""
    seen = {}
    return np.array([seen.setdefault(np.asarray(image).tobytes(), i) for i, image in enumerate(images)])


def shrink(images, size):
    """Area-averages uint8 images (n, h, w, 3) to `size` and returns them as float64 rows (n, size·size·3)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise UserError(
            f"images of type {images.dtype} and shape {images.shape}: give uint8 of shape (n, h, w, 3)"
        )
    height, width = images.shape[1:3]
    if min(height, width) < size:
        raise UserError(f"images of {width}x{height} pixels: smaller than {size}x{size}; give larger ones")
    rows, columns = _area_weights(height, size), _area_weights(width, size)
    shrunk = np.empty((len(images), size * size * 3))
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.float64)
        chunk = np.einsum("ph,nhwc->npwc", rows, chunk, optimize=True)
        chunk = np.einsum("qw,npwc->npqc", columns, chunk, optimize=True)
        shrunk[start : start + _CHUNK] = chunk.reshape(len(chunk), -1)
    return shrunk


def _area_weights(source, target):
    """Return the area weights of `source` pixels in `target` larger ones: (target, source), rows sum to 1."""
    edges = np.arange(target + 1) * (source / target)
    starts, ends = edges[:-1, None], edges[1:, None]
    pixels = np.arange(source)[None, :]
    overlap = np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0.0, 1.0)
    return overlap * (target / source)
