"""What depends on the backend, TensorFlow or JAX: no other room imports them but `kernels`.

`compilation` compiles functions by XLA, `program_cache` keeps the programs, `devices` knows processes and
devices, `arrays` takes NumPy's there and back, and `compat` is the only place for private and experimental
functions.
"""

from keras_sd.backend.arrays import aligned_copy, to_numpy, to_tensor
from keras_sd.backend.compat import forget, lay_out, processes_stop_at, sync_state, unlocked
from keras_sd.backend.compilation import jit, recomputed, scan, with_eager_input
from keras_sd.backend.devices import (
    any_process,
    compiles_for_processor,
    compiling_for,
    device_names,
    has_accelerator,
    is_out_of_memory,
    jax_platform,
    join_processes,
    multiplies_bfloat16,
    process_count,
    process_index,
)
from keras_sd.backend.program_cache import cache_folder, keep_programs
