"""All that depends on the Keras backend."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import secrets
from pathlib import Path

import keras
import numpy as np

from keras_sd.files.cache import cache_root

# What TensorFlow's kernels take for granted of memory that is not their own.
_ALIGNMENT = 64

# Features of a head that cuDNN's attention takes, before and since NVIDIA's Hopper.
_LARGEST_FLASH_HEAD, _LARGEST_FLASH_HEAD_ON_HOPPER = 128, 256

# XLA's status, its compilers' own words (TPUs count the memory of a program beforehand), and TensorFlow's.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|ResourceExhausted|Ran out of memory|Out of memory|OOM when allocating", re.IGNORECASE
)

_CACHE_BYTES = 4 * 2**30
_FLAG = "--tf_xla_persistent_cache_directory="


def cache_folder():
    """Where programs compiled by XLA are kept for the next process, or None where they are not.

    Machine code fits the processor and the version that it was made for and no other: both name the folder.
    """
    root = cache_root()
    if root is None:
        return None
    name = keras.backend.backend()
    try:
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        version = importlib.metadata.version(name)
    except (OSError, importlib.metadata.PackageNotFoundError):  # another system, or a nightly build
        return None
    processor = sorted(
        {line for line in information.splitlines() if line.startswith(("flags", "Features", "model name"))}
    )
    digest = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:16]
    return root / "xla" / f"{name}-{version}-{digest}"


def _keep_compiled_programs():
    """Has XLA look for a program in `cache_folder` before it compiles, and put it there afterwards.

    Whoever has named a folder to the backend keeps it. TensorFlow reads its flags at the first compilation.
    """
    folder = cache_folder()
    if folder is None:
        return
    # What this process inherits may be what its parent has set here.
    flags = re.sub(rf"{_FLAG}\S*/xla/tensorflow-\S*", "", os.environ.get("TF_XLA_FLAGS", "")).strip()
    if keras.backend.backend() == "tensorflow" and _FLAG in flags:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_oldest(folder)
    except OSError:  # a home that cannot be written to; programs are compiled each time
        return
    if keras.backend.backend() == "tensorflow":
        os.environ["TF_XLA_FLAGS"] = f"{flags} {_FLAG}{folder}".strip()
        return

    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Smaller programs compile as fast as they are read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        _write_programs_whole()


def _write_programs_whole():
    """Has JAX write programs under a temporary name, and over damaged ones.

    It writes them straight onto their names and leaves alone what is there: a program that was cut off by a
    kill or a full disk would be a warning, and be compiled, at each start.
    """
    from jax._src import lru_cache

    put = lru_cache.LRUCache.put

    def put_whole(cache, key, value):
        folder = Path(os.fspath(cache.path))
        if cache.eviction_enabled or folder != cache_folder():  # someone else's
            return put(cache, key, value)
        staging = folder / f".{secrets.token_hex(8)}.partial"
        try:
            staging.write_bytes(value)
            os.replace(staging, folder / f"{key}{lru_cache._CACHE_SUFFIX}")
        finally:
            staging.unlink(missing_ok=True)

    lru_cache.LRUCache.put = put_whole


def _forget_oldest(folder):
    """Removes the programs made first until those left take no more than `_CACHE_BYTES`."""
    entries = []
    for entry in os.scandir(folder):
        status = entry.stat()
        entries.append((status.st_mtime, status.st_size, entry.path))
    size = sum(entry[1] for entry in entries)
    for _, length, path in sorted(entries):
        if size <= _CACHE_BYTES:
            break
        Path(path).unlink(missing_ok=True)  # another process may have been faster
        size -= length


_keep_compiled_programs()


def jit(function, variables=(), jit_compile=True):
    """Compiles a pure function of tensors by XLA; it is traced once for each set of input shapes.

    Args:
        function: takes and returns nests of tensors (or NumPy arrays); None stands for itself.
        variables: the Keras variables that it reads. Their values are inputs of the program, not
            constants in it: an assignment is seen by the next call and compiles nothing. One that is
            missing here is a RuntimeError.
        jit_compile: False leaves XLA out on TensorFlow; JAX always compiles by it.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Variables are captured by reference.
        return tf.function(function, jit_compile=jit_compile, autograph=False)

    import jax

    variables = list(variables)
    kernels = [place for place, variable in enumerate(variables) if _lies_otherwise(variable)]
    # Every process has the whole of what comes out, however the variables are split.
    options = {"out_shardings": _replicated()}
    if kernels:
        layouts = [None] * len(variables)
        for place in kernels:
            layouts[place] = _outputs_first(variables[place])
        options["in_shardings"] = (layouts, None)

    @functools.partial(jax.jit, **options)
    def program(values, inputs):
        with _GivenValues(variables, values):
            return function(*inputs)

    turned = dict.fromkeys(kernels, (None, None))  # a kernel's value, and its copy in that layout

    def call(*inputs):
        # A GPU is done with a step in less than Keras takes to ask each variable whether it is cast.
        values = [variable._value for variable in variables]
        for place in kernels:
            if values[place] is not turned[place][0]:
                turned[place] = values[place], jax.device_put(values[place], layouts[place])
            values[place] = turned[place][1]
        return program(values, inputs)

    return call


