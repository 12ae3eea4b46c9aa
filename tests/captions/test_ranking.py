import numpy as np
import pytest

from keras_sd.captions.ranking import top_k


def brute_force(queries, keys, count, lowest=False):
    order = []
    for query in queries:
        products = (keys.astype(np.float64) * query).sum(axis=1)
        order.append(np.argsort(products if lowest else -products, kind="stable")[:count])
    return np.array(order)


def unit_vectors(generator, count, size=128):
    vectors = generator.standard_normal((count, size), dtype="float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("lowest", [False, True])
def test_equals_double_precision_over_100000_phrases(lowest):
    generator = np.random.default_rng(0)
    keys, queries = unit_vectors(generator, 100_000, 64), unit_vectors(generator, 8, 64)
    indices, products = top_k(queries, keys, 32, lowest)
    np.testing.assert_array_equal(indices, brute_force(queries, keys, 32, lowest))
    np.testing.assert_allclose(products, np.take_along_axis(queries.astype(float) @ keys.T, indices, 1), 1e-6)


def test_near_ties_that_single_precision_cannot_tell():
    generator = np.random.default_rng(1)
    query = unit_vectors(generator, 1)
    keys = query + 1e-9 * generator.standard_normal((5000, 128)).astype("float32")
    keys = np.concatenate([keys, keys[:50]]).astype("float32")
    np.testing.assert_array_equal(top_k(query, keys, 100)[0], brute_force(query, keys, 100))


def test_fewer_keys_than_asked_for():
    keys = np.eye(3, dtype="float32")
    indices, products = top_k(keys[:1], keys, 10)
    np.testing.assert_array_equal(indices, [[0, 1, 2]])
    np.testing.assert_array_equal(products, [[1, 0, 0]])


def test_more_queries_than_a_chunk():
    generator = np.random.default_rng(2)
    keys, queries = unit_vectors(generator, 300), unit_vectors(generator, 150)
    np.testing.assert_array_equal(top_k(queries, keys, 5)[0], brute_force(queries, keys, 5))
