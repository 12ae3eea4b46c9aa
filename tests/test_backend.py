"""Programs whose kernels are laid out as a GPU wants them."""

from tests.programs import run_python


def test_program_of_turned_kernels_is_the_same_and_sees_assignments():
    script = """if True:
        import jax, keras, numpy as np
        from keras_sd import backend
        from keras_sd.models.layers import convolution
        inputs = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
        layer = convolution(3, 5)
        plain = backend.jit(lambda inputs: layer(inputs), layer.variables)
        backend._lies_otherwise = lambda variable: len(variable.shape) == 4  # as on a GPU
        turned = backend.jit(lambda inputs: layer(inputs), layer.variables)
        made = []
        put = jax.device_put
        jax.device_put = lambda *arguments: made.append(put(*arguments)) or made[-1]
        for factor in (1, 1, 2):
            layer.kernel.assign(layer.kernel * factor) if factor > 1 else None
            np.testing.assert_array_equal(turned(inputs), plain(inputs))
        assert len(made) == 2, "one copy of each value"
        assert made[0].format.layout.major_to_minor == (3, 0, 1, 2)
        assert np.abs(made[1] - 2 * made[0]).max() == 0 < np.abs(made[0]).max()
    """
    run_python(["-c", script])
