"""How images are dealt out to calls of compiled programs, which are compiled for each shape."""

import math

import numpy as np
from keras import ops

# The most chunks of tokens that prompts of several lengths are repeated to, so that one program draws them
# all: 12 are the least common multiple of 1 to 4. Beyond it each length has a program of its own.
MOST_CHUNKS = 12


def equal_batches(count, limit):
    """Indices 0 to count - 1 in equal batches of at most `limit`; the last index fills up the last batch.

    Equal, as each size of a batch is compiled for itself.
    """
    size = -(-count // -(-count // limit))
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def in_batches(function, inputs, limit):
    """Return what a compiled function makes of an array, as NumPy's, computed in `equal_batches` of it."""
    batches = equal_batches(len(inputs), limit)
    return np.concatenate([ops.convert_to_numpy(function(inputs[batch])) for batch in batches])[: len(inputs)]


def batches_of_lengths(lengths, limit, chunk):
    """Batches of images whose prompts have several lengths, and the length that each batch's are repeated to.

    Args:
        lengths: the tokens that each image's prompts can be repeated to.
        limit: the most images in a batch.
        chunk: tokens in a chunk.

    Returns:
        A list of (indices, tokens). Each index is there at least once.
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
