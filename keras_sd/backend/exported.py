"""Exported programs: what tracing a function gave is kept, so that the next process does not trace it again.

Tracing a network in Python takes longer than reading its compiled program. Where a caller says what the trace
of a function depends on, its StableHLO is kept in the cache folder: by `jax.export` on JAX, and on TensorFlow
as the module that XLA compiles, called by one operation. Weights are inputs of a program, not part of it, and
Python runs nothing of an entry. No entry is needed: one that is damaged or unusable is replaced.

The process that writes an entry runs it as well: so the compilation cache has the same program for all.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sd.backend import compat, devices
from keras_sd.backend.compiling_ahead import is_ahead
from keras_sd.backend.entries import read_entry, write_entry
from keras_sd.backend.memory import telling
from keras_sd.files.cache import private_folder
from keras_sd.files.json_files import parse_json

Identity = Callable[[], str | None]
"""Returns what a trace depends on beside the shapes of the inputs; None if nothing may be kept."""

_PACKAGE = Path(__file__).parents[1]
# What is traced is in these folders of the package.
_SOURCES = ("backend", "diffusion", "kernels", "models", "pipeline", "training", "training/optimizers")
# Beginnings of environment variables that change what is traced, and some that do not.
_SETTINGS = ("JAX_", "KERAS_", "NVIDIA_TF32", "TF_", "XLA_")
_WITHOUT_EFFECT = ("JAX_COMPILATION_CACHE", "KERAS_HOME", "KERAS_SD_CACHE", "TF_CPP_")
# cuDNN's attention, which JAX does not count among the calls that later versions understand. An entry is for
# one version only.
_CALLS = tuple(
    f"__cudnn$fmha{kind}Softmax{direction}" for kind in ("", "ScaleBias") for direction in ("", "Backward")
)


class Program(NamedTuple):
    """A program for inputs of certain shapes.

    Attributes:
        call: the function of the inputs, a tuple.
        content: bytes to keep; None if the program was read from them.
        compile: compiles it for inputs of these shapes, without running it; returns `call` of what was
            compiled, and the shapes of its results. None where a program is compiled by running it.
    """

    call: Callable[[tuple[Any, ...]], Any]
    content: bytes | None
    compile: Callable[[tuple[Any, ...]], tuple[Callable[[tuple[Any, ...]], Any], Any]] | None = None


class ExportedFunction:
    """A function that is read from the cache folder, or traced and kept, for each set of input shapes.

    Args:
        traced: the compiled function, which runs where nothing can be kept.
        make: `make(inputs, content)` returns its `Program` for the shapes of these inputs: of the bytes of an
            entry, or new for None.
        variables: the Keras variables that it reads.
        identity: an `Identity`.
        most_shapes: programs that stay in memory; the oldest is dropped for a further one, and read again
            where it is needed. None keeps all. (TensorFlow itself keeps compiled programs to the end.)
    """

    def __init__(
        self,
        traced: Callable[..., Any],
        make: Callable[[tuple[Any, ...], bytes | None], Program],
        variables: list[keras.Variable],
        identity: Identity,
        most_shapes: int | None = None,
    ) -> None:
        self._traced, self._make = traced, make
        self._variables, self._identity = variables, identity
        self._most_shapes = most_shapes
        self._calls: dict[Any, Callable[[tuple[Any, ...]], Any]] = {}
        self._zeros: dict[Any, Any] = {}  # results where a thread compiles only

    def __call__(self, *inputs):
        return self.call(signature_of(inputs), *inputs)

    def call(self, signature, *inputs):
        """Return the result for inputs of a signature, which is looked up in place of their shapes."""
        if is_ahead():
            return self._compiled_only(signature, inputs)
        call = self._calls.get(signature)
        if call is not None:
            return call(inputs)
        call, result = self._first_call(signature, inputs)
        self._keep(signature, call)
        return result

    def _keep(self, signature, call):
        self._calls[signature] = call
        if self._most_shapes is not None and len(self._calls) > self._most_shapes:
            self._calls.pop(next(iter(self._calls)), None)  # another thread may have done so

    def _compiled_only(self, signature, inputs):
        """Compile the program for these shapes, and return zeros in place of its result."""
        if signature not in self._zeros:
            call, self._zeros[signature] = self._first(signature, inputs, _compile)
            self._keep(signature, call)
        return self._zeros[signature]

    def _first_call(self, signature, inputs):
        """Return the function for these shapes, and its result."""
        found = self._first(signature, inputs, _run)
        return found or (lambda inputs: self._traced(*inputs), self._traced(*inputs))

    def _first(self, signature, inputs, use):
        """Return what `use` returns of the program, which is read or made; None if there is none.

        Args:
            use: `use(program, inputs)` returns the function for these shapes, and a result.
        """
        identity = self._identity()
        entry = None if identity is None else self._entry(identity, signature)
        kept = None if entry is None else read_entry(entry)
        for content in () if entry is None else (None,) if kept is None else (kept, None):
            try:
                program = self._make(inputs, content)
                used = use(program, inputs)
            except Exception as error:  # of whatever library meets something that it does not know
                if devices.is_out_of_memory(error):
                    raise
                continue
            if program.content is not None:
                write_entry(entry, program.content)
            return used
        return None

    def _entry(self, identity, signature):
        folder = private_folder("programs")
        if folder is None:
            return None
        variables = [
            (variable.name, tuple(variable.shape), variable.dtype, variable.trainable)
            for variable in self._variables
        ]
        text = json.dumps([identity, repr(signature), variables, environment()])
        return folder / hashlib.sha256(text.encode()).hexdigest()


def _run(program, inputs):
    return program.call, program.call(inputs)


def _compile(program, inputs):
    import jax

    call, shapes = program.compile(inputs)
    return call, jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)


def signature_of(value):
    """Return the structure of inputs with the shapes and types of their arrays."""
    if value is None:
        return None
    if isinstance(value, dict):
        return tuple((key, signature_of(value[key])) for key in sorted(value))
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(signature_of, value))
    return tuple(value.shape), keras.backend.standardize_dtype(value.dtype)


def environment():
    """Return what each trace in this process depends on: versions, sources, settings and the device."""
    backend = keras.backend.backend()
    packages = ("keras", backend, *(("jaxlib",) if backend == "jax" else ()))
    return [
        {name: importlib.metadata.version(name) for name in packages},
        _sources(),
        {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_SETTINGS) and not name.startswith(_WITHOUT_EFFECT)
        },
        keras.config.floatx(),
        keras.config.image_data_format(),
        keras.config.dtype_policy().name,
        keras.config.is_flash_attention_enabled(),
        compat.trace_settings(),
        devices.kind(),
    ]


@functools.cache
def _sources():
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def leaves_of(inputs):
    """Return the arrays of a nest of them, without what is None."""
    return [leaf for leaf in keras.tree.flatten(inputs) if leaf is not None]


def function_of_leaves(function, inputs):
    """Return a function of a list of arrays, that packs them as `inputs` and calls `function`."""
    places = keras.tree.flatten(inputs)
    structure = keras.tree.map_structure(lambda _: 0, inputs)

    def call(leaves):
        found = iter(leaves)
        packed = [None if place is None else next(found) for place in places]
        return function(*keras.tree.pack_sequence_as(structure, packed))

    return call


# JAX


def jax_maker(function, variables, given_values, values, layouts):
    """Return `make` of an `ExportedFunction` on JAX.

    Args:
        function: the function of the inputs.
        variables: the Keras variables that it reads.
        given_values: `given_values(values)` is a context in which the variables have these values.
        values: returns the values of the variables, laid out as the program takes them.
        layouts: of each variable, None for the usual one.
    """
    import jax
    import jax.export

    # Their values are elsewhere while a model is trained.
    shapes = [jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in variables]

    def make(inputs, content):
        new = content is None
        if new:
            of_leaves = function_of_leaves(function, inputs)

            def program(values, leaves):
                with given_values(values):
                    return of_leaves(leaves)

            content = _exported_by_jax(program, shapes, leaves_of(inputs))
        usual = _on_one_device()
        call = jax.jit(
            jax.export.deserialize(bytearray(content)).call,
            in_shardings=([layout or usual for layout in layouts], usual),
        )

        def compile_only(inputs):
            lowered = call.lower(shapes, leaves_of(inputs))
            compiled = lowered.compile()
            return lambda inputs: compiled(values(), leaves_of(inputs)), lowered.out_info

        return Program(
            lambda inputs: call(values(), leaves_of(inputs)), content if new else None, compile_only
        )

    return make


def _exported_by_jax(function, *inputs):
    """Return the program of a function for the shapes of its inputs, as bytes."""
    import jax
    import jax.export

    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), inputs)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CALLS]
    return bytes(jax.export.export(jax.jit(function), disabled_checks=checks)(*shapes).serialize())


def _on_one_device():
    """Return the sharding of inputs; without it the results of one call compile the next one anew.

    An exported program binds its results to the device, to which its first inputs are not bound.
    """
    import jax

    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def jax_step_by_shape(train_step, on_compiled, **options):
    """Return Keras' training step on JAX as a function of state and data, traced anew for each shape of data.

    Args:
        train_step, on_compiled: as for `jax_step`.
        options: of `jax.jit`.
    """
    import jax

    @functools.cache
    def step_for(signature):
        # A function of its own, as JAX remembers the trace of each function.
        step = jax.jit(lambda state, data: train_step(state, data), donate_argnums=0, **options)
        return telling(step, on_compiled)

    return lambda state, data: step_for(signature_of(data))(state, data)


def jax_step(train_step, identity, on_compiled=None):
    """Return Keras' training step on JAX as a function of state and data, read or exported for their shapes.

    What the step changes is donated, as Keras does with the whole state. What it leaves as it is, such as the
    weights of a frozen model, is not: JAX would have to copy a weight that is mapped from a file.

    Args:
        train_step: the function of a state and a batch; returns logs and the new state.
        identity: an `Identity` of all that it is traced with.
        on_compiled: is called with the `memory.ProgramMemory` of each program that is compiled or read.
    """
    import jax
    import jax.export

    traced = jax_step_by_shape(train_step, on_compiled)

    def make(inputs, content):
        new = content is None
        if new:
            content = _exported_step(train_step, *inputs)
        first_line, module = content.split(b"\n", 1)
        changed = parse_json(first_line, "header")["changed"]
        unchanged = sorted(set(range(len(jax.tree.leaves(inputs[0])))) - set(changed))
        program = jax.export.deserialize(bytearray(module)).call
        call = telling(jax.jit(program, donate_argnums=0, in_shardings=_on_one_device()), on_compiled)

        def run(inputs):
            state, data = inputs
            leaves, structure = jax.tree.flatten(state)
            logs, values = call(
                [leaves[place] for place in changed], [leaves[place] for place in unchanged], data
            )
            for place, value in zip(changed, values, strict=True):
                leaves[place] = value
            return logs, jax.tree.unflatten(structure, leaves)

        return Program(run, content if new else None)

    return ExportedFunction(traced, make, [], identity)


def _exported_step(train_step, state, data):
    """Return the places of what a step changes in its state, and its program of the rest, as bytes."""
    import jax
    import jax.extend

    step = jax.jit(lambda state, data: train_step(state, data)).trace(state, data)
    jaxpr, places = step.jaxpr.jaxpr, range(len(jax.tree.leaves(state)))
    first = len(jax.tree.leaves(step.out_info[0]))  # of the state, after the logs
    changed = [place for place in places if jaxpr.outvars[first + place] is not jaxpr.invars[place]]
    run = jax.extend.core.jaxpr_as_fun(step.jaxpr)
    structure = jax.tree.structure(step.out_info[0])

    def changes(values, others, data):
        values, others = iter(values), iter(others)
        leaves = [next(values) if place in changed else next(others) for place in places]
        results = run(*leaves, *jax.tree.leaves(data))
        return jax.tree.unflatten(structure, results[:first]), [results[first + place] for place in changed]

    leaves = jax.tree.leaves(state)
    module = _exported_by_jax(
        changes,
        [leaves[place] for place in changed],
        [leaves[place] for place in places if place not in changed],
        data,
    )
    return json.dumps({"changed": changed}).encode() + b"\n" + module


# TensorFlow


def tensorflow_maker(function, variables, frozen=()):
    """Return `make` of an `ExportedFunction` on TensorFlow.

    Args:
        function: the function of the inputs.
        variables: the Keras variables that it reads or assigns.
        frozen: those of them that need no gradient. A tape in the function would watch them too, whatever
            Keras says of them, and the gradient of each would be traced.
    """
    import tensorflow as tf

    def export(inputs):
        of_leaves, assigned = function_of_leaves(function, inputs), []

        # XLA's program of a function that assigns has operations that a module cannot hold, so the new values
        # are results.
        def with_new_values(*leaves):
            read = [(one, tf.convert_to_tensor(compat.stored_value(one))) for one in frozen]
            with keras.StatelessScope(read) as scope:
                old = [scope.get_current_value(variable) for variable in variables]
                results = of_leaves(leaves)
                new = [scope.get_current_value(variable) for variable in variables]
            assigned[:] = [place for place, value in enumerate(new) if value is not old[place]]
            return results, tuple(new[place] for place in assigned)

        traced = tf.function(with_new_values, jit_compile=True, autograph=False)
        leaves = [tf.convert_to_tensor(leaf) for leaf in leaves_of(inputs)]
        concrete = traced.get_concrete_function(*(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves))
        if compat.assigns(concrete):
            raise NotImplementedError  # past Keras' variables, as its own optimizers do
        places = {id(compat.stored_value(variable).handle): place for place, variable in enumerate(variables)}
        header = {
            # A tensor that is no variable is a KeyError: the next process would not have it.
            "variables": [places[id(captured)] for captured in concrete.captured_inputs],
            "assigned": assigned,
            "outputs": described(concrete.structured_outputs[0]),
        }
        module = traced.experimental_get_compiler_ir(*leaves)(stage="stablehlo_serialized")
        return json.dumps(header).encode() + b"\n" + module

    def make(inputs, content):
        new = content is None
        if new:
            content = export(inputs)
        first_line, module = content.split(b"\n", 1)
        header = parse_json(first_line, "header")
        outputs = tensors_of(header["outputs"])
        used = [compat.stored_value(variables[place]) for place in header["variables"]]
        assigned = [compat.stored_value(variables[place]) for place in header["assigned"]]
        updated = [(one.shape.as_list(), one.dtype.name) for one in assigned]

        @functools.partial(tf.function, jit_compile=True, autograph=False)
        def program(*leaves):
            values = [*leaves, *(one.read_value() for one in used)]
            results = compat.call_stablehlo(module, values, [*outputs, *updated])
            for one, value in zip(assigned, results[len(outputs) :], strict=True):
                one.assign(value, read_value=False)
            return results[: len(outputs)]

        leaves = [tf.convert_to_tensor(leaf) for leaf in leaves_of(inputs)]
        concrete = program.get_concrete_function(*(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves))
        name = f"exported_{hashlib.sha256(content).hexdigest()}"
        run, handles = compat.named_function(concrete, name), list(concrete.captured_inputs)

        def call(inputs):
            results = run([*(tf.convert_to_tensor(leaf) for leaf in leaves_of(inputs)), *handles])
            return packed(header["outputs"], iter(results))

        return Program(call, content if new else None)

    return make


def described(outputs):
    """Return the structure of outputs, tensors and tuples or dictionaries of them, as JSON has it."""
    if isinstance(outputs, tuple | list):
        return [described(output) for output in outputs]
    if isinstance(outputs, dict):
        return {"keys": {key: described(outputs[key]) for key in sorted(outputs)}}
    return {"shape": outputs.shape.as_list(), "dtype": outputs.dtype.name}


def tensors_of(outputs):
    """Return the (shape, type) of all tensors of described outputs."""
    if isinstance(outputs, list):
        return [tensor for output in outputs for tensor in tensors_of(output)]
    if "keys" in outputs:
        return [tensor for output in outputs["keys"].values() for tensor in tensors_of(output)]
    return [(outputs["shape"], outputs["dtype"])]


def packed(outputs, results):
    """Return an iterator's results in the structure of described outputs."""
    if isinstance(outputs, list):
        return tuple(packed(output, results) for output in outputs)
    if "keys" in outputs:
        return {key: packed(output, results) for key, output in outputs["keys"].items()}
    return next(results)
