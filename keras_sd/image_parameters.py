"""What an image's file says about how it was made, and the options that make it again.

The names are those of AUTOMATIC1111's web interface where it has one: LoRAs are tags in the prompt
(`<lora:ink:0.8>`) and `Lora hashes`, words of textual inversion `TI hashes`, another autoencoder `VAE` and
`VAE hash`. Hashes are cut as there. What the interface has no name for has one of its own here: `Guidance
interval`, `Guidance rescale`, `Reuse interval`, `Precision`, `Walk`, `Frames`, `Frame rate`.

This module imports no backend.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from keras_sd.diffusion.samplers import OF_THE_MODEL, SAMPLERS, find_sampler
from keras_sd.errors import UserError
from keras_sd.json_files import parse_json
from keras_sd.presets import file_hash
from keras_sd.prompts import take_loras
from keras_sd.weights.formats import read_metadata

# Digits of hashes, as in the web interface.
_MODEL_DIGITS, _NETWORK_DIGITS = 10, 12

_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


def model_hash(path):
    """How a file of a model or an autoencoder is told from others."""
    return file_hash(path)[:_MODEL_DIGITS]


def embedding_hash(path):
    """How a file of a textual inversion is told from others."""
    return file_hash(path)[:_NETWORK_DIGITS]


def lora_hash(path):
    """How a file of a LoRA is told from others: by its tensors, as its header changes with its notes."""
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
    num_steps,
    guidance_scale,
    seed,
    size,
    guidance_interval=(0.0, 1.0),
    guidance_rescale=0.0,
    reuse_interval=1,
    sampler=None,
    eta=0.0,
    scheduler_config=None,
):
    """The settings of a task, under the names that files have them by.

    Args:
        prompt, negative_prompt: texts.
        seed: the image's own, that of the call plus its index.
        size: `(height, width)`.
        num_steps, ...: as the tasks take them.
        scheduler_config: the model's, which describes its own sampler where `sampler` is None.

    Returns:
        A dictionary; what has its usual value is left out.
    """
    height, width = size
    start, end = guidance_interval
    return without_none(
        {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "Steps": num_steps,
            "Sampler": find_sampler(sampler, scheduler_config).name,
            "CFG scale": number(guidance_scale),
            "Seed": int(seed),
            "Size": f"{width}x{height}",
            "Eta": number(eta) if eta else None,
            "Guidance interval": f"{number(start)} to {number(end)}" if (start, end) != (0, 1) else None,
            "Guidance rescale": number(guidance_rescale) if guidance_rescale else None,
            "Reuse interval": reuse_interval if reuse_interval > 1 else None,
        }
    )


def image_parameters(pipeline, prompt, negative_prompt=None, **settings):
    """What an image of a `StableDiffusion` says: the settings, and what the model was put together from.

    Args:
        pipeline: as it was when it made the image.
        prompt, negative_prompt: texts; of a walk, a list of prompts. LoRAs that are in the model are put
            behind each prompt as tags.
        settings: as `sampling_parameters` takes them.
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
    settings["scheduler_config"] = pipeline.scheduler_config
    return sampling_parameters(prompts[0], negative_prompt, **settings) | without_none(
        {
            "Walk": walk,
            "Model hash": pipeline.model_hash,
            "Model": pipeline.name,
            "VAE hash": vae_file and model_hash(vae_file),
            "VAE": vae_name,
            "Precision": None if precision == "float32" else precision,
            "Lora hashes": _listed({name: lora_hash(files[name]) for name in [*inside, *tagged]}),
            "TI hashes": _listed({token: embedding_hash(file) for token, file in words.items()}),
        }
    )


def with_lora_tags(prompt, weights):
    """The prompt with a tag for each LoRA, name -> weight, that it has none for."""
    _, tagged = take_loras(prompt, weights.__contains__)
    tags = [f"<lora:{name}:{number(weight)}>" for name, weight in weights.items() if name not in tagged]
    return " ".join([prompt, *tags]) if tags else prompt


def _listed(hashes):
    """Name -> hash as one text, or None if there are none."""
    return ", ".join(f"{name}: {digits}" for name, digits in hashes.items()) or None


def number(value):
    """A number with all the digits that it has, and no exponent."""
    return np.format_float_positional(value, trim="-")


def without_none(parameters):
    """The dictionary without the names whose value is None."""
    return {name: value for name, value in parameters.items() if value is not None}


