"""Attention: its slices, their gradients and memory, its masks and its numbers in half precision."""

import functools
import json

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.kernels import chunked_attention as kernel
from keras_sd.models.attention import Attention, scaled_dot_product
from tests.models.plain_attention import plain_attention, tensors
from tests.programs import run_python


def expected_attention(query, key, value):
    """By definition, in float64."""
    query, key, value = (np.asarray(values, "float64") for values in (query, key, value))
    scores = np.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture
def little_memory(monkeypatch):
    # 2 examples of 3 heads, 7 keys: 168 bytes to a query, so slices of 3 and, for one example, of 6.
    allow(monkeypatch, 600)


def allow(monkeypatch, limit):
    monkeypatch.setattr(kernel, "LARGEST_SCORES", limit)
    monkeypatch.setattr(kernel, "FEWEST_QUERIES", 1)


def test_attention_is_its_definition():
    query, key, value = tensors()
    np.testing.assert_allclose(
        ops.convert_to_numpy(scaled_dot_product(query, key, value)),
        expected_attention(query, key, value),
        atol=1e-6,
    )


@pytest.mark.parametrize("limit", [1, 600, 1847])
def test_slices_agree_with_the_whole(monkeypatch, limit):
    allow(monkeypatch, limit)
    query, key, value = tensors()
    expected = expected_attention(query, key, value)
    eager = scaled_dot_product(*(ops.convert_to_tensor(values) for values in (query, key, value)))
    assert eager.shape == (2, 11, 3, 4)
    np.testing.assert_allclose(eager, expected, atol=1e-6)
    compiled = backend.jit(scaled_dot_product)
    np.testing.assert_allclose(compiled(query, key, value), expected, atol=1e-6)


def test_slices_are_no_larger_than_allowed(little_memory, monkeypatch):
    sizes, scores = [], kernel._scores

    def watched(query, key):
        sizes.append(4 * query.shape[0] * query.shape[2] * 3 * 7)
        return scores(query, key)

    monkeypatch.setattr(kernel, "_scores", watched)
    scaled_dot_product(*(ops.convert_to_tensor(values) for values in tensors()))
    assert max(sizes) <= kernel.LARGEST_SCORES


def gradients(attend, inputs):
    """Of the sum of sines of what is attended to."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.sin(tf.cast(attend(*inputs), "float32")))
    return tape.gradient(loss, inputs)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_of_slices_with_a_batch_of_unknown_size(little_memory, jit_compile):
    inputs = tuple(tf.constant(array) for array in tensors())
    signature = [tuple(tf.TensorSpec((None, *array.shape[1:])) for array in inputs)]
    program = tf.function(
        lambda inputs: gradients(scaled_dot_product, inputs),
        input_signature=signature,
        jit_compile=jit_compile,
        autograph=False,
    )
    for one, other in zip(program(inputs), gradients(plain_attention, inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_softmax_is_one_operation_without_xla_and_sums_in_float32(dtype):
    """A sum of 4,096 equal weights in half precision would end at 256 or 2,048 of them."""
    query, key = (np.random.default_rng(0).standard_normal((1, n, 1, 8)) / 16 for n in (5, 4096))
    inputs = [tf.cast(array, dtype) for array in (query, key, np.ones_like(key))]
    program = tf.function(scaled_dot_product, autograph=False)
    kinds = {operation.type for operation in program.get_concrete_function(*inputs).graph.get_operations()}
    assert "Softmax" in kinds and "Exp" not in kinds
    np.testing.assert_allclose(tf.cast(program(*inputs), "float32"), 1.0, atol=4e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("is_traced", [False, True])
def test_gradients_in_half_precision(little_memory, dtype, upcast, is_traced):
    exact = tuple(tf.constant(array) for array in tensors())
    rounded = tuple(tf.cast(array, dtype) for array in exact)
    expected = gradients(plain_attention, exact)
    program = functools.partial(scaled_dot_product, upcast=upcast)
    if is_traced:
        found = tf.function(lambda inputs: gradients(program, inputs), autograph=False)(rounded)
    else:
        found = gradients(program, rounded)
    for one, other, array in zip(found, expected, rounded, strict=True):
        assert one.dtype == array.dtype
        largest = np.abs(other).max()
        tolerance = {"float16": 0.005, "bfloat16": 0.04}[dtype] * largest
        np.testing.assert_allclose(np.asarray(tf.cast(one, "float32")), other, atol=tolerance)


ON_JAX = """if True:
    import json
    import jax, numpy as np
    from keras_sd.kernels import chunked_attention as kernel
    from keras_sd.models.attention import scaled_dot_product
    from tests.models.plain_attention import plain_attention, tensors

    def program(attend):
        def loss(*inputs):
            return jax.numpy.sin(attend(*inputs).astype("float32")).sum()
        return jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs), (0, 1, 2)))

    def temporaries(tokens, attend):
        inputs = [jax.ShapeDtypeStruct((2, tokens, 2, 16), "bfloat16")] * 3
        return program(attend).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    found = {"sliced": [temporaries(tokens, scaled_dot_product) for tokens in (4096, 16384)]}
    found["plain"] = temporaries(4096, plain_attention)
    kernel.FEWEST_QUERIES = 1
    inputs = tensors()
    expected = program(plain_attention)(*inputs)
    for limit in (2**30, 600):
        kernel.LARGEST_SCORES = limit
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
            results = program(scaled_dot_product)(*(jax.numpy.asarray(array, dtype) for array in inputs))
            for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
                error = np.abs(one.astype("float32") - other).max() / np.abs(other).max()
                assert error < tolerance, (limit, dtype, error)
    print(json.dumps(found))
"""


def test_memory_grows_with_the_tokens_on_jax_and_gradients_stay():
    found = json.loads(run_python(["-c", ON_JAX]).splitlines()[-1])
    fewer, more = found["sliced"]
    # Whatever the tokens, slices of their scores take the same.
    assert more < 4 * fewer
    assert fewer < 0.5 * found["plain"]


def test_masked_positions_are_not_seen(little_memory):
    query, key, value = tensors()
    mask = np.arange(7) < 4
    attended = scaled_dot_product(query, key, value, mask)
    expected = expected_attention(query, key[:, :4], value[:, :4])
    np.testing.assert_allclose(ops.convert_to_numpy(attended), expected, atol=1e-6)


def test_scores_beyond_float16_need_upcasting():
    query, key, value = (array.astype("float16") for array in tensors(scale=300.0))
    value /= 300
    query[0] = np.abs(query[0]) + 300
    key[0] = np.abs(key[0]) + 300
    assert not np.isfinite(ops.convert_to_numpy(scaled_dot_product(query, key, value))).all()
    attended = scaled_dot_product(query, key, value, upcast=True)
    assert attended.dtype == "float16"
    np.testing.assert_allclose(
        ops.convert_to_numpy(attended), expected_attention(query, key, value), atol=2e-3
    )


def test_heads_must_divide_the_channels():
    with pytest.raises(UserError, match="10 channels do not divide into 3 attention heads"):
        Attention(10, 10, 3)
