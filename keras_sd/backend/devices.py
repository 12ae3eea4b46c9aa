"""Processes and devices: how many there are, what they can do, and whether their memory is enough."""

import contextlib
import re

import keras

from keras_sd.backend import compat
from keras_sd.backend.program_cache import keep_programs

# XLA's status, its compilers' own words (TPUs count the memory of a program beforehand), and TensorFlow's.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|ResourceExhausted|Ran out of memory|Out of memory|OOM when allocating", re.IGNORECASE
)

_platform = None  # what `compiling_for` says


def join_processes(*arguments):
    """Connect JAX with the other processes of the run, all of which are there.

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
    """Return how many processes train together."""
    if keras.backend.backend() == "tensorflow":
        return 1
    import jax

    return jax.process_count()


def process_index():
    """Return the number of this process; process 0 writes the files."""
    if keras.backend.backend() == "tensorflow":
        return 0
    import jax

    return jax.process_index()


def any_process(flags):
    """Return where any process has True, given each one's own bool array `(n,)`; all have to ask."""
    if process_count() == 1:
        return flags
    return compat.gathered(flags).any(axis=0)


def device_names():
    """Return the names of JAX's devices in all processes, those of a process side by side."""
    import jax

    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return [f"{device.platform}:{device.id}" for device in ordered]


@contextlib.contextmanager
def compiling_for(platform):
    """Trace JAX's programs inside the block for a platform, "cpu", "gpu" or "tpu", maybe not here.

    Kernels are chosen while a program is traced, when JAX does not yet know its platform.
    """
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


def jax_platform():
    """Return the platform that JAX compiles for: "cpu", "gpu" or "tpu"."""
    import jax

    return _platform or jax.default_backend()


def compiles_for_processor(tensor):
    """Return whether `tensor` belongs to a program that XLA is about to compile for a CPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return compat.is_traced_for_xla() and not tf.config.list_logical_devices("GPU")
    import jax

    return isinstance(tensor, jax.core.Tracer) and jax_platform() == "cpu"


def multiplies_bfloat16():
    """Return whether the device that computes has units for bfloat16 (TPUs, NVIDIA since Ampere, AMD)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        keep_programs()  # before TensorFlow reads its flags
        devices = tf.config.list_physical_devices("GPU")
        return bool(devices) and compat.compute_capability(devices[0]) >= (8, 0)
    import jax

    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return device.platform == "tpu"
    capability = str(getattr(device, "compute_capability", "0"))
    # AMD's have names in place of numbers.
    return capability.startswith("gfx9") or (capability[:1].isdigit() and float(capability) >= 8)


def has_accelerator():
    """Return whether what computes has memory of its own: a GPU or a TPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        keep_programs()  # before TensorFlow reads its flags
        return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))
    import jax

    return jax.default_backend() != "cpu"


def is_out_of_memory(error):
    """Return whether an exception says that an allocation failed, in host memory or on the device.

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
    """Return whether an exception comes from XLA or TensorFlow, or is Keras' copy of such a one."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return isinstance(error, tf.errors.OpError | RuntimeError)
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError | RuntimeError)


def replicated():
    """Return the sharding of an array that every device holds whole; None on one device."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout
