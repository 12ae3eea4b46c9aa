"""Flash attention (Dao et al., 2022) by cuDNN, for JAX on NVIDIA's GPUs, and by OpenVINO on processors."""

import keras

from keras_sd import backend

# The largest head size that cuDNN's attention accepts, before NVIDIA's Hopper and since. These are its
# limits, not measurements: it is used wherever it can be.
_LARGEST_HEAD, _LARGEST_HEAD_ON_HOPPER = 128, 256


def is_available(query):
    """Return whether `attention` accepts this query `(n, tokens, heads, head_size)`.

    It needs half precision, and JAX on an NVIDIA GPU since Ampere; or a trace for OpenVINO.
    """
    if backend.traces_for_openvino():
        return True
    half = keras.backend.standardize_dtype(query.dtype) in ("bfloat16", "float16")
    if keras.backend.backend() != "jax" or not half or backend.jax_platform() != "gpu":
        return False
    capability = backend.gpu_capability()
    largest = _LARGEST_HEAD_ON_HOPPER if capability >= 9 else _LARGEST_HEAD
    return capability >= 8 and query.shape[-1] % 8 == 0 and query.shape[-1] <= largest


def attention(query, key, value):
    """Return the attention, computed without holding all scores; sums of scores are float32.

    Args:
        query, key, value: `(n, tokens, heads, head_size)` in the same half precision.
    """
    if backend.traces_for_openvino():
        return backend.mark("attention", [query, key, value], (*query.shape[:3], value.shape[3]))
    import jax

    keys, lengths = key.shape[1], None
    if keys % 2:
        # The backward pass needs an even number of keys. The lengths exclude the padding.
        key, value = (keras.ops.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0))) for array in (key, value))
        lengths = jax.numpy.full((key.shape[0],), keys, "int32")
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )
