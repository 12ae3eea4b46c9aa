"""The parameters in an image's file that describe how it was made, and the options that make it again.

The names are those of AUTOMATIC1111's web interface if it has one: LoRAs are tags in the prompt
(`<lora:ink:0.8>`) and `Lora hashes`, words of textual inversion `TI hashes`, another VAE is `VAE` and `VAE
hash`. Hashes are truncated as there. Names of this package: `Guidance interval`, `Guidance rescale`, `Reuse
interval`, `Precision`, `Quantization`, `Walk`, `Frames`, `Frame rate`, `Postprocess steps`. `Size` is that
before upscaling.

This module imports no backend.
"""

import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np

from keras_sd.arguments import (
    LARGEST_SEED,
    LONGEST_SIDE,
    MOST_IMAGES,
    checked_interval,
    shown,
    whole_number,
)
from keras_sd.diffusion.samplers import OF_THE_MODEL, SAMPLERS, find_sampler
from keras_sd.errors import UserError
from keras_sd.files.download import file_hash
from keras_sd.files.json_files import parse_json
from keras_sd.pipeline.prompts import take_loras
from keras_sd.weights.safetensors_files import check_dtype, read_metadata

# Digits of hashes in the web interface.
_MODEL_DIGITS, _NETWORK_DIGITS = 10, 12

_SMALLEST_STRENGTH = math.ulp(0.0)  # any number above 0, which makes no step

_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


def model_hash(path):
    """Return the web interface's hash of a model's or a VAE's file."""
    return file_hash(path)[:_MODEL_DIGITS]


def embedding_hash(path):
    """Return the web interface's hash of a textual inversion's file."""
    return file_hash(path)[:_NETWORK_DIGITS]


def lora_hash(path):
    """Return the web interface's hash of a LoRA's file: that of its tensors, as its header may change."""
    if path.suffix != ".safetensors":
        return file_hash(path)[:_NETWORK_DIGITS]
    written = read_metadata(path).get("sshs_model_hash")
    if written:
        return written[:_NETWORK_DIGITS]
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:_NETWORK_DIGITS]


def sampling_parameters(
    prompt,
    negative_prompt=None,
    *,
    num_inference_steps,
    guidance_scale,
    seed,
    size,
    guidance_interval=(0.0, 1.0),
    guidance_rescale=0.0,
    reuse_interval=1,
    sampler=None,
    eta=0.0,
    clip_skip=None,
    scheduler_config=None,
):
    """Return the settings of a task under the names that image files use.

    Args:
        prompt, negative_prompt: texts.
        seed: of the image: the seed of the call plus the image's index.
        size: `(height, width)` in pixels.
        num_inference_steps, ...: as the tasks take them.
        scheduler_config: of the model; describes the sampler if `sampler` is None.

    Returns:
        Name -> value; settings with their usual values are left out.
    """
    height, width = size
    start, end = guidance_interval
    return without_none(
        {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "Steps": num_inference_steps,
            "Sampler": find_sampler(sampler, scheduler_config).name,
            "CFG scale": number(guidance_scale),
            "Seed": int(seed),
            "Size": f"{width}x{height}",
            "Eta": number(eta) if eta else None,
            "Guidance interval": f"{number(start)} to {number(end)}" if (start, end) != (0, 1) else None,
            "Guidance rescale": number(guidance_rescale) if guidance_rescale else None,
            "Clip skip": clip_skip + 1 if clip_skip else None,  # the last layer is 1
            "Reuse interval": reuse_interval if reuse_interval > 1 else None,
        }
    )


