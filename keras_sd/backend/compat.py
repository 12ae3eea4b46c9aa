"""All uses of private and experimental functions of Keras, TensorFlow and JAX.

No other module uses or overrides them (a test checks that). Each function here says why no public one will
do. A later version may change them without notice. So `setup.cfg` allows only the versions of `SUPPORTED`,
and importing this module checks that all of them exist; a missing one is an error of one line.
"""

import contextlib
import importlib
import importlib.metadata
import os
import re
import secrets
import weakref
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_sd.errors import UserError

SUPPORTED = {"keras": ">=3.15.1,<3.16", "tensorflow": ">=2.21,<2.22", "jax": ">=0.10,<0.12"}
"""Package -> the versions whose private functions are those used here."""


# Keras

STRATEGIES = ("_distribute_strategy", "_distribution_strategy")
"""Attributes in which Keras keeps TensorFlow's strategy (`has_strategy`) of a model and of an optimizer."""

NUMBERING = ("_tracker", "_trainable_variables_indices")
"""Attributes in which Keras keeps the `id` of objects, which is another one in each process."""


def stored_value(variable):
    """Return a variable's tensor.

    The public `value` checks whether to cast it, which for a thousand variables takes longer than a step.
    """
    return variable._value


def shared_array(variable):
    """Return a variable's value on TensorFlow as an array that shares its memory, on a processor.

    As long as the array is held, TensorFlow writes new values of the variable to other memory. The public
    functions copy the value, which takes seconds for all weights of a UNet.
    """
    return variable._value.value()._numpy_internal()


def current_value(variable):
    """Return a variable's tensor, or its value in a `StatelessScope`; `value` casts it to half precision."""
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    scope = get_stateless_scope()
    value = None if scope is None else scope.get_current_value(variable)
    return variable._value if value is None else value


def lay_out(variable, layout):
    """Shard a variable over devices as in a `keras.distribution.TensorLayout`.

    Keras sets a layout only when it creates a variable, by a path that has no attribute names in our models.
    """
    variable._layout = layout
    if _is_shape(variable._value):
        variable._value = variable._value.update(sharding=layout.backend_layout)
    else:
        variable.assign(variable.value)


def _is_shape(value):
    """Return whether a variable's value is the shape alone (`leave_variables_without_values`)."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(value, jax.ShapeDtypeStruct)


def leave_variables_without_values(sharding):
    """Give Keras' variables on JAX, from now on, a shape, a type and a sharding in place of a value.

    An assignment outside of a trace has no effect. Keras has no such variables: one that is made in a
    `StatelessScope` gets its value at the end of it.

    Args:
        sharding: returns the sharding of a variable without a layout.
    """
    import jax

    kind = keras.src.backend.jax.core.JaxVariable
    assign_in_trace = kind.assign

    def leave(self, value=None):
        if self._layout is None:
            self._initialize_layout()
        layout = self._layout
        if isinstance(layout, keras.distribution.TensorLayout):
            layout = layout.backend_layout
        self._value = jax.ShapeDtypeStruct(self._shape, self._dtype, sharding=layout or sharding())

    def initialize(self, value):
        self._shape = self._validate_shape(value.shape)
        leave(self)

    def assign(self, value):
        is_traced = keras.src.backend.common.stateless_scope.in_stateless_scope()
        return assign_in_trace(self, value) if is_traced else value

    kind._initialize, kind._initialize_with_initializer = initialize, leave
    kind._direct_assign, kind.assign = leave, assign


@contextlib.contextmanager
def host_value(variable, array):
    """Have a variable read from a NumPy array inside the block; Keras' own assignment moves it to devices."""
    before, variable._value = variable._value, array
    try:
        yield
    finally:
        variable._value = before


def state_shardings(model):
    """Return how Keras' JAX trainer divides the state of `fit()` among the devices of a distribution."""
    return model._get_state_sharding_spec()


def state_of(model):
    """Return the state of `fit()` as Keras' JAX trainer passes it to a training step."""
    groups = ("trainable", "non_trainable", "optimizer", "metrics")
    return model._get_jax_state(**{f"{group}_variables": True for group in groups})