def options_of(parameters, folder=None):
    """The options of a command that make an image again.

    Args:
        parameters: what `keras_sd.images.read_parameters` finds in the image's file.
        folder: where the files of LoRAs, embeddings and the autoencoder are; they are found by their hashes.

    Returns:
        A dictionary by the names of the command's parameters: prompt (of a walk: prompts), steps, sampler,
        seed, model, loras, ... What the file does not say, because it was as usual, is left out.

    Raises:
        UserError: a file is not in the folder, or a setting is none of this package.
    """
    taken = dict(parameters)
    options = {"prompt": taken.pop("prompt"), "negative_prompt": taken.pop("negative_prompt", None)}
    readers = {
        "Steps": ("steps", int),
        "Sampler": ("sampler", _sampler),
        "CFG scale": ("guidance_scale", float),
        "Seed": ("seed", int),
        "Eta": ("eta", float),
        "Guidance interval": ("guidance_interval", lambda text: tuple(map(float, text.split(" to ")))),
        "Guidance rescale": ("guidance_rescale", float),
        "Reuse interval": ("reuse_interval", int),
        "Denoising strength": ("strength", float),
        "Noise level": ("noise_level", int),
        "Model": ("model", str),
        "Precision": ("dtype", str),
        "Walk": ("prompts", lambda text: tuple(parse_json(text, "Walk", list[str]))),
        "Frames": ("num_frames", int),
        "Frame rate": ("frame_rate", float),
    }
    for title, (name, read) in readers.items():
        if title in taken:
            options[name] = _read(title, taken.pop(title), read)
    if "Size" in taken:
        options["width"], options["height"] = _read(
            "Size", taken.pop("Size"), lambda text: tuple(map(int, text.split("x")))
        )
    if "Batch size" in taken and "Batch pos" not in taken:  # a contact sheet
        options["num_images"] = _read("Batch size", taken["Batch size"], int)
    return without_none(options | _files(options, taken, folder))


def _sampler(title):
    """The name of a sampler; None for the one that the model's own file describes."""
    if title.endswith(OF_THE_MODEL):
        return None
    return next(name for name, sampler in SAMPLERS.items() if sampler.name == title)


def _read(title, text, read):
    try:
        return read(text)
    except (ValueError, StopIteration) as error:
        raise UserError(f"{title} {text!r}: not as keras_sd writes it; use an image of its own") from error


def _files(options, taken, folder):
    """The options that name files, and the prompts without the tags of LoRAs."""
    found = {}
    loras = _hashes(taken.get("Lora hashes"))
    texts = list(options.get("prompts", [options["prompt"]]))
    asked = [take_loras(text, loras.__contains__) for text in texts]
    if loras:
        texts, weights = [text.rstrip() for text, _ in asked], asked[0][1]
        found["negative_prompt"], negative = take_loras(options["negative_prompt"] or "", loras.__contains__)
        paths = {name: _find(folder, f"LoRA {name}", digits, lora_hash) for name, digits in loras.items()}
        found["loras"] = tuple(
            f"{paths[name]}:{number(weight)}" for name, weight in (weights | negative).items()
        )
    if "prompts" in options:
        found["prompts"], found["prompt"] = tuple(texts), None
    else:
        found["prompt"] = texts[0]
    words = _hashes(taken.get("TI hashes"))
    if words:
        found["embeddings"] = tuple(
            f"{_find(folder, f'embedding {token}', digits, embedding_hash)}:{token}"
            for token, digits in words.items()
        )
    if "VAE hash" in taken:
        path = _find(folder, f"VAE {taken.get('VAE')}", taken["VAE hash"], model_hash)
        found["vae"] = str(path.parent if (path.parent / "config.json").is_file() else path)
    return found


def _hashes(text):
    """The names and hashes that `_listed` joined; a name may have a colon or a comma of its own."""
    hashes, name = {}, ""
    for piece in text.split(", ") if text else ():
        name = f"{name}, {piece}" if name else piece
        title, found, digits = name.rpartition(": ")
        if found and len(digits) == _NETWORK_DIGITS:
            hashes[title], name = digits, ""
    return hashes


def _find(folder, title, digits, digest):
    """The file below a folder that has a hash."""
    places = sorted(Path(folder).rglob("*")) if folder is not None else ()
    for path in places:
        if path.suffix in _SUFFIXES and path.is_file() and digest(path) == digits:
            return path
    where = f"not in {folder}" if folder is not None else "not known where"
    raise UserError(f"{title} ({digits}): {where}; give the folder that holds its file")
