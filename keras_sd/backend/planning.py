"""Programs that are compiled and never run: for the devices at hand, or for TPUs that are not there.

While a process plans, Keras' variables have shapes and no values, and the results of a program of `jit` are
zeros: it is remembered, and compiled for the planned devices later. So a command goes through its own code to
the training step, with its own shapes. What the compiler counts of a program is kept for the next plan.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_sd.backend import compat
from keras_sd.backend.collectives import collective_bytes
from keras_sd.backend.entries import read_entry, write_entry
from keras_sd.backend.memory import memory_of
from keras_sd.backend.operations import operations_of
from keras_sd.errors import UserError
from keras_sd.files.cache import private_folder
from keras_sd.files.json_files import parse_json

_NEEDED = re.compile(r"\(?([\d.]+)G\)? (?:of|exceeds available HBM \() ?([\d.]+)G")
_LOCKED = re.compile(r"lockfile|already in use", re.IGNORECASE)
_FORMAT = 1  # of kept figures
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """What is known of a program that was compiled; bytes and operations are those of each device.

    Attributes:
        title: what it computes.
        batch: length of the first axis of its first input.
        memory: arguments, results and temporaries, as in `ProgramMemory`; None if it does not fit, or the
            compiler does not count it.
        needed, available: bytes, by the compiler's message, if it does not fit.
        operations: of matrix multiplications and convolutions.
        traffic: bytes that at least go to and from memory: arguments, and results that are not one of them.
        sent: bytes of arrays sent between devices, by kind (`collectives.collective_bytes`).
        seconds: of compilation.
    """

    title: str
    batch: int
    memory: dict[str, int] | None
    needed: int | None
    available: int | None
    operations: int
    traffic: int
    sent: dict[str, int]
    seconds: float


class Plan:
    """The devices that a process compiles for, and the programs that it has compiled.

    Args:
        devices: JAX's, all of one kind.
        processes: number of processes among which the run will divide them.

    Attributes:
        programs: those that are compiled.
        pending: the arguments of `compile_planned` of those that are not.
        facts: JSON values on the run, for whoever shows the plan.
    """

    def __init__(self, devices: Sequence[Any], processes: int = 1) -> None:
        self.devices, self.processes = list(devices), processes
        self.facts: dict[str, Any] = {}
        self.programs: list[PlannedProgram] = []
        self.pending: list[tuple[Any, ...]] = []

    def compile_pending(self) -> None:
        """Compile the programs of `jit` that were called."""
        while self.pending:
            compile_planned(*self.pending.pop(0))

    @property
    def platform(self) -> str:
        """The platform of its devices: "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform


_plan: Plan | None = None


def plan() -> Plan | None:
    """Return what this process plans; None in one that computes."""
    return _plan


def start_plan(devices: Sequence[Any], processes: int = 1) -> Plan:
    """Compile, from now on and to the end of this process, for these devices, and compute nothing."""
    global _plan
    import jax

    # A program that is read from the cache would not have all figures.
    jax.config.update("jax_enable_compilation_cache", False)
    _plan = Plan(devices, processes)
    compat.leave_variables_without_values(_on_first)
    return _plan


def devices_here(several: bool) -> list[Any]:
    """Return JAX's devices of this machine, or the first one alone."""
    import jax

    return jax.devices() if several else jax.devices()[:1]


def tpu_devices(topology: str) -> list[Any]:
    """Return JAX's devices of TPUs that are not there; this process must have `tpu_environment`.

    Args:
        topology: kind and layout of the chips, such as "v5e:2x4".

    Raises:
        UserError: libtpu is in use by another process, or does not know the topology.
    """
    # Chips of a host: otherwise those of a topology must fill whole hosts of four.
    lengths = [int(length) for length in topology.partition(":")[2].split("x")]
    options = {"chips_per_host_bounds": [1, 1, 1]} if max(lengths) == 1 else {}
    try:
        return compat.tpu_topology(topology, **options)
    except Exception as error:
        line = str(error).splitlines()[0]
        if _LOCKED.search(line):
            raise UserError(
                f"plan {topology}: another process uses libtpu, and only one can at a time; wait for its end"
            ) from error
        raise UserError(f"plan {topology}: libtpu refuses it ({line}); give another layout") from error