def image_parameters(pipeline, prompt, negative_prompt=None, **settings):
    """Return the parameters of an image of a `StableDiffusion`: its settings, and the parts of the model.

    Args:
        pipeline: in the state in which it made the image.
        prompt, negative_prompt: texts; for a walk, a list of prompts. LoRAs in the model are appended to each
            prompt as tags.
        settings: as `sampling_parameters` takes them; by default the model's own steps and guidance.

    Returns:
        Name -> value, for `save_png`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    files, texts = pipeline.adapters.files, "\n".join([*prompts, negative_prompt or ""])
    _, tagged = take_loras(texts, files.__contains__)
    inside = {name: weight for name, weight in pipeline.adapters.weights.items() if name not in tagged}
    words = {token: file for token, file in pipeline.embedding_files.items() if token in texts}
    vae_name, vae_file = pipeline.vae_source
    precision = pipeline.unet.compute_dtype
    prompts = [with_lora_tags(text, inside) for text in prompts]
    walk = None if isinstance(prompt, str) else json.dumps(prompts, ensure_ascii=False)
    names = ("num_inference_steps", "guidance_scale", "guidance_rescale")
    settings |= pipeline.defaults.filled({name: settings.get(name) for name in names})
    settings["scheduler_config"] = pipeline.scheduler_config
    sampled = sampling_parameters(prompts[0], negative_prompt, **settings)
    if pipeline.defaults.sampling["guidance_rescale"]:
        sampled["Guidance rescale"] = number(
            settings["guidance_rescale"]
        )  # 0 is not this model's usual value
    return sampled | without_none(
        {
            "Walk": walk,
            "Model hash": pipeline.model_hash,
            "Model": pipeline.name,
            "VAE hash": vae_file and model_hash(vae_file),
            "VAE": vae_name,
            "Precision": None if precision == "float32" else precision,
            "Quantization": pipeline.quantization,
            "Lora hashes": _listed({name: lora_hash(files[name]) for name in [*inside, *tagged]}),
            "TI hashes": _listed({token: embedding_hash(file) for token, file in words.items()}),
        }
    )


def with_lora_tags(prompt, weights):
    """Return the prompt with a tag appended for each LoRA (name -> weight) that it does not name."""
    _, tagged = take_loras(prompt, weights.__contains__)
    tags = [f"<lora:{name}:{number(weight)}>" for name, weight in weights.items() if name not in tagged]
    return " ".join([prompt, *tags]) if tags else prompt


def _listed(hashes):
    """Return name -> hash as one text, or None if there are none."""
    return ", ".join(f"{name}: {digits}" for name, digits in hashes.items()) or None


def number(value):
    """Return a number as text with all its digits and no exponent."""
    return np.format_float_positional(value, trim="-")


def without_none(parameters):
    """Return the dictionary without the names whose value is None."""
    return {name: value for name, value in parameters.items() if value is not None}


def options_of(parameters, folder=None):
    """Return the options of a command that make an image again. A warning names unknown settings.

    Args:
        parameters: from the image's file, as `keras_sd.read_parameters` returns them.
        folder: folder with the files of LoRAs, embeddings and the VAE, which are found by their hashes.

    Returns:
        Parameter of the command -> value: prompt (of a walk: prompts), num_inference_steps, sampler, seed,
        model, loras, ... Settings with their usual values are left out.

    Raises:
        UserError: a file is not in the folder, a value was not written by this package, or the image has no
            parameters.
    """
    taken = dict(parameters)
    for title, value in taken.items():
        if not isinstance(value, str):
            raise UserError(f"{title} {shown(value)}: no text; give what read_parameters finds")
    if "prompt" not in taken:
        raise UserError("parameters: no prompt, so they do not say how an image was made; use another image")
    options = {"prompt": taken.pop("prompt"), "negative_prompt": taken.pop("negative_prompt", None)}
    for title, (name, read) in _READERS.items():
        if title in taken:
            options[name] = _read(title, taken.pop(title), read)
    if "Size" in taken:
        options["width"], options["height"] = _read("Size", taken.pop("Size"), _size)
    if "Batch size" in taken and "Batch pos" not in taken:  # a contact sheet
        options["num_images"] = _read("Batch size", taken["Batch size"], _whole(1, MOST_IMAGES))
    options |= _files(options, taken, folder)
    unknown = [f"{title}: {shown(value)}" for title, value in taken.items() if title not in _NO_OPTIONS]
    if unknown:
        warnings.warn(f"{', '.join(unknown)}: not known here, and left out", stacklevel=2)
    return without_none(options)


def _whole(least, most=None):
    """Return a reader of whole numbers."""
    return lambda text: whole_number("number", int(text), least, most)


def _number(least, most=math.inf):
    """Return a reader of finite numbers."""

    def read(text):
        value = float(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError(f"out of range: {value}")
        return value

    return read


def _size(text):
    width, height = text.split("x")
    return tuple(whole_number("side", int(side), 1, LONGEST_SIDE) for side in (width, height))


def _interval(text):
    return checked_interval(tuple(map(float, text.split(" to "))))


def _precision(text):
    check_dtype(text)
    return text


def _quantization(text):
    if text != "int8":
        raise ValueError("unknown")
    return text


def _walk(text):
    prompts = parse_json(text, "Walk", list[str])
    if not prompts:
        raise ValueError("no prompts")
    return tuple(prompts)


def _sampler(title):
    """Return the name of a sampler; None for the one that the model's own file describes."""
    if title.endswith(OF_THE_MODEL):
        return None
    return next(name for name, sampler in SAMPLERS.items() if sampler.name == title)


