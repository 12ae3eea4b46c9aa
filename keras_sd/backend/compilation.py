"""Functions compiled by XLA: whole programs, loops inside them, and recomputation for the gradient."""

import functools

import keras

from keras_sd.backend import compat, devices, planning
from keras_sd.backend.exported import (
    ExportedFunction,
    jax_maker,
    jax_step,
    jax_step_by_shape,
    signature_of,
    tensorflow_maker,
)
from keras_sd.backend.program_cache import keep_programs

_MOST_SHAPES = 32  # of a function that stay in memory; a program of Stable Diffusion takes some tens of MiB


def first_call(jit_compile: bool) -> str:
    """Return what the first call of a step does: "compiling", or "tracing" for TensorFlow without XLA."""
    return "compiling" if jit_compile or keras.backend.backend() == "jax" else "tracing"


def jit(function, variables=(), jit_compile=True, *, title="program", of_process=False, identity=None):
    """Compile a pure function of tensors by XLA; it is traced once for each set of input shapes.

    Args:
        function: takes and returns nests of tensors (or NumPy arrays); None stands for itself.
        variables: the Keras variables that it reads. Their values are inputs of the program, not
            constants in it: an assignment is seen by the next call and compiles nothing. One that is
            missing here is a RuntimeError.
        jit_compile: False compiles without XLA on TensorFlow; JAX always uses XLA.
        title: what it computes, in a few words, for a plan (`backend.planning`).
        of_process: each process computes its own results on its first device, at any time. Otherwise all
            processes of a distributed run have to call the function together, with the same arguments. The
            variables must not be split over devices.
        identity: returns a text of all that tracing the function depends on beside its inputs and the
            package's own code, or None. What tracing gives is then kept for the next process
            (`backend.exported`), where XLA compiles it and there is one device.
    """
    keep_programs()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compat.free_gradients_with_graphs()
        # Variables are captured by reference.
        traced = tf.function(function, jit_compile=jit_compile, autograph=False)
        if identity is None or not jit_compile:
            return traced
        variables = list(variables)
        make = tensorflow_maker(function, variables)
        return ExportedFunction(traced, make, variables, identity, _MOST_SHAPES)

    import jax

    variables = list(variables)
    kernels = [place for place, variable in enumerate(variables) if _takes_outputs_first(variable)]
    # Every process gets whole outputs, however the variables are sharded.
    is_distributed = devices.replicated() is not None
    options = {} if of_process else {"out_shardings": devices.replicated()}
    layouts = [None] * len(variables)
    if kernels:
        for place in kernels:
            layouts[place] = compat.outputs_first(variables[place])
        options["in_shardings"] = (layouts, None)

    @functools.partial(jax.jit, **options)
    def program(values, inputs):
        with GivenValues(variables, values):
            return function(*inputs)

    if planning.plan() is not None:
        return planning.PlannedFunction(
            title, program, variables, None if of_process else devices.replicated()
        )
    laid_out = dict.fromkeys(kernels, (None, None))  # a kernel's value, and its copy in that layout

    def current_values():
        # A step on a GPU takes less time than Keras' check, for each variable, whether to cast it.
        values = [compat.stored_value(variable) for variable in variables]
        for place in kernels:
            value, copy = laid_out[place]  # at once, as another thread may replace both
            if values[place] is not value:
                copy = jax.device_put(values[place], layouts[place])
                laid_out[place] = values[place], copy
            values[place] = copy
        if of_process and is_distributed:
            values = [value.addressable_data(0) for value in values]
        return values

    def call(*inputs):
        return program(current_values(), inputs)

    if identity is None or is_distributed or devices.process_count() > 1:
        return call
    make = jax_maker(function, variables, functools.partial(GivenValues, variables), current_values, layouts)
    return ExportedFunction(call, make, variables, identity, _MOST_SHAPES)


def _takes_outputs_first(variable):
    """Return whether programs take this variable in the memory layout of `compat.outputs_first`.

    cuDNN needs convolution kernels in this layout. Otherwise XLA transposes them in each call, which takes up
    to an eighth of a UNet's time (docs/results.md, "On a GPU").
    """
    is_kernel = len(variable.shape) == 4
    return is_kernel and devices.jax_platform() == "gpu" and keras.distribution.distribution() is None


def train_function_by_shape(
    make_function, train_step=None, variables=None, identity=None, shardings=None, on_compiled=None
):
    """Return a train function for Keras' `fit()` that compiles one step for each shape of batches.

    What tracing the step gives is kept for the next process, where `identity` can tell what it depends on,
    and there is one device.

    TensorFlow would read its iterator in a second function around the step, and trace and optimise that as
    well, which takes up to two fifths of the time to the first step. And once a second shape has come, Keras
    traces a step of unknown sizes, for which fast kernels cannot be chosen. JAX does neither.

    Args:
        make_function: returns a new train function, as `Model.make_train_function` makes it.
        train_step: the model's step.
        variables: returns all the Keras variables that it may read or assign.
        identity: as in `jit`, of the model and its optimizer.
        shardings: returns how JAX divides the state among the devices of a distribution.
        on_compiled: is called with the `memory.ProgramMemory` of each step that JAX compiles, before it runs.
    """
    keep_programs()
    if keras.backend.backend() != "tensorflow":
        return _train_function_on_jax(make_function, train_step, identity, shardings, on_compiled)
    compat.free_gradients_with_graphs()

    @functools.cache
    def function_of(signature):
        return make_function()

    def traced(batch):
        return function_of(signature_of(batch))(iter([batch]))

    if identity is None or compat.has_strategy():
        return lambda iterator: traced(next(iterator))

    def make(inputs, content):
        used = variables()
        frozen = [variable for variable in used if not variable.trainable]
        return tensorflow_maker(train_step, used, frozen)(inputs, content)

    step = ExportedFunction(traced, make, [], identity)
    return lambda iterator: step(next(iterator))