def tpu_environment() -> dict[str, str]:
    """Return the environment variables of a process that compiles for TPUs that are not there."""
    return {
        "JAX_PLATFORMS": "cpu",
        # Of which machine this is one worker, libtpu would otherwise ask the network.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu only warns without one.
        "TPU_ACCELERATOR_TYPE": os.environ.get("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }


def compile_planned(title: str, program: Any, *inputs: Any, parts: int | None = 1) -> Any:
    """Compile a program of `jax.jit` for the planned devices; return the shapes of its results.

    Args:
        title: what it computes.
        inputs: nests of arrays or `jax.ShapeDtypeStruct`; those without a sharding get the first device's.
        parts: among how many devices its work is divided; None for XLA's own count.
    """
    import jax

    assert _plan is not None
    _say(f"tracing the {title}")
    traced = program.trace(*inputs)
    operations = operations_of(traced.jaxpr) // (parts or 1)
    lowered = traced.lower()
    batch = jax.tree.leaves(inputs[-1])[0].shape[0]
    entry = _entry([title, parts, operations, batch], lowered)
    kept = None if entry is None else read_entry(entry)
    if kept is None:
        program = _compiled(title, lowered, operations, batch, parts)
        if entry is not None:
            write_entry(entry, json.dumps(dataclasses.asdict(program)).encode())
    else:
        program = PlannedProgram(**parse_json(kept, "plan"))
    _plan.programs.append(program)
    return lowered.out_info


def _entry(facts, lowered):
    """Return the path of a program's kept figures, or None: a compilation for TPUs takes minutes."""
    folder = private_folder("plans")
    if folder is None:
        return None
    versions = [importlib.metadata.version(package) for package in ("jax", "jaxlib")]
    if _plan.platform == "tpu":
        versions.append(importlib.metadata.version("libtpu"))
    settings = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    kind = [_plan.devices[0].device_kind, len(_plan.devices)]
    text = json.dumps([facts, versions, settings, kind, _FORMAT]) + lowered.as_text()
    return folder / hashlib.sha256(text.encode()).hexdigest()


def _compiled(title, lowered, operations, batch, parts):
    """Compile a lowered program; return it as a `PlannedProgram`."""
    _say(f"compiling the {title}{', which may take minutes' if _plan.platform == 'tpu' else ''}")
    start = time.monotonic()
    memory, needed, available, traffic, sent = None, None, None, 0, {}
    try:
        compiled = lowered.compile()
        counted, sent = memory_of(compiled), collective_bytes(compiled.as_text())
        if counted is not None:
            memory = counted._asdict()
            traffic = counted.arguments + counted.results
        if parts is None:
            operations = int(compiled.cost_analysis()["flops"])
    except RuntimeError as error:
        found = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        needed, available = (int(float(number) * _GIB) for number in found.groups())
    seconds = time.monotonic() - start
    figures = memory, needed, available, operations, traffic, sent, round(seconds, 1)
    return PlannedProgram(title, batch, *figures)


def _say(text):
    print(f"plan: {text}", file=sys.stderr, flush=True)


def _on_first():
    """Return the sharding of an array on the first device alone."""
    import jax

    assert _plan is not None
    return jax.sharding.SingleDeviceSharding(_plan.devices[0])


def shapes_of(inputs: Any, sharding: Any = None) -> Any:
    """Return the shapes of a nest of arrays as `jax.ShapeDtypeStruct`, on the first planned device.

    Args:
        sharding: another sharding.
    """
    import jax

    sharding = sharding or _on_first()

    def shape(array):
        array = array if hasattr(array, "dtype") else np.asarray(array)
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    return jax.tree.map(shape, inputs)


class PlannedFunction:
    """A function of `jit` in a process that plans; `Plan.compile_pending` compiles it for all shapes.

    Args:
        title: what it computes.
        program: `jax.jit` of a function of the variables' values and the inputs.
        variables: the Keras variables that it reads.
        sharding: that of its inputs; None for the first device alone, which has the variables, too.
    """

    def __init__(
        self, title: str, program: Any, variables: Sequence[keras.Variable], sharding: Any = None
    ) -> None:
        self._title, self._program, self._variables = title, program, list(variables)
        self._sharding = sharding
        self._zeros: dict[Any, Any] = {}

    def __call__(self, *inputs: Any) -> Any:
        import jax

        shapes = shapes_of(inputs, self._sharding)
        signature = str(shapes)
        if signature not in self._zeros:
            values = [compat.stored_value(variable) for variable in self._variables]
            if self._sharding is None:
                values = shapes_of(values)
            assert _plan is not None
            _plan.pending.append((self._title, self._program, values, shapes))
            results = jax.eval_shape(self._program, values, shapes)
            self._zeros[signature] = jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), results)
        return self._zeros[signature]


def plan_step(title: str, model: keras.Model, batch: dict[str, Any], parts: int | None) -> None:
    """Compile the training step of a compiled Keras model.

    Args:
        title: what it computes.
        batch: name -> array of the whole batch.
        parts: as in `compile_planned`.
    """
    import jax

    distribution = keras.distribution.distribution()

    def on_devices(array):
        layout = distribution and distribution.get_data_layout(array.shape)
        return shapes_of(array, layout and layout.backend_layout)

    options = {} if distribution is None else {"out_shardings": (None, compat.state_shardings(model))}
    step = jax.jit(lambda state, data: model.train_step(state, data), donate_argnums=0, **options)
    data = {name: on_devices(array) for name, array in batch.items()}
    compile_planned(title, step, compat.state_of(model), data, parts=parts)
