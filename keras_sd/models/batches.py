"""Batches of equal shapes, since programs are compiled for each shape."""

import math

import numpy as np
from keras import ops

# Prompts of several lengths are repeated to a common one, so that one program serves them all, up to this
# number of chunks of tokens: 12 is the least common multiple of 1 to 4. Beyond it each length has a program
# of its own.
MOST_CHUNKS = 12


def equal_batches(count, limit):
    """Return the indices 0 to count - 1 in equal batches of at most `limit`.

    The last index is repeated to fill the last batch.
    """
    size = -(-count // -(-count // limit))
    return [padded_indices(start, size, count) for start in range(0, count, size)]


def padded_indices(start, size, count):
    """Return `size` indices from `start` on; from `count` on the last index, count - 1, is repeated."""
    return np.minimum(np.arange(start, start + size), count - 1)


def in_batches(function, inputs, limit):
    """Return a compiled function of an array as a NumPy array, computed in `equal_batches`."""
    batches = equal_batches(len(inputs), limit)
    return np.concatenate([ops.convert_to_numpy(function(inputs[batch])) for batch in batches])[: len(inputs)]


def batches_of_lengths(lengths, limit, chunk):
    """Return batches of images whose prompts have different lengths.

    Args:
        lengths: number of tokens of each image's prompts; they can be repeated to a multiple of it.
        limit: the largest number of images in a batch.
        chunk: tokens in a chunk.

    Returns:
        A list of (indices, number of tokens that the batch's prompts are repeated to). Each index occurs at
        least once.
    """
    common = math.lcm(*lengths)
    if common <= MOST_CHUNKS * chunk:
        return [(batch, common) for batch in equal_batches(len(lengths), limit)]
    lengths = np.asarray(lengths)
    places = {int(length): np.flatnonzero(lengths == length) for length in sorted(set(lengths.tolist()))}
    return [
        (indices[batch], length)
        for length, indices in places.items()
        for batch in equal_batches(len(indices), limit)
    ]
