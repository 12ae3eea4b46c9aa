"""Attention: its slices, its masks and its numbers in half precision."""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models import attention
from keras_sd.models.attention import Attention, scaled_dot_product
from tests.programs import run_python


def tensors(queries=11, keys=7, scale=1.0):
    generator = np.random.default_rng(0)
    shapes = (2, queries, 3, 4), (2, keys, 3, 4), (2, keys, 3, 4)
    return [(scale * generator.standard_normal(shape)).astype("float32") for shape in shapes]


def expected_attention(query, key, value):
    """By definition, in float64."""
    query, key, value = (np.asarray(values, "float64") for values in (query, key, value))
    scores = np.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture
def little_memory(monkeypatch):
    # 2 examples of 3 heads, 7 keys: 168 bytes to a query, so slices of 3 and, for one example, of 6.
    monkeypatch.setattr(attention, "LARGEST_SCORES", 600)


def test_attention_is_its_definition():
    query, key, value = tensors()
    np.testing.assert_allclose(
        ops.convert_to_numpy(scaled_dot_product(query, key, value)),
        expected_attention(query, key, value),
        atol=1e-6,
    )


@pytest.mark.parametrize("limit", [1, 600, 1847])
def test_slices_agree_with_the_whole(monkeypatch, limit):
    monkeypatch.setattr(attention, "LARGEST_SCORES", limit)
    query, key, value = tensors()
    expected = expected_attention(query, key, value)
    eager = scaled_dot_product(*(ops.convert_to_tensor(values) for values in (query, key, value)))
    assert eager.shape == (2, 11, 3, 4)
    np.testing.assert_allclose(eager, expected, atol=1e-6)
    compiled = backend.jit(scaled_dot_product)
    np.testing.assert_allclose(compiled(query, key, value), expected, atol=1e-6)


def test_slices_are_no_larger_than_allowed(little_memory, monkeypatch):
    sizes, attend = [], attention._attend

    def watched(query, *rest):
        sizes.append(4 * query.shape[0] * query.shape[1] * 3 * 7)
        return attend(query, *rest)

    monkeypatch.setattr(attention, "_attend", watched)
    scaled_dot_product(*(ops.convert_to_tensor(values) for values in tensors()))
    assert max(sizes) <= attention.LARGEST_SCORES


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_of_slices_with_a_batch_of_unknown_size(little_memory, monkeypatch, jit_compile):
    query, key, value = tensors()

    def gradients(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.sin(scaled_dot_product(*inputs)))
        return tape.gradient(loss, inputs)

    signature = [tf.TensorSpec((None, *array.shape[1:])) for array in (query, key, value)]
    sliced = tf.function(gradients, input_signature=signature, jit_compile=jit_compile)(query, key, value)
    monkeypatch.setattr(attention, "LARGEST_SCORES", 2**30)
    whole = gradients(*(tf.constant(array) for array in (query, key, value)))
    for one, other in zip(sliced, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_slices_and_their_gradients_on_jax():
    script = """if True:
        import jax, numpy as np
        from keras_sd.models import attention
        def loss(*inputs):
            return jax.numpy.sin(attention.scaled_dot_product(*inputs)).sum()
        generator = np.random.default_rng(0)
        inputs = [generator.standard_normal((2, 11, 3, 4)).astype("float32") for _ in range(3)]
        both = []
        for limit in (2**30, 600):
            attention.LARGEST_SCORES = limit
            both.append(jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1, 2)))(*inputs))
        for one, other in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    """
    run_python(["-c", script])


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
