"""The benchmark's cases by `keras_sd`, on the backend that KERAS_BACKEND names, and by KerasCV."""

import functools
import time

import keras
import numpy as np

from benchmark.counting import PASSES, multiplications
from benchmark.worker import GUIDANCE_SCALE, LORA_RANK, PROMPT
from keras_sd import (
    AdamW,
    DiffusionObjective,
    NoiseSchedule,
    SchedulerConfig,
    StableDiffusion,
    UserError,
    add_lora,
    backend,
    load_part,
)

_STORED_IN = {"text-encoder": "text_encoder", "unet": "unet", "vae-encode": "vae", "vae-decode": "vae"}


def make(spec, inputs):
    """Return a function that runs the case and gives its result as an array, and one that counts.

    The second one gives the multiplications of the case, or None where a case is more than one program.
    Makers return the first one and the function of `inputs` whose forward pass counts, or None.
    """
    makers = {
        "gemm": _gemm,
        "generation": _generation,
        "denoising": _denoising,
        "training": _training,
        "training-lora": _training,
    }
    if spec["implementation"] == "keras-cv":
        return _keras_cv(spec, inputs), lambda: None
    call, counted = makers.get(spec["case"], _forward)(spec, inputs)
    passes = PASSES.get(spec["case"], 1)
    return call, lambda: passes * multiplications(counted, inputs) if counted else None


def _jit_compile(xla):
    """What `--xla` means here; "auto" is what Keras makes of it on this machine."""
    if xla != "auto":
        return xla == "on"
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile(jit_compile="auto")
    return model.jit_compile


def _forward(spec, inputs):
    model = load_part(spec["folder"], _STORED_IN[spec["case"]], spec["precision"])
    function = {
        "text-encoder": lambda inputs: model(inputs["ids"]),
        "unet": lambda inputs: model([inputs[name] for name in ("latents", "timesteps", "context")]),
        "vae-encode": lambda inputs: model.encode(inputs["images"]).mode(),
        "vae-decode": lambda inputs: model.decode(inputs["latents"]),
    }[spec["case"]]
    inputs = _on_device(inputs)
    program = backend.jit(function, model.variables, _jit_compile(spec["xla"]))

    def call():
        return keras.ops.convert_to_numpy(keras.ops.cast(program(inputs), "float32"))

    return call, function


def _on_device(inputs):
    """Tensors where the computation is, so that no call waits for the way there."""
    return {name: keras.ops.convert_to_tensor(array) for name, array in inputs.items()}


def device_peak():
    """Return the most bytes that the accelerator has held; None without one."""
    if keras.backend.backend() != "jax":
        return None
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _pipeline(spec):
    has_engine = spec["implementation"] == "engine-openvino"
    options = {"engine": "openvino"} if has_engine else {"jit_compile": _jit_compile(spec["xla"])}
    return StableDiffusion.load(spec["folder"], dtype=spec["precision"], **options)


def _denoising(spec, inputs):
    """Guided steps alone, without the text encoder and the decoder."""
    pipeline = _pipeline(spec)
    options = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": spec["steps"]}
    return functools.partial(pipeline.denoise, **inputs, **options), None


def _generation(spec, inputs):
    pipeline = _pipeline(spec)

    def generate():
        count = len(inputs["latents"])
        context, negative = (pipeline.encode_text([text] * count) for text in (PROMPT, ""))
        latents = pipeline.denoise(
            inputs["latents"],
            context,
            negative,
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=spec["steps"],
        )
        return pipeline.decode(latents) / 255.0

    return generate, None


def _training(spec, inputs):
    precision = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
    unet = load_part(spec["folder"], "unet", precision[spec["precision"]])
    if spec["case"] == "training-lora":
        add_lora(unet, LORA_RANK, LORA_RANK)
    scheduler = SchedulerConfig.load(f"{spec['folder']}/scheduler/scheduler_config.json")
    objective = DiffusionObjective(unet, NoiseSchedule(scheduler))
    optimizer = AdamW(1e-4, weight_decay=0.01, global_clipnorm=1.0)
    optimizer.build(objective.trainable_variables)
    objective.compile(optimizer=optimizer, jit_compile=_jit_compile(spec["xla"]))
    inputs = _on_device(inputs)

    def step():
        return np.asarray(objective.train_on_batch(inputs))

    return step, objective


def _gemm(spec, inputs):
    """Measure the machine's ceiling: GEMM throughput in GFLOP/s.

    The backend multiplies two large matrices with XLA and without it, and NumPy does in float32.
    """
    side = spec["size"]
    matrix = np.random.default_rng(0).standard_normal((side, side), dtype="float32")
    tensor = keras.ops.convert_to_tensor(matrix, dtype=spec["precision"])

    def product(jit_compile):
        program = backend.jit(keras.ops.matmul, jit_compile=jit_compile)
        return lambda: keras.ops.convert_to_numpy(program(tensor, tensor)[:1, :1])

    def fastest(function):
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    seconds = min(fastest(product(jit_compile)) for jit_compile in (True, False))
    if spec["precision"] == "float32":
        seconds = min(seconds, fastest(lambda: matrix @ matrix))
    gigaflops = np.asarray(2 * side**3 / seconds / 1e9)
    return lambda: gigaflops, None


def _keras_cv(spec, inputs):
    """KerasCV's parts under XLA. Their weights are random ones of their own; the time is the same."""
    if spec["model"] != "sd15":
        raise UserError(f"KerasCV has no network of the size of {spec['model']}; take sd15")
    from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, image_encoder, text_encoder

    size = spec["size"]
    if spec["case"] == "unet":
        model = diffusion_model.DiffusionModel(size, size, 77, download_weights=False)
        features = np.zeros((len(inputs["latents"]), 320), "float32")
        arguments = [inputs["latents"], features, inputs["context"]]
    elif spec["case"] == "vae-decode":
        model, arguments = decoder.Decoder(size, size, download_weights=False), inputs["latents"]
    elif spec["case"] == "vae-encode":
        model, arguments = image_encoder.ImageEncoder(download_weights=False), inputs["images"]
    else:
        model = text_encoder.TextEncoder(77, download_weights=False)
        positions = np.tile(np.arange(77, dtype="int32"), (len(inputs["ids"]), 1))
        arguments = [inputs["ids"], positions]
    program = backend.jit(model, model.variables)
    return lambda: keras.ops.convert_to_numpy(program(arguments))
