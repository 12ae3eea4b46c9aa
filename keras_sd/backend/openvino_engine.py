"""OpenVINO as a second engine on a processor: a function's graph of TensorFlow, compiled by OpenVINO.

OpenVINO multiplies bfloat16 in the units of a processor that has them, which XLA does not. Weights are inputs
of the graph that is kept in the cache folder, so an entry takes a few MB and serves all weights. They become
constants when it is compiled, from their present values; where one has changed, it is compiled again.

At the first call for inputs of new shapes both engines run, and the faster one stays. The entry says which.
"""

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sd import interruption
from keras_sd.arguments import shown
from keras_sd.backend import compat, devices
from keras_sd.backend.compilation import GivenValues, jit
from keras_sd.backend.entries import read_entry, write_entry
from keras_sd.backend.exported import (
    Identity,
    described,
    environment,
    function_of_leaves,
    leaves_of,
    packed,
    signature_of,
    tensors_of,
)
from keras_sd.backend.openvino_marks import marks_of_openvino, tracing_for_openvino
from keras_sd.errors import UserError, installed_version, require
from keras_sd.files.cache import private_folder
from keras_sd.files.json_files import parse_json

ENGINES = ("keras", "openvino")
"""What can compute a model: "keras" is Keras' backend."""

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # as OpenVINO calls them
_CACHE_BYTES = 2**28  # the graph of Stable Diffusion's UNet takes 4 MB
_MOST_SHAPES = 4  # of a function that stay in memory; a compiled UNet holds its weights
_RUNS = 2  # of each engine, after a first one, to see which is faster
_NAME = re.compile(r"(weight|input)_(\d+)")


def check_engine(engine, dtype="float32"):
    """Return the engine, after checking that it can compute here.

    Raises:
        UserError: it is unknown, is not installed, or cannot compute in this precision, on this device or
            beside this backend.
    """
    if engine not in ENGINES:
        raise UserError(f"engine {shown(engine)}: unknown; use {' or '.join(ENGINES)}")
    if engine == "keras":
        return engine
    if dtype not in _PRECISIONS:
        raise UserError(f"engine openvino: does not compute in {dtype}; use {' or '.join(_PRECISIONS)}")
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"engine openvino: cannot read {keras.backend.backend()}'s programs; set "
            "KERAS_BACKEND=tensorflow, or use the engine keras"
        )
    require("openvino", instead="use the engine keras")
    if devices.has_accelerator():
        raise UserError("engine openvino: is for processors, and there is a GPU; use the engine keras")
    return engine


def jit_for_engine(engine, title, dtype, function, variables, jit_compile, identity):
    """Compile a function by `jit`; with the engine "openvino" OpenVINO computes it where that is faster.

    Args:
        engine: one of `ENGINES`.
        title, dtype: as for `OpenVINOFunction`.
        function, variables, jit_compile, identity: as for `jit`.
    """
    program = jit(function, variables, jit_compile, title=title, identity=identity)
    if engine == "keras":
        return program
    return OpenVINOFunction(program, function, variables, identity, title, dtype)


class _Compiled(NamedTuple):
    """What OpenVINO has compiled for inputs of some shapes.

    Attributes:
        call: the function of the inputs, a tuple.
        weights: the values that are constants in it, arrays that share memory with the variables.
    """

    call: Callable[[tuple[Any, ...]], Any]
    weights: list[np.ndarray]


class OpenVINOFunction:
    """A function of tensors that OpenVINO computes for shapes where that is faster than its program.

    Args:
        program: the function as Keras' backend compiles it.
        function: what OpenVINO's graph is made of; takes and returns nests of tensors.
        variables: the Keras variables that it reads.
        identity: an `Identity`, as for `jit`.
        title: what it computes, for lines on standard error, such as "UNet".
        dtype: "float32" or "bfloat16".
    """

    def __init__(
        self,
        program: Callable[..., Any],
        function: Callable[..., Any],
        variables: list[keras.Variable],
        identity: Identity,
        title: str,
        dtype: str,
    ) -> None:
        self._program, self._function = program, function
        self._variables, self._identity = list(variables), identity
        self._title, self._dtype = title, dtype
        self._graphs: dict[Any, _Graph | None] = {}  # signature -> graph; None where the program is faster
        self._compiled: dict[Any, _Compiled] = {}
        self._told: set[str] = set()

    def __call__(self, *inputs):
        signature = signature_of(inputs)
        if signature not in self._graphs:
            return self._first_call(signature, inputs)
        if self._graphs[signature] is None:
            return self._program(*inputs)
        return self._run(signature, inputs)

    def _first_call(self, signature, inputs):
        """Choose the engine for these shapes, and return the result."""
        entry = self._entry(signature)
        kept = None if entry is None else read_entry(entry)
        for content in (None,) if kept is None else (kept, None):
            try:
                return self._chosen(signature, inputs, entry, content)
            except Exception as error:  # of whatever OpenVINO meets that it does not know
                self._graphs.pop(signature, None)
                self._compiled.pop(signature, None)
                if devices.is_out_of_memory(error):
                    raise
                fault = next(iter(str(error).strip().splitlines()), type(error).__name__)
        self._graphs[signature] = None
        result = self._program(*inputs)  # whose errors are not those of OpenVINO
        warnings.warn(f"{self._title}: OpenVINO cannot compute it, so Keras does ({fault})", stacklevel=3)
        return result

    def _chosen(self, signature, inputs, entry, content):
        """Return the result of the engine that an entry names; without its content both are measured."""
        results = None
        if content is None:
            with interruption.phase(f"converting the {self._title} for OpenVINO", in_commands=True):
                self._graphs[signature] = _convert(self._function, self._variables, inputs)
            calls = (lambda: self._program(*inputs)), (lambda: self._run(signature, inputs))
            with interruption.phase(f"comparing two engines for the {self._title}", in_commands=True):
                seconds, results = zip(*map(_timed, calls), strict=True)
            graph = self._graphs[signature]._replace(seconds=list(seconds))
            if entry is not None:
                write_entry(entry, graph.to_bytes(), _CACHE_BYTES)
        else:
            graph = _Graph.of_bytes(content)
        self._graphs[signature] = graph if graph.is_faster else None
        if not graph.is_faster:
            self._compiled.pop(signature, None)
        result = results[graph.is_faster] if results else self(*inputs)
        self._tell(graph)
        return result

    def _run(self, signature, inputs):
        compiled = self._compiled.get(signature)
        weights = [compat.shared_array(variable) for variable in self._variables]
        if compiled is None or not _are_same(weights, compiled.weights):
            self._compiled.pop(signature, None)  # before the next one is made, as each holds all weights
            with interruption.phase(f"compiling the {self._title} for OpenVINO", in_commands=True):
                call = _compile(self._graphs[signature], weights, self._dtype)
            compiled = _Compiled(call, weights)
            while len(self._compiled) >= _MOST_SHAPES:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[signature] = compiled
        return compiled.call(inputs)

    def _entry(self, signature):
        identity = self._identity()
        folder = None if identity is None else private_folder("openvino")
        if folder is None:
            return None
        variables = [(variable.name, tuple(variable.shape), variable.dtype) for variable in self._variables]
        # Which engine is faster depends on the processor, and on how much of it there is.
        machine = [sorted(devices.processor_flags()), os.cpu_count()]
        versions = [installed_version("openvino"), environment()]
        text = json.dumps([identity, repr(signature), variables, self._dtype, machine, versions])
        return folder / hashlib.sha256(text.encode()).hexdigest()

    def _tell(self, graph):
        """Say in commands which engine computes this."""
        ours, theirs = graph.seconds
        engine = "OpenVINO" if graph.is_faster else "Keras"
        if engine not in self._told:
            self._told.add(engine)
            interruption.tell(
                f"{self._title}: by {engine} ({theirs:.2g} s a call by OpenVINO, {ours:.2g} s by Keras)"
            )


class _Graph(NamedTuple):
    """A converted graph, whose inputs are weights and inputs of the function.

    Attributes:
        xml, constants: OpenVINO's two files.
        outputs: the structure of the results, as `described` gives it.
        seconds: of a call, of Keras and of OpenVINO; None before both were measured.
    """

    xml: bytes
    constants: bytes
    outputs: Any
    seconds: list[float] | None = None

    @property
    def is_faster(self):
        """Whether OpenVINO is the faster one."""
        return self.seconds[1] < self.seconds[0]

    def to_bytes(self):
        """Return what an entry of the cache holds."""
        header = {"outputs": self.outputs, "seconds": self.seconds, "length": len(self.xml)}
        return json.dumps(header).encode() + b"\n" + self.xml + self.constants

    @classmethod
    def of_bytes(cls, content):
        """Return the graph of an entry."""
        first_line, files = content.split(b"\n", 1)
        header = parse_json(first_line, "header")
        length = header["length"]
        return cls(files[:length], files[length:], header["outputs"], header["seconds"])


