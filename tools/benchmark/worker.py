"""Runs one case of the benchmark by one implementation, in a process of its own, whenever it is asked to.

`python -m benchmark.worker SPEC`, a JSON dictionary, answers on standard output with a line of JSON for each
step: what the start took; then, for every line on standard input, the seconds of one call, by the clock and
of all cores together; and when the input ends the peak of the memory, the accelerator's own if there is one.
Nothing but NumPy is imported here, since what is measured includes the imports.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

PROMPT = "red heart"
GUIDANCE_SCALE = 7.5
LORA_RANK = 4

# Cases of many steps of sampling, each a call of a program of its own.
SAMPLING_CASES = ("denoising", "generation")

# Who computes: the module that knows the implementation's name.
MODULES = {
    **dict.fromkeys(("tensorflow", "jax", "engine-openvino", "keras-cv"), "ours"),
    **dict.fromkeys(("diffusers", "diffusers-channels-last", "diffusers-compiled", "openvino"), "peers"),
}


def inputs(spec):
    """What a case is given, the same for all: a dictionary of NumPy arrays, channels last."""
    folder, size, batch = Path(spec["folder"]), spec["size"], spec["batch"]
    unet, vae, text_encoder = (
        json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    )
    side = size // 2 ** (len(vae["block_out_channels"]) - 1)
    tokens = text_encoder["max_position_embeddings"]
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape, dtype="float32")

    if spec["case"] == "text-encoder":
        ids = generator.integers(0, text_encoder["vocab_size"] - 2, (batch, tokens))
        ids[:, -1] = text_encoder["vocab_size"] - 1  # the end of the text
        return {"ids": ids.astype("int32")}
    if spec["case"] == "vae-encode":
        return {"images": np.tanh(normal(batch, size, size, 3))}
    latents = normal(batch, side, side, unet["in_channels"])
    if spec["case"] in ("vae-decode", "generation"):
        return {"latents": latents}
    if spec["case"] == "denoising":
        contexts = (normal(batch, tokens, unet["cross_attention_dim"]) for _ in range(2))
        return {"latents": latents, **dict(zip(("context", "negative"), contexts, strict=True))}
    timesteps = generator.integers(0, 1000, batch).astype("int32")
    context = normal(batch, tokens, unet["cross_attention_dim"])
    if spec["case"] == "unet":
        return {"latents": latents, "timesteps": timesteps, "context": context}
    return {
        "samples": latents,
        "noise": normal(*latents.shape),
        "timesteps": timesteps,
        "context": context,
    }


def serve(spec, answer):
    """Set a case up, calls it once, and then once for every line of standard input."""
    start = time.perf_counter()
    module = importlib.import_module(f"benchmark.{MODULES[spec['implementation']]}")
    imported = time.perf_counter()
    call, multiplications = module.make(spec, inputs(spec))
    made = time.perf_counter()
    result = call()
    ended = time.perf_counter()
    np.save(spec["result"], result)
    answer(
        {
            "import_seconds": imported - start,
            "load_seconds": made - imported,
            "first_call_seconds": ended - made,
            "multiplications": multiplications(),
        }
    )
    for _ in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        call()
        answer(
            {
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - processor,
            }
        )
    answer({"peak_bytes": module.device_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def main():
    # What libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), lambda answer: print(json.dumps(answer), file=answers))


if __name__ == "__main__":
    main()
