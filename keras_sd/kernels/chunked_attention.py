"""Chunked attention: memory grows linearly with the number of tokens, on every backend.

Chunks of the queries are processed one after the other (Rabe and Staats, 2021). The backward pass keeps the
inputs, the outputs and, under XLA, one number for each query, and recomputes the weights of each chunk
(Dao et al., 2022).
"""

import functools

import keras
from keras import ops

from keras_sd import backend

# The bytes of scores (float32) that are held at a time. With one image of 4096 tokens and 8 heads, 64 MiB
# take 0.95 of the processor time that all 512 MiB take, and 16 MiB take 1.15. With 16 images of 1024 tokens
# 64 MiB take 1.19, and 256 MiB 1.07 (benchmarks/kernels.md, `python tools/bench_kernels.py`).
LARGEST_SCORES = 2**26
# The fewest queries of a chunk, whatever that takes: a batch so large is spread over several devices. It is a
# guess, not a measurement.
FEWEST_QUERIES = 128


def attention(query, key, value, heads, *, upcast=False):
    """Return the attention of `(n, tokens, features)` tensors with the features of all heads side by side.

    Args:
        upcast: compute scores in float32.

    Returns:
        `(n, queries, features)` in the values' dtype.
    """
    split = functools.partial(_split, heads=heads)

    def split_inputs(query, key, value):
        query = query * ops.cast((query.shape[-1] // heads) ** -0.5, query.dtype)
        if upcast:
            query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
        return split(query), split(key), split(value)

    @ops.custom_gradient
    def attend(query, key, value):
        tokens = query.shape[1]
        queries, keys, values = split_inputs(query, key, value)
        count = slices(queries, keys)
        outputs, *normalizers = _outputs(queries, keys, values, count)
        outputs = _join(outputs)

        def gradient(upstream):
            queries, keys, values = split_inputs(query, key, value)
            upstream = split(upstream)
            # The gradient of the softmax subtracts this from the gradient of each weight.
            shared = ops.sum(ops.cast(upstream, "float32") * ops.cast(split(outputs), "float32"), axis=-1)
            slopes = _gradients(queries, keys, values, upstream, shared, normalizers, count)
            slopes = [_join(slope) for slope in slopes]
            slopes[0] = slopes[0][:, :tokens] * (query.shape[-1] // heads) ** -0.5
            return tuple(
                ops.cast(slope, array.dtype) for slope, array in zip(slopes, (query, key, value), strict=True)
            )

        return outputs, gradient

    return attend(query, key, value)


def slices(query, key):
    """Return the number of chunks of the queries `(n, heads, tokens, head_size)`."""
    batch, heads, queries, _ = query.shape
    # A batch of unknown size counts as one example.
    fitting = LARGEST_SCORES // (4 * (batch or 1) * heads * key.shape[2])
    return -(-queries // max(fitting, FEWEST_QUERIES))


def _split(array, heads):
    """Transpose `(n, tokens, features)` to `(n, heads, tokens, head_size)`."""
    _, tokens, features = array.shape
    return ops.transpose(ops.reshape(array, (-1, tokens, heads, features // heads)), (0, 2, 1, 3))


def _join(array):
    _, heads, tokens, head_size = array.shape
    return ops.reshape(ops.transpose(array, (0, 2, 1, 3)), (-1, tokens, heads * head_size))


def _sliced(array, count):
    """Split `(n, heads, tokens, ...)` into chunks `(count, n, heads, tokens, ...)`, padded with zeros."""
    _, heads, tokens, *rest = array.shape
    size = -(-tokens // count)
    if size * count > tokens:
        array = ops.pad(array, ((0, 0), (0, 0), (0, size * count - tokens), *[(0, 0)] * len(rest)))
    array = ops.reshape(array, (-1, heads, count, size, *rest))
    return ops.transpose(array, (2, 0, 1, *range(3, len(array.shape))))


def _whole(array):
    """Invert `_sliced`."""
    count, _, heads, size, *rest = array.shape
    array = ops.transpose(array, (1, 2, 0, *range(3, len(array.shape))))
    return ops.reshape(array, (-1, heads, count * size, *rest))


def _scores(query, key):
    # The softmax of many terms needs more precision than float16 or bfloat16 has.
    return ops.cast(_products(query, key), "float32")


def _products(query, key):
    return ops.einsum("nhqd,nhkd->nhqk", query, key)


def _softmax(scores):
    """Return the softmax of scores `(..., keys)` by one operation, which computes in float32."""
    # On bfloat16 only oneDNN's does, on processors with units for it.
    if backend.compiles(None, keras.backend.standardize_dtype(scores.dtype)):
        scores = ops.cast(scores, "float32")
    return ops.softmax(scores, axis=-1)


def _outputs(query, key, value, count):
    """Return the outputs and, if XLA compiles the program, the log-sum-exp of each query's scores.

    Without XLA each of the softmax's operations would read and write all scores, so that at 512 pixels they
    took a third of the UNet's time. There it is one operation, which gives no log-sum-exp.
    """
    has_softmax = backend.runs_by_onednn(query)

    def attend(query):
        if has_softmax:
            weights = ops.cast(_softmax(_products(query, key)), value.dtype)
            return [ops.einsum("nhqk,nhkd->nhqd", weights, value)]
        scores = _scores(query, key)
        top = ops.max(scores, axis=-1, keepdims=True)
        weights = ops.exp(scores - top)
        total = ops.sum(weights, axis=-1, keepdims=True)
        outputs = ops.einsum("nhqk,nhkd->nhqd", ops.cast(weights / total, value.dtype), value)
        return [outputs, (top + ops.log(total))[..., 0]]

    if count == 1:
        return attend(query)
    _, parts = backend.scan(lambda carry, parts: (carry, attend(*parts)), (), [_sliced(query, count)])
    tokens = query.shape[2]
    return [_whole(part)[:, :, :tokens] for part in parts]


def _gradients(query, key, value, upstream, shared, normalizers, count):
    def step(carry, parts):
        query, upstream, shared, *normalizers = parts
        if normalizers:
            weights = ops.exp(_scores(query, key) - normalizers[0][..., None])
        else:
            weights = ops.cast(_softmax(_products(query, key)), "float32")
        of_value = ops.einsum("nhqd,nhqk->nhdk", upstream, ops.cast(weights, value.dtype))
        of_weights = ops.cast(ops.einsum("nhqd,nhkd->nhqk", upstream, value), "float32")
        of_scores = ops.cast(weights * (of_weights - shared[..., None]), query.dtype)
        of_query = ops.einsum("nhqk,nhkd->nhqd", of_scores, key)
        of_key = ops.einsum("nhqd,nhqk->nhdk", query, of_scores)
        found = [ops.cast(slope, "float32") for slope in (of_key, of_value)]
        return tuple(sum_ + slope for sum_, slope in zip(carry, found, strict=True)), (of_query,)

    arrays = [query, upstream, shared, *normalizers]
    # Transposed sums: otherwise a CPU would transpose the weights, which are much larger.
    zeros = tuple(ops.zeros_like(_transposed(array), dtype="float32") for array in (key, value))
    if count == 1:
        sums, (of_query,) = step(zeros, arrays)
    else:
        sums, (of_query,) = backend.scan(step, zeros, [_sliced(array, count) for array in arrays])
        of_query = _whole(of_query)
    return of_query, *map(_transposed, sums)


def _transposed(array):
    return ops.transpose(array, (0, 1, 3, 2))