_READERS = {
    "Steps": ("num_inference_steps", _whole(1)),
    "Sampler": ("sampler", _sampler),
    "CFG scale": ("guidance_scale", _number(0)),
    "Seed": ("seed", _whole(0, LARGEST_SEED)),
    "Eta": ("eta", _number(0, 1)),
    "Guidance interval": ("guidance_interval", _interval),
    "Guidance rescale": ("guidance_rescale", _number(0, 1)),
    "Reuse interval": ("reuse_interval", _whole(1)),
    "Clip skip": ("clip_skip", _whole(1)),  # counted as the commands do
    "Denoising strength": ("strength", _number(_SMALLEST_STRENGTH, 1)),
    "Noise level": ("noise_level", _whole(0)),
    "Model": ("model", str),
    "Precision": ("dtype", _precision),
    "Quantization": ("quantize", _quantization),
    "Walk": ("prompts", _walk),
    "Frames": ("num_frames", _whole(1, MOST_IMAGES)),
    "Frame rate": ("frame_rate", _number(1, 50)),
    "Postprocess upscaler": ("upscaler", str),
    "Postprocess steps": ("upscaler_steps", _whole(1)),
}
"""Setting -> the parameter's name and its reader, which raises `ValueError` for a wrong text."""

# Settings that are no options, or that are read together with another one.
_NO_OPTIONS = {"Postprocess upscale by", "Model hash", "Batch size", "Batch pos", "Version"}


def _read(title, text, read):
    try:
        return read(text)
    except (ValueError, StopIteration) as error:
        raise _not_ours(title, text) from error


def _not_ours(title, text):
    return UserError(f"{title} {shown(text)}: not as keras_sd writes it; use an image of its own")


def _files(options, taken, folder):
    """Return the options that name files, and the prompts without the tags of LoRAs."""
    found = {}
    loras = _hashes("Lora hashes", taken.pop("Lora hashes", ""))
    texts = list(options.get("prompts", [options["prompt"]]))
    asked = [take_loras(text, loras.__contains__) for text in texts]
    if loras:
        texts, weights = [text.rstrip() for text, _ in asked], asked[0][1]
        found["negative_prompt"], negative = take_loras(options["negative_prompt"] or "", loras.__contains__)
        if loras.keys() - weights.keys() - negative.keys() or any(each != weights for _, each in asked):
            raise UserError("Lora hashes: not those of the prompt's tags; use an image as keras_sd wrote it")
        paths = {name: _find(folder, f"LoRA {name}", digits, lora_hash) for name, digits in loras.items()}
        found["loras"] = tuple(
            f"{paths[name]}:{number(weight)}" for name, weight in (weights | negative).items()
        )
    if "prompts" in options:
        found["prompts"], found["prompt"] = tuple(texts), None
    else:
        found["prompt"] = texts[0]
    words = _hashes("TI hashes", taken.pop("TI hashes", ""))
    if words:
        found["embeddings"] = tuple(
            f"{_find(folder, f'embedding {token}', digits, embedding_hash)}:{token}"
            for token, digits in words.items()
        )
    if "VAE hash" in taken:
        path = _find(folder, f"VAE {taken.pop('VAE', '')}", taken.pop("VAE hash"), model_hash)
        found["vae"] = str(path.parent if (path.parent / "config.json").is_file() else path)
    return found


def _hashes(title, text):
    """Return the name -> hash that `_listed` joined; a name may contain colons and commas."""
    hashes, name = {}, ""
    for piece in text.split(", ") if text else ():
        name = f"{name}, {piece}" if name else piece
        word, found, digits = name.rpartition(": ")
        if found and len(digits) == _NETWORK_DIGITS:
            hashes[word], name = digits, ""
    if name:
        raise _not_ours(title, text)
    return hashes


def _find(folder, title, digits, digest):
    """Return the file below a folder that has a hash."""
    places = sorted(Path(folder).rglob("*")) if folder is not None else ()
    for path in places:
        if path.suffix in _SUFFIXES and path.is_file() and digest(path) == digits:
            return path
    where = f"not in {folder}" if folder is not None else "not known where"
    raise UserError(f"{title} ({digits}): {where}; give the folder that holds its file")