def _lies_otherwise(variable):
    """Whether programs of one NVIDIA GPU want this variable as `_outputs_first` lays it out."""
    is_kernel = len(variable.shape) == 4
    return is_kernel and _jax_platform() == "gpu" and keras.distribution.distribution() is None


def _outputs_first(variable):
    """The layout that has a convolution's outputs first in memory; its kernel is `(height, width, in, out)`.

    So cuDNN wants it. XLA would turn a kernel from Keras' layout in each call of a program, which takes up to
    an eighth of a UNet's time.
    """
    from jax.experimental.layout import Format, Layout

    return Format(Layout(major_to_minor=(3, 0, 1, 2)), variable.value.sharding)


def with_eager_input(train_function):
    """Keras' train function, which is handed each batch.

    From its own kind of iterator TensorFlow would read in a second function around the step, which it traces
    and optimises too, though XLA is to compile what is inside: up to two fifths of the time to a first step.
    """
    if keras.backend.backend() == "tensorflow":
        return lambda iterator: train_function(iter([next(iterator)]))
    return train_function


def _replicated():
    """The sharding of an array that every device has whole; None on one device."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout


def join_processes(*arguments):
    """Connects JAX with the other processes of the run, all of which are there.

    Args:
        arguments: `HOST:PORT` of process 0, how many processes there are, and which this one is. Without them
            JAX looks for what has started it (a TPU pod, Slurm, Open MPI), which may be nothing of the kind.
    """
    import jax

    try:
        jax.distributed.initialize(*arguments)
    except ValueError:
        if arguments:
            raise


def process_count():
    """How many processes train together."""
    if keras.backend.backend() == "tensorflow":
        return 1
    import jax

    return jax.process_count()


def process_index():
    """Which of them this one is; process 0 writes the files."""
    if keras.backend.backend() == "tensorflow":
        return 0
    import jax

    return jax.process_index()


def any_process(flags):
    """Where any process has True: a bool array `(n,)`, which each gives its own of; all have to ask."""
    if process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(flags).any(axis=0)


def processes_stop_at(step):
    """Whether all processes stop after this step, as one of them has got SIGTERM; asked at every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def devices():
    """The names of JAX's devices in all processes, those of a process side by side."""
    import jax

    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return [f"{device.platform}:{device.id}" for device in ordered]


def lay_out(variable, layout):
    """Spreads a variable over devices as a `keras.distribution.TensorLayout` says."""
    # Keras asks for a variable's layout at its birth only.
    variable._layout = layout
    variable.assign(variable.value)


def to_numpy(variable):
    """The whole of a variable or tensor, of which this process has all parts."""
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.backend() == "tensorflow" or value.is_fully_addressable or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    whole = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def aligned_copy(array, axes, dtype):
    """A contiguous copy of a NumPy array with its axes in another order, fit for `to_tensor`."""
    transposed, dtype = array.transpose(axes), np.dtype(dtype)
    memory = np.empty(transposed.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + transposed.size * dtype.itemsize].view(dtype).reshape(transposed.shape)
    # So many columns at a time stay in the processor's cache, which makes it two to three times as fast.
    is_turned = not transposed.flags.c_contiguous
    parts = [np.s_[..., start : start + 64] for start in range(0, copy.shape[-1], 64)] if is_turned else [...]
    with np.errstate(over="ignore"):  # infinity, which whoever wants finite numbers will find
        for part in parts:
            np.copyto(copy[part], transposed[part], casting="unsafe")
    return copy


def to_tensor(copy):
    """A tensor of what `aligned_copy` gave, on the same memory where the backend allows it."""
    if keras.backend.backend() == "tensorflow" and copy.dtype.kind == "f" and copy.size:
        import tensorflow as tf

        return tf.experimental.dlpack.from_dlpack(copy.__dlpack__())
    return keras.ops.convert_to_tensor(copy)


def recomputed(function, variables):
    """`function`, of floating-point tensors, with a backward pass that computes it again from its inputs.

    What it needs gradients for must be among its arguments or its variables. `keras.remat` is the same, but
    XLA drops JAX's barriers on a CPU, merges both computations and so keeps everything. Here, as in
    TensorFlow's version, the second one waits for the gradient that it is for.

    Args:
        variables: all the Keras variables that it reads. It may not assign to them.
    """
    if keras.backend.backend() == "tensorflow":
        return keras.remat(function)

    import jax

    variables = list(variables)

    def pure(values, inputs):
        with _GivenValues(variables, values):
            return function(*inputs)

    def call(*inputs):
        # A program that JAX keeps for a function and its shapes would hold the values of its first trace.
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
        return run([_value(variable) for variable in variables], inputs)

    return call


class _GivenValues(keras.StatelessScope):
    """In which the variables that are named have the values that are given, and no others can be read.

    Those would silently be constants in the program that is traced inside, whatever they become later.
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


def _value(variable):
    """What a variable is now, inside a `StatelessScope` or not, in the dtype that it is kept in."""
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    scope = get_stateless_scope()
    value = None if scope is None else scope.get_current_value(variable)
    return variable._value if value is None else value


def scan(step, carry, arrays):
    """Calls `step(carry, [array[i] ...])` for each i of the arrays' first axis, in turns.

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


_platform = None


@contextlib.contextmanager
def compiling_for(platform):
    """Has JAX's programs that are traced inside made for a platform, "cpu", "gpu" or "tpu", maybe not here.

    What is the faster way there is asked while a program is traced, when JAX does not know for which it is.
    """
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


def _jax_platform():
    import jax

    return _platform or jax.default_backend()


def compiles_for_processor(tensor):
    """Whether `tensor` belongs to a program that XLA is about to compile for a CPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

        return (
            not tf.executing_eagerly()
            and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
            and not tf.config.list_logical_devices("GPU")
        )
    import jax

    return isinstance(tensor, jax.core.Tracer) and _jax_platform() == "cpu"


def multiplies_bfloat16():
    """Whether the device that computes has units for bfloat16: TPUs, NVIDIA's GPUs since Ampere, AMD's."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details(devices[0]) if devices else {}
        return details.get("compute_capability", (0, 0)) >= (8, 0)
    import jax

    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return device.platform == "tpu"
    capability = str(getattr(device, "compute_capability", "0"))
    # AMD's have names in place of numbers.
    return capability.startswith("gfx9") or (capability[:1].isdigit() and float(capability) >= 8)


def has_flash_attention(query):
    """Whether there is `flash_attention` for this query `(n, tokens, heads, head_size)`.

    That is in half precision on NVIDIA's Ampere and later, which JAX gives to cuDNN.
    """
    half = keras.backend.standardize_dtype(query.dtype) in ("bfloat16", "float16")
    if keras.backend.backend() != "jax" or not half or _jax_platform() != "gpu":
        return False
    import jax

    capability = float(getattr(jax.local_devices()[0], "compute_capability", 0))
    largest = _LARGEST_FLASH_HEAD_ON_HOPPER if capability >= 9 else _LARGEST_FLASH_HEAD
    return capability >= 8 and query.shape[-1] % 8 == 0 and query.shape[-1] <= largest


def flash_attention(query, key, value):
    """Attention that never holds all scores (Dao et al., 2022), by cuDNN.

    Args:
        query, key, value: `(n, tokens, heads, head_size)` in the same half precision. Scores are added up in
            float32, so that large ones do no harm.
    """
    import jax

    keys, lengths = key.shape[1], None
    if keys % 2:
        # The backward pass takes even numbers of keys; what is added here is left out by the length.
        key, value = (keras.ops.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0))) for array in (key, value))
        lengths = jax.numpy.full((key.shape[0],), keys, "int32")
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def is_out_of_memory(error):
    """Whether an exception says that an allocation failed, in host memory or on the device.

    Keras, and generators of either backend, wrap exceptions of others, so those behind it count too.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (_is_of_backend(error) and _OUT_OF_MEMORY.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_of_backend(error):
    """Whether an exception comes from XLA or TensorFlow, or is Keras' copy of such a one."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return isinstance(error, tf.errors.OpError | RuntimeError)
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError | RuntimeError)


def has_accelerator():
    """Whether what computes has memory of its own: a GPU or a TPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))
    import jax

    return jax.default_backend() != "cpu"