def _convert(function, variables, inputs):
    """Return the `_Graph` of a function for inputs of these shapes."""
    import openvino
    import tensorflow as tf

    of_leaves = function_of_leaves(function, inputs)

    def with_weights(*tensors):
        weights, leaves = tensors[: len(variables)], tensors[len(variables) :]
        with GivenValues(variables, weights):
            return of_leaves(leaves)

    leaves = [tf.convert_to_tensor(leaf) for leaf in leaves_of(inputs)]
    specs = [
        tf.TensorSpec(variable.shape, variable.dtype, f"weight_{place}")
        for place, variable in enumerate(variables)
    ] + [tf.TensorSpec(leaf.shape, leaf.dtype, f"input_{place}") for place, leaf in enumerate(leaves)]
    with tracing_for_openvino():
        traced = tf.function(with_weights, autograph=False).get_concrete_function(*specs)
    model = _read_by_openvino(_in_float32(traced.graph.as_graph_def()), traced.outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.xml")
        openvino.serialize(model, path, path.with_suffix(".bin"))
        files = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return _Graph(*files, described(traced.structured_outputs))


def _read_by_openvino(graph, outputs):
    """Return OpenVINO's model of a graph of TensorFlow.

    `openvino.convert_model` does the same, but imports torch where it is installed, and TensorFlow and torch
    do not go together in one process.

    Args:
        graph: its definition, which holds no variables.
        outputs: the tensors that it returns.
    """
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("tf")
    for extension in marks_of_openvino():
        frontend.add_extension(extension)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.pb")
        path.write_bytes(graph.SerializeToString())
        model = frontend.load(str(path))
        model.override_all_outputs([model.get_place_by_tensor_name(tensor.name) for tensor in outputs])
        return frontend.convert(model)


def _in_float32(graph):
    """Return a graph's definition with float32 in place of bfloat16, of which OpenVINO reads no constants.

    OpenVINO itself then computes in bfloat16 what it can, as its precision hint says.
    """
    import tensorflow as tf

    half, single = tf.bfloat16.as_datatype_enum, tf.float32.as_datatype_enum
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    for value in (value for node in nodes for value in node.attr.values()):
        if value.type == half:
            value.type = single
        if half in value.list.type:
            value.list.type[:] = [single if one == half else one for one in value.list.type]
        if value.HasField("tensor") and value.tensor.dtype == half:
            array = tf.make_ndarray(value.tensor).astype("float32")
            value.tensor.CopyFrom(tf.make_tensor_proto(array))
    for function in graph.library.function:
        for argument in (*function.signature.input_arg, *function.signature.output_arg):
            if argument.type == half:
                argument.type = single
    return graph


def _compile(graph, weights, dtype):
    """Return the function of inputs that OpenVINO computes with these weights as constants."""
    import openvino

    core = openvino.Core()
    constants = np.frombuffer(graph.constants, "uint8")
    model = core.read_model(graph.xml, openvino.Tensor(constants) if len(constants) else None)
    places = []
    for parameter in model.get_parameters():
        kind, place = _place_of(parameter)
        if kind == "input":
            places.append(place)
            continue
        constant = _constant(weights[place])
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(constant)
        model.remove_parameter(parameter)
    # Where kernels are kept in 8 bits, it would round the inputs to 8 bits, too.
    settings = {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call(inputs):
        import tensorflow as tf

        leaves = [np.asarray(leaf) for leaf in leaves_of(inputs)]
        leaves = [leaf.astype("float32") if leaf.dtype.name == "bfloat16" else leaf for leaf in leaves]
        results = request.infer([leaves[place] for place in places])
        shapes = tensors_of(graph.outputs)
        tensors = [
            tf.cast(tf.convert_to_tensor(results[index]), kind) for index, (_, kind) in enumerate(shapes)
        ]
        return packed(graph.outputs, iter(tensors))

    return call


def _place_of(parameter):
    """Return what an input of a graph is, "weight" or "input", and its place among them."""
    for name in parameter.output(0).get_names():
        found = _NAME.match(name)
        if found:
            return found[1], int(found[2])
    raise ValueError(f"{parameter.get_friendly_name()}: an input without a place")


def _constant(array):
    """Return an array as an output of OpenVINO's graph, in float32."""
    import openvino
    from openvino import opset13

    if array.dtype.name != "bfloat16":
        return opset13.constant(array, shared_memory=True).output(0)
    tensor = openvino.Tensor(array.view("uint16"), list(array.shape), openvino.Type.bf16)
    return opset13.convert(opset13.constant(tensor, shared_memory=True), "f32").output(0)


def _are_same(arrays, others):
    """Return whether arrays are in the same memory; while it is held, TensorFlow writes nothing into it."""
    return all(_address(one) == _address(other) for one, other in zip(arrays, others, strict=True))


def _address(array):
    return array.__array_interface__["data"][0]


def _timed(call):
    """Return the shortest time of a call, after a first one, and its result."""
    times = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        result = call()
        keras.tree.map_structure(keras.ops.convert_to_numpy, result)
        times.append(time.perf_counter() - start)
    return min(times[1:]), result
