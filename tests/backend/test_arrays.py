"""Arrays that tensors share their memory with."""

import keras
import numpy as np
import pytest

from keras_sd import backend


@pytest.mark.parametrize("offset", [0, 16])
def test_only_aligned_memory_is_shared(offset):
    """TensorFlow aborts the process when it computes with shared memory that is not aligned."""
    array = backend.aligned_memory(256)[offset : offset + 128].view("float32")
    array[:] = np.arange(32)
    tensor = backend.to_tensor(array)
    assert np.shares_memory(np.asarray(tensor), array) == (offset == 0)
    np.testing.assert_array_equal(keras.ops.add(tensor, tensor), 2 * array)
