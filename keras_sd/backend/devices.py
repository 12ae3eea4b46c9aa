"""Processes and devices: their number, their abilities, and errors about their memory."""

import os
import re
import sys

import keras
import numpy as np

from keras_sd.backend import compat, planning
from keras_sd.backend.openvino_marks import traces_for_openvino
from keras_sd.backend.program_cache import keep_programs, processor_lines

# The status of XLA, messages of its compilers (for TPUs they check memory in advance), and TensorFlow's.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|ResourceExhausted|Ran out of memory|Out of memory|OOM when allocating", re.IGNORECASE
)

_BFLOAT16_UNITS = frozenset(["avx512_bf16", "amx_bf16"])  # of a processor

_LONGEST_EXPORT = 24 * 60 * 60  # seconds for which the other processes wait at their end for process 0


def join_processes(*arguments):
    """Connect JAX with the other processes of the run, all of which have to be running.

    Args:
        arguments: `HOST:PORT` of process 0, the number of processes, and the number of this one. Without them
            JAX detects a TPU pod, Slurm or Open MPI; if there is none, nothing happens.
    """
    import jax

    options = {"shutdown_timeout_seconds": _LONGEST_EXPORT}
    if arguments:
        # Under Slurm JAX would take one GPU of those that the process has.
        options["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(*arguments, **options)
    except ValueError:
        if arguments:
            raise


def is_joined():
    """Return whether JAX is connected with other processes."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def process_count():
    """Return the number of processes that train together."""
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
    """Return the logical or of all processes' bool arrays `(n,)`; all processes have to call this."""
    if process_count() == 1:
        return flags
    return compat.gathered(flags).any(axis=0)


def exchanged_texts(text):
    """Return the texts of all processes, in the order of their numbers; all have to call this."""
    if process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), "uint8")
    lengths = compat.gathered(np.array([len(own)], "int32")).reshape(-1)
    padded = np.zeros(lengths.max(), "uint8")
    padded[: len(own)] = own
    rows = compat.gathered(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def device_names():
    """Return the names of JAX's devices in all processes, those of a process side by side.

    Of planned devices, which Keras could not find by name, these are the devices themselves.
    """
    import jax

    if planning.plan() is not None:
        return planning.plan().devices
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return [f"{device.platform}:{device.id}" for device in ordered]


def jax_devices():
    """Return the devices that JAX compiles for: those of this process, or the planned ones."""
    import jax

    return jax.local_devices() if planning.plan() is None else planning.plan().devices


def jax_platform():
    """Return the platform that JAX compiles for: "cpu", "gpu" or "tpu"."""
    return jax_devices()[0].platform


def compiles_for_processor(tensor):
    """Return whether `tensor` belongs to a program that XLA will compile for a CPU."""
    on_tensorflow = keras.backend.backend() == "tensorflow"
    return is_traced_for_processor(tensor) and (not on_tensorflow or compat.is_traced_for_xla())


def runs_by_onednn(tensor):
    """Return whether `tensor` belongs to a program of TensorFlow's own operations on a CPU, without XLA.

    These are oneDNN's where it has them: convolutions, matrix multiplications, softmax. A graph that OpenVINO
    will convert is none.
    """
    is_own = is_traced_for_processor(tensor) and not compiles_for_processor(tensor)
    return is_own and not traces_for_openvino() and _has_onednn()


def is_traced_for_processor(tensor):
    """Return whether `tensor` belongs to a program for a CPU that is being traced."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly() and not tf.config.list_logical_devices("GPU")
    import jax

    return isinstance(tensor, jax.core.Tracer) and jax_platform() == "cpu"


def kind():
    """Return the kind of the devices that programs are traced for, as text."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return str(
            [compat.compute_capability(one) for one in tf.config.list_physical_devices("GPU")] or "cpu"
        )
    import jax

    count = jax.device_count() if planning.plan() is None else len(planning.plan().devices)
    return f"{jax_platform()} {count} {jax_devices()[0].device_kind}"


def multiplies_bfloat16():
    """Return whether the device has units for bfloat16 (TPUs, NVIDIA since Ampere, AMD)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        keep_programs()  # before TensorFlow reads its flags
        devices = tf.config.list_physical_devices("GPU")
        return bool(devices) and compat.compute_capability(devices[0]) >= (8, 0)
    device = jax_devices()[0]
    if device.platform != "gpu":
        return device.platform == "tpu"
    capability = str(getattr(device, "compute_capability", "0"))
    # AMD's have names in place of numbers.
    return capability.startswith("gfx9") or (capability[:1].isdigit() and float(capability) >= 8)


def compiles(jit_compile, dtype):
    """Return whether XLA compiles programs of a precision: as `jit_compile` says, or for None where it pays.

    A processor's units for bfloat16 (AVX-512 BF16, AMX) are used by oneDNN in TensorFlow's own operations,
    and not by XLA, whichever flags it is given. There Stable Diffusion's decoder and UNet take half of the
    time without XLA (docs/results.md). JAX always compiles.
    """
    if jit_compile is not None:
        return jit_compile
    if dtype != "bfloat16" or keras.backend.backend() != "tensorflow" or has_accelerator():
        return True
    return not (_has_onednn() and _BFLOAT16_UNITS & processor_flags())


def _has_onednn():
    return os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"


def processor_flags():
    """Return what the processor can do, as Linux names it; nothing on another system."""
    return frozenset(word for line in processor_lines() if line.startswith("flags") for word in line.split())


def has_accelerator():
    """Return whether the device is a GPU or a TPU, which have their own memory."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        keep_programs()  # before TensorFlow reads its flags
        return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))
    return jax_platform() != "cpu"


def is_out_of_memory(error):
    """Return whether an exception, or one of its causes, is a failed allocation on the host or the device."""
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


def gpu_capability():
    """Return the compute capability of the GPU that JAX compiles for, such as 9.0; 0 of another device."""
    return float(getattr(jax_devices()[0], "compute_capability", 0))


def replicated():
    """Return the sharding of an array that every device holds whole; None on one device."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout
