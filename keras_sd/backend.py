"""All that depends on the Keras backend."""

import keras

xla = True
"""Whether `jit` compiles by XLA on TensorFlow, as JAX always does; off only to measure what XLA is worth."""


def jit(function, variables=()):
    """Compiles a pure function of tensors by XLA; it is traced once for each set of input shapes.

    Args:
        function: takes and returns nests of tensors (or NumPy arrays); None stands for itself.
        variables: the Keras variables that it reads. Their values are inputs of the program, not
            constants in it: an assignment is seen by the next call and compiles nothing.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=xla, autograph=False)  # captures variables by reference

    import jax

    variables = list(variables)

    @jax.jit
    def program(values, *inputs):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*inputs)

    def call(*inputs):
        return program([variable.value for variable in variables], *inputs)

    return call