def _train_function_on_jax(make_function, train_step, identity, shardings, on_compiled):
    if identity is None:
        return make_function()
    if keras.distribution.distribution() is None and devices.process_count() == 1:
        exported = jax_step(train_step, identity, on_compiled)

        def step(state, data):
            # The shapes of the state, thousands of arrays, are in the identity.
            return exported.call(signature_of(data), state, data)
    else:
        step = jax_step_by_shape(train_step, on_compiled, out_shardings=(None, shardings()))
    return lambda state, iterator: step(state, next(iterator))


def batches_of_shapes(batches):
    """Return batches of several shapes, dictionaries of arrays, in a form that `fit()` takes.

    On TensorFlow Keras would take the shapes of the first two for those of all.

    Args:
        batches: Grain `IterDataset`.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    first = next(iter(batches))
    signature = {key: tf.TensorSpec([None] * array.ndim, array.dtype) for key, array in first.items()}
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=signature)


def recomputed(function, variables):
    """Return `function`, of floating-point tensors, with a backward pass that recomputes it from its inputs.

    Only its arguments and variables get gradients. `keras.remat` does the same, but on a CPU XLA drops JAX's
    barriers, merges both computations and so keeps all activations. Here, as in TensorFlow's version, the
    recomputation depends on the incoming gradient, so it cannot be merged.

    Args:
        variables: all the Keras variables that the function reads. It may not assign to them.
    """
    if keras.backend.backend() == "tensorflow":
        return keras.remat(function)

    import jax

    variables = list(variables)

    def pure(values, inputs):
        with GivenValues(variables, values):
            return function(*inputs)

    def call(*inputs):
        # A new function in each call: JAX would reuse the trace of an earlier one, with its values.
        @jax.custom_vjp
        def run(values, inputs):
            return pure(values, inputs)

        def forward(values, inputs):
            return run(values, inputs), (values, inputs)

        def backward(kept, gradient):
            values, inputs = kept
            first = gradient.ravel()[0]
            # XLA cannot know that this is zero.
            zero = jax.numpy.where(first == first, 0.0, jax.numpy.nan)
            inputs = tuple(array + zero.astype(array.dtype) for array in inputs)
            return jax.vjp(pure, values, inputs)[1](gradient)

        run.defvjp(forward, backward)
        return run([compat.current_value(variable) for variable in variables], inputs)

    return call


def value_and_gradient(function, tensor):
    """Return `function(tensor)`, a scalar, and its gradient by the tensor; also inside a compiled step.

    The gradient does not depend on the backend's tape around it: no second derivative passes through it.
    """
    tensor = keras.ops.stop_gradient(tensor)
    if keras.backend.backend() == "jax":
        import jax

        value, gradient = jax.value_and_grad(function)(tensor)
    else:
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensor)
            value = function(tensor)
        gradient = tape.gradient(value, tensor)
    return keras.ops.stop_gradient(value), keras.ops.stop_gradient(gradient)


def with_constant_variables(function, variables):
    """Return `function`, of tensors, with variables that get no gradient through it.

    Args:
        variables: all the Keras variables that the function reads. It may not assign to them.
    """
    variables = list(variables)

    def call(*inputs):
        values = [keras.ops.stop_gradient(compat.current_value(variable)) for variable in variables]
        with GivenValues(variables, values):
            return function(*inputs)

    return call


class GivenValues(keras.StatelessScope):
    """A scope where the given variables have the given values, and no other variable can be read.

    Other variables would silently become constants of the program that is traced inside.
    """

    def __init__(self, variables, values):
        super().__init__(state_mapping=list(zip(variables, values, strict=True)))

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None:
            raise RuntimeError(f"{variable.path}: read by a compiled function that does not name it")
        return value

    def add_update(self, update):
        raise RuntimeError(f"{update[0].path}: assigned by a compiled function, where it would be lost")


def scan(step, carry, arrays):
    """Call `step(carry, [array[i] ...])` for each i of the arrays' first axis, in order.

    Args:
        step: takes a tuple of tensors, the carry, and a list of tensors; returns a tuple like the carry and
            a tuple of outputs.
        carry: the tuple that the first step gets.
        arrays: a list of tensors of equal and known length.

    Returns:
        The last carry, and the outputs of all steps stacked.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.scan(step, carry, arrays)
    import tensorflow as tf

    count = arrays[0].shape[0]
    shapes = tf.nest.map_structure(tf.TensorSpec.from_tensor, step(carry, [array[0] for array in arrays])[1])
    outputs = tuple(tf.TensorArray(spec.dtype, count, element_shape=spec.shape) for spec in shapes)

    def body(index, carry, outputs):
        carry, found = step(carry, [array[index] for array in arrays])
        return (
            index + 1,
            carry,
            tuple(array.write(index, one) for array, one in zip(outputs, found, strict=True)),
        )

    _, carry, outputs = tf.while_loop(
        lambda index, *_: index < count, body, (0, carry, outputs), parallel_iterations=1
    )
    return carry, tuple(array.stack() for array in outputs)
