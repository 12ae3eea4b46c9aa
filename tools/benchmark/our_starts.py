"""What `tools/bench_start.py` times of `keras_sd` in a process of its own; each mark is a line.

`python -m benchmark.our_starts TASK FOLDER [SIZE STEPS COUNT]`, on the backend that KERAS_BACKEND names.
"""

import concurrent.futures
import os
import sys

import keras
import numpy as np

from benchmark.marks import PROMPT, mark


def main(task, folder, size=0, steps=0, count=1):
    """Run a task: open, generate, unet or decoder; the last two are the first calls of these parts."""
    import keras_sd
    from keras_sd import backend

    backend.keep_programs()  # TensorFlow can be told only before it starts
    keras.ops.zeros(3)
    mark("imported")
    model = keras_sd.StableDiffusion.load(folder)
    size, steps, count = int(size), int(steps), int(count)
    if task == "open":
        # On JAX by NumPy, as JAX would compile a sum for each shape; TensorFlow would copy for NumPy.
        is_jax = keras.backend.backend() == "jax"
        read = (lambda one: np.sum(keras.ops.convert_to_numpy(one))) if is_jax else keras.ops.sum
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            for part in (model.unet, model.vae, model.text_encoder):
                sum(map(float, threads.map(read, part.variables)))
        mark("read")
        return
    mark("opened")
    if task == "generate":
        model.text_to_image(
            PROMPT, num_images=count, num_inference_steps=steps, height=size, width=size, progress=False
        )
    elif task == "unet":
        config = model.unet.config
        latents = np.zeros((1, size // 8, size // 8, config.in_channels), "float32")
        context = np.zeros((1, 77, config.cross_attention_dim), "float32")
        model.denoise(latents, context, num_inference_steps=1, guidance_scale=1.0)
    elif task == "decoder":
        model.decode(np.zeros((1, size // 8, size // 8, 4), "float32"))
    else:
        raise SystemExit(f"no such task: {task}")
    mark("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
