"""Code that depends on the backend, TensorFlow or JAX; besides it, only `kernels` imports a backend.

compilation      functions compiled by XLA
compiling_ahead  compiles programs in a thread, before they are called
entries          files of the cache folder
exported         keeps what tracing gave for the next process
identity         what Python objects contribute to a trace
openvino_engine  OpenVINO in place of the backend's programs, on a processor
openvino_marks   operations that OpenVINO has as one
planning         compiles programs that are never run, for TPUs that are not there too
operations       counts those of a program
collectives      counts what a program sends between devices
chips            what makers publish of theirs
program_cache    keeps compiled programs for the next process
devices          processes and devices
memory           of programs and devices
arrays           conversion between NumPy arrays and tensors
compat           all uses of private and experimental functions
"""

from keras_sd.backend.arrays import (
    aligned_arrays,
    aligned_memory,
    aligned_size,
    copies,
    copy_values,
    is_split,
    own_slices,
    to_numpy,
    to_tensor,
    whole_on_host,
    with_values_read,
)
from keras_sd.backend.compat import (
    drop_partial_update,
    forget,
    forget_variable,
    lay_out,
    processes_stop_at,
    state_shardings,
    sync_state,
    unlocked,
)
from keras_sd.backend.compilation import (
    batches_of_shapes,
    first_call,
    jit,
    recomputed,
    scan,
    train_function_by_shape,
    value_and_gradient,
    with_constant_variables,
)
from keras_sd.backend.compiling_ahead import CompilationAhead, compiles_ahead
from keras_sd.backend.devices import (
    any_process,
    compiles,
    compiles_for_processor,
    device_names,
    exchanged_texts,
    gpu_capability,
    has_accelerator,
    is_joined,
    is_out_of_memory,
    is_traced_for_processor,
    jax_platform,
    join_processes,
    multiplies_bfloat16,
    process_count,
    process_index,
    runs_by_onednn,
)
from keras_sd.backend.entries import read_entry, write_entry
from keras_sd.backend.identity import identity_of
from keras_sd.backend.memory import ProgramMemory, device_bytes
from keras_sd.backend.openvino_engine import check_engine, jit_for_engine
from keras_sd.backend.openvino_marks import mark, traces_for_openvino
from keras_sd.backend.planning import (
    PlannedProgram,
    devices_here,
    plan,
    plan_step,
    start_plan,
    tpu_devices,
    tpu_environment,
)
from keras_sd.backend.program_cache import cache_folder, forget_programs, keep_programs