@contextlib.contextmanager
def unlocked(layer):
    """Allow layers to be added to a built layer inside the block; Keras refuses that."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def forget(layer, child):
    """Remove a layer from the weights of another one, which replacing the attribute does not do."""
    layer._tracker.untrack(child)


def forget_variable(layer, variable):
    """Remove a variable from the weights of a layer, which replacing the attribute does not do."""
    layer._untrack_variable(variable)


def sync_state(model):
    """Give the variables of model and optimizer their present values.

    During an epoch on JAX the values live in Keras' training loop and the variables are empty; on TensorFlow
    there is nothing to do.
    """
    if keras.backend.backend() == "jax" and isinstance(model, keras.Model):
        model.jax_state_sync()


def drop_partial_update(optimizer):
    """Drop the gradients of batches since the last update, of an optimizer that accumulates them."""
    accumulation = optimizer.gradient_accumulation_steps
    if accumulation:
        optimizer._backend_reset_gradient_accumulators()
        # Keras counts batches.
        optimizer._iterations.assign(optimizer._iterations // accumulation * accumulation)


class _HostZeros(keras.initializers.Initializer):
    """Zeros of NumPy. For Keras' own JAX compiles a program for each of a hundred shapes."""

    def __call__(self, shape, dtype=None):
        return np.zeros(shape, dtype)


def _zeros():
    """Return the initializer of an optimizer's state."""
    if keras.backend.backend() == "jax" and keras.distribution.distribution() is None:
        return _HostZeros()
    return "zeros"  # which are made where they belong


class JointOptimizer(keras.optimizers.Optimizer):
    """An optimizer with one call, of `update_all` in a subclass, for all variables and the weight decay.

    The public hook, `update_step`, is called for each variable, which takes most of the time to trace a small
    model. No public hook passes the norm of the gradients on, which clipping computes.
    """

    def _apply_weight_decay(self, variables):
        """Do nothing: the update applies the decay. Keras would trace the schedule once for each variable."""

    def _clip_gradients(self, gradients):
        norm = ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(gradient)) for gradient in gradients])))
        self.measure(norm)
        if not self.global_clipnorm:
            return super()._clip_gradients(gradients)
        # As Keras clips, with the norm from above; one that is not finite makes all gradients so.
        scale = self.global_clipnorm * ops.minimum(1.0 / norm, 1.0 / self.global_clipnorm) + (norm - norm)
        return [gradient * scale for gradient in gradients]

    def _backend_update_step(self, gradients, variables, learning_rate):
        self.update_all(gradients, variables, learning_rate)

    def index_of(self, variable: keras.Variable) -> int:
        """Return the position of a variable among the trained ones."""
        return self._get_variable_index(variable)

    def add_state(
        self,
        variable: keras.Variable | None,
        kind: str,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        first: float = 0.0,
    ) -> keras.Variable:
        """Create a variable of the optimizer.

        Args:
            variable: the trained variable, whose shape and split over devices it has unless `shape` is given.
            kind: its name.
            shape: its own shape.
            dtype: its own type; by default that of the trained variable, or float32.
            first: its first value.
        """
        name = kind.replace(" ", "_")
        if shape is None and dtype is None:
            return self.add_variable_from_reference(variable, name=name, initializer=_zeros())
        return self.add_variable(
            variable.shape if shape is None else shape,
            initializer=keras.initializers.Constant(first) if first else _zeros(),
            dtype=dtype or "float32",
            layout=getattr(variable, "_layout", None) if shape is None else None,
            name=name,
        )


# TensorFlow


def shared_tensor(array):
    """Return a tensor on the memory of a NumPy array; `tf.convert_to_tensor` copies it."""
    import tensorflow as tf

    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def is_traced_for_xla():
    """Return whether TensorFlow is tracing a graph for XLA; no public function says so."""
    import tensorflow as tf
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def compute_capability(device):
    """Return the compute capability of one of TensorFlow's GPUs, as (8, 0); (0, 0) if it has none."""
    import tensorflow as tf

    return tf.config.experimental.get_device_details(device).get("compute_capability", (0, 0))


