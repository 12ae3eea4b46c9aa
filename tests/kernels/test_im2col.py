"""Convolutions by im2col against the sum in double precision, and where they are taken."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sd import backend
from keras_sd.backend.openvino_marks import tracing_for_openvino
from keras_sd.kernels import im2col
from keras_sd.models.layers import convolution
from tests.programs import run_python


def exact(inputs, kernel, stride, padding):
    """The convolution in float64."""
    sizes = kernel.shape[:2]
    if padding == "same":
        inputs = np.pad(inputs, ((0, 0), *((size // 2, size // 2) for size in sizes), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(inputs.astype("float64"), sizes, (1, 2))
    return np.einsum("nijcxy,xyck->nijk", views[:, ::stride, ::stride], kernel.astype("float64"))


@pytest.mark.parametrize(
    ("shape", "sizes", "stride", "padding"),
    [
        ((2, 4, 6), (3, 3), 1, "same"),
        ((1, 1, 1), (3, 3), 1, "same"),
        ((1, 6, 6), (3, 3), 2, "valid"),
        ((2, 7, 5), (3, 3), 2, "valid"),
        ((2, 3, 5), (1, 1), 1, "same"),
        ((2, 4, 6), (3, 1), 1, "same"),
        ((2, 7, 5), (1, 3), 2, "valid"),
    ],
    ids=str,
)
def test_convolution_is_exact_to_rounding(shape, sizes, stride, padding):
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((*shape, 10), dtype="float32")
    kernel = generator.standard_normal((*sizes, 10, 7), dtype="float32") / np.float32(10)
    result = keras.ops.convert_to_numpy(im2col.convolve(inputs, kernel, (stride, stride), padding))
    expected = exact(inputs, kernel, stride, padding)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-6)


def test_layers_take_it_under_jax_where_maps_are_small():
    """With what each case's layer gives without: eager JAX convolves as ever."""
    script = """if True:
        import numpy as np
        from keras_sd import backend
        from keras_sd.kernels import im2col
        from keras_sd.models.layers import Downsample, convolution
        taken = []
        convolve = im2col.convolve
        im2col.convolve = lambda *arguments: taken.append(arguments) or convolve(*arguments)
        for layer, shape, takes in (
            (convolution(256, 8), (4, 8, 8, 256), True),
            (convolution(256, 8), (1, 16, 16, 256), True),
            (convolution(256, 8), (2, 16, 16, 256), False),
            (convolution(255, 8), (1, 4, 4, 255), False),
            (convolution(8, 8, 1), (2, 32, 32, 8), True),
            (convolution(256, 8, (1, 3)), (4, 8, 8, 256), True),
            (convolution(256, 8, (2, 1)), (4, 8, 8, 256), False),
            (Downsample(256), (1, 16, 16, 256), True),
            (Downsample(256), (4, 16, 16, 256), True),
            (convolution(256, 8, 2), (1, 4, 4, 256), False),
            (convolution(8, 8, 2, strides=2), (1, 4, 4, 8), False),
        ):
            inputs = np.random.default_rng(0).standard_normal(shape).astype("float32")
            program = backend.jit(lambda inputs: layer(inputs), layer.variables)
            compiled = np.asarray(program(inputs))
            assert bool(taken) == takes, shape
            taken.clear()
            np.testing.assert_allclose(compiled, layer(inputs), atol=1e-5)
            assert not taken
        # The batch size may be unknown while a program is traced.
        import jax
        import jax.export
        layer = convolution(256, 8)
        inputs = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 8, 8, 256"), "float32")
        exported = jax.export.export(jax.jit(lambda inputs: layer(inputs)))(inputs)
        assert not taken and exported.out_avals[0].shape[1:] == (8, 8, 8)
    """
    run_python(["-c", script])


@pytest.mark.parametrize(
    ("dtype", "shape", "outputs", "size", "jit_compile", "takes"),
    [
        ("bfloat16", (1, 8, 8, 512), 512, 3, False, True),
        ("float32", (1, 8, 8, 512), 512, 3, False, True),
        ("float16", (1, 8, 8, 512), 512, 3, False, False),
        ("bfloat16", (1, 8, 8, 512), 512, 3, True, False),
        ("bfloat16", (1, 8, 8, 512), 511, 3, False, False),
        ("bfloat16", (2, 8, 8, 512), 512, 3, False, False),
        ("bfloat16", (2, 16, 16, 1280), 1280, 1, False, True),
        ("bfloat16", (3, 16, 16, 1280), 1280, 1, False, False),
        ("float32", (3, 16, 16, 1280), 1280, 1, False, True),
    ],
    ids=str,
)
def test_layers_take_it_without_xla_where_the_kernel_is_larger_than_the_map(
    dtype, shape, outputs, size, jit_compile, takes, monkeypatch
):
    """With what the layer gives without: eager TensorFlow convolves as ever."""
    assert keras.backend.backend() == "tensorflow"
    taken, convolve = [], im2col.convolve
    monkeypatch.setattr(im2col, "convolve", lambda *each: taken.append(each) or convolve(*each))
    layer = convolution(shape[-1], outputs, size, dtype=dtype)
    inputs = keras.ops.cast(np.random.default_rng(0).standard_normal(shape, dtype="float32"), dtype)
    program = backend.jit(lambda inputs: layer(inputs), layer.variables, jit_compile)
    result = keras.ops.cast(program(inputs), "float32")
    assert bool(taken) == takes
    expected = keras.ops.cast(layer(inputs), "float32")
    assert len(taken) == int(takes)
    np.testing.assert_allclose(result, expected, atol=5e-5 if dtype == "float32" else 0.05)


def test_openvino_converts_convolutions_as_they_are():
    """It has kernels of its own, which keep their layout."""
    layer = convolution(512, 512, dtype="bfloat16")
    program = tf.function(lambda inputs: layer(inputs), autograph=False)
    inputs = tf.zeros((1, 8, 8, 512), "bfloat16")

    def kinds():
        graph = program.get_concrete_function(inputs).graph
        return {operation.type for operation in graph.get_operations()} & {"Conv2D", "MatMul"}

    assert kinds() == {"MatMul"}
    program = tf.function(lambda inputs: layer(inputs), autograph=False)
    with tracing_for_openvino():
        assert kinds() == {"Conv2D"}
