"""What depends on the backend; programs whose kernels are laid out as a GPU wants them."""

import gc
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_sd.backend import first_call, jit, recomputed
from keras_sd.models.layers import GroupNormalization
from tests.programs import run_python


@pytest.mark.gpu
def test_program_of_transposed_kernels_is_the_same_and_sees_assignments():
    script = """if True:
        import jax, keras, numpy as np
        from keras_sd import backend
        from keras_sd.models.layers import convolution
        inputs = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
        layer = convolution(3, 5)
        program = backend.jit(lambda inputs: layer(inputs), layer.variables)
        made = []
        put = jax.device_put
        jax.device_put = lambda *arguments: made.append(put(*arguments)) or made[-1]
        for factor in (1, 1, 2):
            layer.kernel.assign(layer.kernel * factor) if factor > 1 else None
            np.testing.assert_allclose(program(inputs), layer(inputs), rtol=1e-5, atol=1e-5)
        assert len(made) == 2, "one copy of each value"
        assert made[0].format.layout.major_to_minor == (3, 0, 1, 2)
        assert np.abs(made[1] - 2 * made[0]).max() == 0 < np.abs(made[0]).max()
    """
    run_python(["-c", script])


def test_program_refuses_what_would_be_a_constant_in_it():
    script = """if True:
        import jax, numpy as np
        from keras_sd import backend
        from keras_sd.models.layers import dense
        inputs, layer = np.ones((2, 3), "float32"), dense(3, 3)

        def refused(call, reason):
            try:
                call()
            except RuntimeError as error:
                assert reason in str(error), error
            else:
                raise AssertionError(reason)

        refused(lambda: backend.jit(layer, [layer.kernel])(inputs), "bias: read by")
        refused(lambda: backend.recomputed(layer, [layer.kernel])(inputs), "bias: read by")
        layer.compute = lambda inputs: layer.bias.assign(inputs[0]) + layer(inputs)
        refused(lambda: backend.recomputed(layer.compute, layer.variables)(inputs), "bias: assigned by")
        # A value that is given around the recomputation is the one inside it.
        twice = [2 * variable.value for variable in layer.variables]
        recomputed = jax.jit(lambda: backend.recomputed(layer, layer.variables)(inputs))
        before = recomputed()
        import keras
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, twice))):
            np.testing.assert_allclose(backend.recomputed(layer, layer.variables)(inputs), 2 * before)
    """
    run_python(["-c", script])


def test_what_a_first_call_does():
    assert first_call(True) == "compiling"
    assert first_call(False) == ("compiling" if keras.backend.backend() == "jax" else "tracing")


def test_a_graph_goes_with_its_program():
    """Custom gradients, ours and those of TensorFlow's own functions, hold no graph, and so no weights."""
    import tensorflow as tf

    inputs = np.ones((1, 2, 2, 4), "float32")

    def graphs():
        gc.collect()
        return {id(one) for one in gc.get_objects() if type(one).__name__ == "FuncGraph"}

    def use():
        layer = GroupNormalization(4, 2, silu=True)
        layer.build(inputs.shape)

        def slope(tensor):
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                value = recomputed(lambda one: keras.ops.silu(layer(one)), layer.variables)(tensor)
            return tape.gradient(value, tensor)

        program = jit(slope, layer.variables)
        computed = np.array(program(inputs))
        assert graphs() - before
        return computed, np.array(slope(tf.constant(inputs)))

    before = graphs()
    np.testing.assert_allclose(*use(), atol=1e-6)
    assert not graphs() - before


@pytest.mark.parametrize(("name", "onednn"), [("tensorflow", "1"), ("tensorflow", "0"), ("jax", "1")])
def test_bfloat16_is_left_to_onednn_where_the_processor_multiplies_it(name, onednn):
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = name == "jax" or onednn == "0" or not {"avx512_bf16", "amx_bf16"} & set(flags)
    script = f"""if True:
        from keras_sd import backend
        from keras_sd.pipeline.stable_diffusion import StableDiffusion
        assert backend.compiles(None, "bfloat16") is {expected}
        assert backend.compiles(None, "float32") and backend.compiles(True, "bfloat16")
        assert not backend.compiles(False, "float32")
        pipeline = StableDiffusion.from_preset("emoji", dtype="bfloat16")
        images = pipeline.text_to_image("red heart", num_inference_steps=2, progress=False)
        compiled = StableDiffusion.from_preset("emoji", dtype="bfloat16", jit_compile=True)
        others = compiled.text_to_image("red heart", num_inference_steps=2, progress=False)
        assert abs(images.astype(int) - others.astype(int)).mean() < 8
    """
    run_python(["-c", script], name, TF_ENABLE_ONEDNN_OPTS=onednn)