def call_stablehlo(module, arguments, outputs):
    """Call a serialised StableHLO module in a function that XLA compiles; no public operation does.

    Args:
        module: its bytes.
        arguments: list of tensors.
        outputs: list of (shape, name of the type).

    Returns:
        A list of tensors.
    """
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    shapes, types = zip(
        *((tf.TensorShape(shape), tf.as_dtype(dtype)) for shape, dtype in outputs), strict=True
    )
    platform = "CUDA" if tf.config.list_logical_devices("GPU") else "CPU"
    version = xla.call_module_maximum_supported_version()
    return list(
        xla.call_module(
            arguments, version=version, module=module, Sout=shapes, Tout=types, platforms=[platform]
        )
    )


def has_strategy():
    """Return whether a strategy of TensorFlow places this computation on devices of its choice."""
    import tensorflow as tf

    return tf.distribute.has_strategy()


def assigns(concrete):
    """Return whether a concrete function assigns to a variable, itself or in a function that it calls."""
    types = {operation.type for operation in concrete.graph.get_operations()}
    for definition in concrete.graph.as_graph_def().library.function:
        types |= {node.op for node in definition.node_def}
    return any(name.startswith(("Assign", "ResourceApply", "ResourceScatter")) for name in types)


def named_function(concrete, name):
    """Return a function of a list of tensors, a concrete function's inputs and captures, under a name.

    TensorFlow numbers its functions, and the number is part of the compilation cache's key: a process that
    traces in another order would find no program. No public function chooses a name.

    Args:
        concrete: the concrete function. It and its captures may go.
        name: names the computation; one that is known already is not defined anew.
    """
    from tensorflow.python.eager import context

    known, outputs = context.context(), len(concrete.outputs)
    if not known.has_function(name):
        definition = type(concrete.function_def)()
        definition.CopyFrom(concrete.function_def)
        definition.signature.name = name
        known.add_function_def(definition)
    return lambda tensors: known.call_function(name.encode(), tensors, outputs)


def free_gradients_with_graphs():
    """Let TensorFlow free graphs with custom gradients, and the weights that they hold.

    For each custom gradient that is traced, `tf.nn.silu`'s included, TensorFlow keeps a function in a
    registry for ever. The function holds the tensors of its graph, and so the whole graph and all variables
    in it: each model that has computed anything would stay in memory. No public function removes an entry.
    """
    from tensorflow.python.framework.ops import gradient_registry

    if not isinstance(gradient_registry._registry, _GradientsOfGraphs):
        gradient_registry._registry = _GradientsOfGraphs(gradient_registry._registry)


class _GradientsOfGraphs(dict):
    """A registry of gradients where custom ones live as long as the graph in which they are traced."""

    def __setitem__(self, name, entry):
        if name.startswith("CustomGradient-"):
            import tensorflow as tf

            function = entry["type"]
            # An attribute of the graph by this name holds the function.
            setattr(tf.compat.v1.get_default_graph(), name, function)
            weakref.finalize(function, self.pop, name, None).atexit = False
            found = weakref.ref(function)
            entry = entry | {"type": lambda *arguments: found()(*arguments)}
        super().__setitem__(name, entry)


# JAX


def trace_settings():
    """Return JAX's settings that change what is traced, as text; no public function names them."""
    if keras.backend.backend() != "jax":
        return ""
    from jax._src.config import trace_context

    return re.sub(r" at 0x[0-9a-f]+", "", repr(trace_context()))


def tpu_topology(name, **options):
    """Return JAX's devices of a topology of TPUs, for which libtpu compiles where there are none."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def outputs_first(variable):
    """Return the memory layout with outputs first of a convolution's kernel `(height, width, in, out)`.

    JAX has no other way to say how an array lies in memory.
    """
    from jax.experimental.layout import Format, Layout

    return Format(Layout(major_to_minor=(3, 0, 1, 2)), variable.value.sharding)


def gathered(array, tiled=False):
    """Return the arrays of all processes, stacked, or if `tiled` an array whose shards are in all of them.

    Public collectives work in compiled functions only.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=tiled)


