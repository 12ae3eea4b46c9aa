"""The benchmark's cases by what people would use instead: diffusers on torch, and OpenVINO."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from benchmark.worker import GUIDANCE_SCALE, LORA_RANK, PROMPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(spec, inputs):
    """Return a function that runs the case and gives its result as an array, channels last, and one that
    counts nothing: the multiplications are those of our own network."""
    makers = {
        "generation": _generation,
        "denoising": _generation,
        "training": _training,
        "training-lora": _training,
    }
    call = makers.get(spec["case"], _forward)(spec, inputs)
    return call, lambda: None


def _tensor(array, dtype=torch.float32):
    """Return a torch tensor, with channels where torch has them."""
    if array.ndim == 4:
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    tensor = torch.from_numpy(array)
    return tensor.to(DEVICE, dtype if tensor.is_floating_point() else None)


def _array(tensor):
    array = tensor.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def device_peak():
    """Return the most bytes that the accelerator has held; None without one."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def _prepared(module, spec):
    """Return the module as this implementation has it."""
    if _is_channels_last(spec):
        module = module.to(memory_format=torch.channels_last)
    return _compiled(module, spec) if spec["implementation"] == "diffusers-compiled" else module


def _is_channels_last(spec):
    """Return whether feature maps are channels-last: on request, and always on a GPU when compiled."""
    compiled_for_gpu = spec["implementation"] == "diffusers-compiled" and DEVICE == "cuda"
    return compiled_for_gpu or spec["implementation"] == "diffusers-channels-last"


def _compiled(module, spec):
    # What diffusers' documentation advises: CUDA graphs, in programs that are called with the same shapes.
    is_training = spec["case"].startswith("training")
    mode = "reduce-overhead" if DEVICE == "cuda" and not is_training else "default"
    return torch.compile(module, mode=mode)


class _Part(torch.nn.Module):
    """One case as a function of tensors, which is what OpenVINO converts."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *tensors):
        return self.function(self.module, *tensors)


_PARTS = {
    "text-encoder": (CLIPTextModel, "text_encoder", lambda model, ids: model(ids)[0]),
    "unet": (
        UNet2DConditionModel,
        "unet",
        lambda model, latents, timesteps, context: model(latents, timesteps, context, return_dict=False)[0],
    ),
    "vae-encode": (AutoencoderKL, "vae", lambda model, images: model.encode(images).latent_dist.mode()),
    "vae-decode": (
        AutoencoderKL,
        "vae",
        lambda model, latents: model.decode(latents, return_dict=False)[0],
    ),
}


def _forward(spec, inputs):
    model_class, folder, function = _PARTS[spec["case"]]
    is_openvino = spec["implementation"] == "openvino"
    # OpenVINO takes a model in float32, and computes in its own default precision or another.
    dtype = torch.float32 if is_openvino else getattr(torch, spec["precision"])
    model = model_class.from_pretrained(f"{spec['folder']}/{folder}", torch_dtype=dtype).eval().to(DEVICE)
    part = _Part(model, function).eval()
    tensors = [_tensor(array, dtype) for array in inputs.values()]
    if is_openvino:
        return _openvino(part, tensors, spec["precision"])
    if _is_channels_last(spec):
        tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    part = _prepared(part, spec)

    @torch.inference_mode()
    def call():
        return _array(part(*tensors))

    return call


def _openvino(part, tensors, precision):
    import openvino

    with torch.inference_mode():
        model = openvino.convert_model(part, example_input=tuple(tensors))
    for port, tensor in zip(model.inputs, tensors, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    # A processor with matrix units for bfloat16 would be given that.
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    arrays = [tensor.numpy() for tensor in tensors]

    def call():
        result = compiled(arrays)[0]
        return result.transpose(0, 2, 3, 1) if result.ndim == 4 else result

    return call


def _generation(spec, inputs):
    dtype = getattr(torch, spec["precision"])
    pipeline = StableDiffusionPipeline.from_pretrained(
        spec["folder"], safety_checker=None, torch_dtype=dtype, local_files_only=True
    ).to(DEVICE)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = _prepared(pipeline.unet, spec)
    pipeline.vae.decode = _prepared_function(pipeline.vae, spec)
    size = spec["size"]
    options = {"height": size, "width": size, "guidance_scale": GUIDANCE_SCALE}
    options |= {"num_inference_steps": spec["steps"]}

    def generate():
        latents = _tensor(inputs["latents"], dtype)
        prompts = [PROMPT] * len(latents)
        return pipeline(prompts, latents=latents, output_type="np", **options).images

    def denoise():
        latents, context, negative = (
            _tensor(inputs[name], dtype) for name in ("latents", "context", "negative")
        )
        encodings = {"prompt_embeds": context, "negative_prompt_embeds": negative}
        return _array(pipeline(latents=latents, output_type="latent", **encodings, **options).images)

    return denoise if spec["case"] == "denoising" else generate


def _prepared_function(vae, spec):
    """Return the decoder as this implementation has it, as the function that the pipeline calls."""
    if spec["implementation"] == "diffusers-compiled":
        return _compiled(vae.decode, spec)
    _prepared(vae, spec)
    return vae.decode


def _training(spec, inputs):
    unet = UNet2DConditionModel.from_pretrained(f"{spec['folder']}/unet").train().to(DEVICE)
    if spec["case"] == "training-lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # The fastest that torch has, which who compiles chooses as well.
    fused = spec["implementation"] == "diffusers-compiled"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=fused)
    scheduler = DDIMScheduler.from_pretrained(f"{spec['folder']}/scheduler")
    network = _prepared(unet, spec)
    samples, noise, context = (_tensor(inputs[name]) for name in ("samples", "noise", "context"))
    timesteps = _tensor(inputs["timesteps"]).long()
    reduced = torch.autocast(
        DEVICE, getattr(torch, spec["precision"]), enabled=spec["precision"] != "float32"
    )

    def step():
        noisy = scheduler.add_noise(samples, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(samples, noise, timesteps) if is_velocity else noise
        with reduced:
            prediction = network(noisy, timesteps, context, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return np.asarray(loss.item())

    return step