def processes_stop_at(step):
    """Return whether all processes stop after this step, since one of them has received SIGTERM.

    All processes must call it at every step. No public function passes a signal on to the other processes.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def write_programs_whole(folder):
    """Make JAX write the programs of its cache in `folder` atomically, and replace damaged ones.

    JAX writes under the final name and never replaces a file. So a program that was truncated by a kill or a
    full disk would cause a warning and be compiled at each start. No option changes that.
    """
    from jax._src import lru_cache

    put = lru_cache.LRUCache.put

    def put_whole(cache, key, value):
        if cache.eviction_enabled or Path(os.fspath(cache.path)) != folder:  # someone else's
            return put(cache, key, value)
        staging = folder / f".{secrets.token_hex(8)}.partial"
        try:
            staging.write_bytes(value)
            os.replace(staging, folder / f"{key}{lru_cache._CACHE_SUFFIX}")
        finally:
            staging.unlink(missing_ok=True)

    lru_cache.LRUCache.put = put_whole


# The names to check: module, class or object in it (dotted, or empty), names there.
_KERAS = (
    ("keras", "Variable", "_value", "_layout"),
    ("keras.src.backend.common.stateless_scope", "", "get_stateless_scope"),
    ("keras.src.utils.tracking", "Tracker", "lock", "unlock", "untrack"),
    ("keras", "layers.Layer", "_tracker"),
    ("keras", "optimizers.Optimizer", "_apply_weight_decay", "_backend_update_step", "_clip_gradients"),
    ("keras", "optimizers.Optimizer", "_get_variable_index", "_trainable_variables_indices"),
)
_BACKENDS = {
    "tensorflow": (
        ("tensorflow", "experimental.dlpack", "from_dlpack"),
        ("tensorflow", "config.experimental", "get_device_details"),
        ("tensorflow.python.framework.ops", "_EagerTensorBase", "_numpy_internal"),
        ("tensorflow.python.ops.control_flow_util", "", "GraphOrParentsInXlaContext"),
        ("tensorflow.python.eager.context", "Context", "add_function_def", "call_function", "has_function"),
        ("tensorflow.python.framework.ops", "gradient_registry", "_registry"),
        (
            *("tensorflow.compiler.tf2xla.python.xla", ""),
            *("call_module", "call_module_maximum_supported_version"),
        ),
    ),
    "jax": (
        ("keras", "Model", "jax_state_sync", "_get_jax_state"),
        (
            "keras.src.backend.jax.core",
            "JaxVariable",
            *("_initialize", "_initialize_with_initializer", "_initialize_layout", "_direct_assign"),
        ),
        ("jax.experimental.layout", "", "Format", "Layout"),
        ("jax.experimental.topologies", "", "get_topology_desc"),
        ("jax.experimental.multihost_utils", "", "process_allgather", "reached_preemption_sync_point"),
        ("jax._src.config", "", "trace_context"),
        ("jax._src.lru_cache", "", "_CACHE_SUFFIX"),
        ("jax._src.lru_cache", "LRUCache", "put", "path", "eviction_enabled"),
    ),
}


def check(needed):
    """Raise a UserError unless all private names exist.

    Args:
        needed: entries like those of `_KERAS`.
    """
    for module, place, *names in needed:
        for name in names:
            if not _is_there(module, place, name):
                package = module.split(".")[0]
                missing = ".".join(part for part in (module, place, name) if part)
                raise UserError(
                    f"{package} {importlib.metadata.version(package)}: has no {missing}; "
                    f"install '{package}{SUPPORTED[package]}'"
                )


def _is_there(module, place, name):
    """Return whether a module or class has a name; a class may also assign it in a method."""
    try:
        found = importlib.import_module(module)
        for part in place.split(".") if place else ():
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    if hasattr(found, name) or not isinstance(found, type):
        return hasattr(found, name)
    methods = (method for kind in found.__mro__ for method in vars(kind).values())
    return any(name in method.__code__.co_names for method in methods if hasattr(method, "__code__"))


check(_KERAS + _BACKENDS.get(keras.backend.backend(), ()))
