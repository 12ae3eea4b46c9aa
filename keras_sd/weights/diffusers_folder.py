"""The diffusers folder, the native format: a folder for each part, with its config and its weights.

It is read in every published form: one file or shards, with or without a variant ("fp16"), safetensors or
torch files. It is written in one form: one safetensors file for each part.
"""

import difflib
import os
import sys
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, read_json, shown
from keras_sd.files.writing import replaced_folder, write_json
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.old_models import INPAINT, UPSCALE, repaired
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors
from keras_sd.weights.torch_pickle import read_torch

INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
LOW_RES_SCHEDULER = Path("low_res_scheduler") / "scheduler_config.json"
PARTS = ("text_encoder", "unet", "vae", "image_encoder")
# Of a whole CLIP: where `config.json` describes a tower, and how the names of its tensors begin.
_TOWERS = {
    "text_encoder": ("text_config", ("text_model.",)),
    "image_encoder": ("vision_config", ("vision_model.", "visual_projection.")),
}

_SINGLE_FILE = ".safetensors"
# Suffixes of weight files that are read but not written, and `.sft`, a short form of `.safetensors`.
_FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".h5", ".hdf5", ".keras", ".onnx", ".gguf", ".zip", ".sft")
_ALIKE = 0.75  # `.safetensor`, `.safetesnors`

# The names under which diffusers and transformers look for a part's weights: safetensors, torch.
_STEMS = {
    **dict.fromkeys(("unet", "vae"), ("diffusion_pytorch_model", "diffusion_pytorch_model")),
    **dict.fromkeys(("text_encoder", "image_encoder"), ("model", "pytorch_model")),
}
_SUFFIXES = (".safetensors", ".bin")
_LARGEST_INDEX = 16 * MIB

_LIBRARIES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Optional parts of a diffusers pipeline that we do not have, or that the pipeline does not use.
_NONE = [None, None]
_ABSENT = dict.fromkeys(("feature_extractor", "safety_checker"), _NONE)


class ShardIndex(TypedDict):
    """The schema of `*.index.json`: the file of each tensor."""

    weight_map: dict[str, str]


def holds_pixel_upscaler(folder):
    """Return whether a folder holds an upscaler that works on pixels, not on latents."""
    folder = checked_path("path", folder)
    return (folder / LOW_RES_SCHEDULER).is_file() and not (folder / "vae").is_dir()


def weights_path(directory, part, variant=None):
    """Return the weight file of a part, or the index of its shards.

    Args:
        directory: the part's own folder.
        part: "unet", "vae", "text_encoder" or "image_encoder".
        variant: such as "fp16". None takes the files without a variant or, if there are none, a variant.

    Raises:
        UserError: there is no such file; the message lists the variants that exist.
    """
    directory = Path(directory)
    found = _weights_by_variant(directory, part)
    if variant is None and found:
        return found.get(None) or found.get("fp16") or found[min(found)]
    if variant not in found:
        others = ", ".join(sorted(name for name in found if name))
        remedy = f"use one of the variants {others}" if others else "give a folder in diffusers' layout"
        wanted = f"{variant} weights" if variant else "weights"
        raise UserError(f"{directory}: no such file as its {wanted}; {remedy}")
    return found[variant]


def has_weights(directory, part):
    """Return whether a part's own folder has weights, in any form."""
    return bool(_weights_by_variant(Path(directory), part))


def _weights_by_variant(directory, part):
    """Return the path of the weights, or of their index, by variant; safetensors come before torch files."""
    found = {}
    for stem, suffix in zip(_STEMS[part], _SUFFIXES, strict=True):
        for path in sorted(directory.glob(f"{stem}*")):
            rest = path.name.removeprefix(stem)
            if rest.endswith(f"{suffix}.index.json"):
                variant = rest.removesuffix(f"{suffix}.index.json")
            elif rest.startswith(f"{suffix}.index.") and rest.endswith(".json"):
                variant = rest.removeprefix(f"{suffix}.index").removesuffix(".json")
            elif rest.endswith(suffix) and "-of-" not in rest:
                variant = rest.removesuffix(suffix)
            else:
                continue
            if variant == "" or variant.startswith("."):
                found.setdefault(variant[1:] or None, path)
    return found


def read_weights(path):
    """Read a weight file, or all shards that an index lists.

    Returns:
        A dictionary of read-only arrays that are mapped from disk.

    Raises:
        UserError: a file is missing or damaged, or the index names files outside the folder or wrong shards.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, any_type=True)
    if path.suffix == ".bin":
        saved = read_torch(path, any_type=True)
        if not isinstance(saved, dict):
            raise UserError(f"{path}: holds no dictionary of weights; fetch it again")
        return {name: value for name, value in saved.items() if isinstance(value, np.ndarray)}
    shard_of = read_json(path, ShardIndex, largest=_LARGEST_INDEX)["weight_map"]
    shards = {}
    for name in sorted(set(shard_of.values())):
        if Path(name).name != name or not name.endswith(_SUFFIXES):
            raise UserError(
                f"{path}: names the file {shown(name)}, which is not in its folder; do not use it"
            )
        shards[name] = read_weights(path.with_name(name))
    lost = [tensor for tensor, shard in shard_of.items() if tensor not in shards[shard]]
    if lost:
        raise UserError(
            f"{path}: {len(lost)} tensors are not in the files it names, the first is {lost[0]}; "
            "download the folder again"
        )
    return {tensor: shards[shard][tensor] for tensor, shard in shard_of.items()}


def read_part(directory, part, variant=None):
    """Read one part as a `Part`.

    Args:
        directory, part, variant: as in `weights_path`.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = read_json(Path(directory) / "config.json")
    if not _is_planned():
        source = weights_path(directory, part, variant)
        tensors = read_weights(source)
    else:  # shapes are enough
        source, tensors = Path(directory), {}
    if part in _TOWERS and isinstance(config.get(_TOWERS[part][0]), dict):
        config, tensors = _tower_of_clip(config, tensors, part)
    return Part(config, tensors, source)


def _is_planned():
    """Return whether this process plans, without importing a backend, which one that plans has imported."""
    if "keras_sd.backend" not in sys.modules:
        return False
    from keras_sd import backend

    return backend.plan() is not None


def _tower_of_clip(config, tensors, part):
    """Return config and tensors of one tower of a whole CLIP, as transformers' `CLIPModel` stores it."""
    key, prefixes = _TOWERS[part]
    projection = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return config[key] | projection, own


def read_folder(folder, variant=None):
    """Read a folder as a `Checkpoint`; configs of early diffusers releases are corrected (`old_models`).

    Args:
        variant: as in `weights_path`; at least one part must have it, and the others give their plain
            weights.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = checked_path("folder", folder)
    pipeline = read_json(folder / INDEX).get("_class_name")
    present = [part for part in PARTS if os.path.lexists(folder / part / "config.json")]
    with_variant = [part for part in present if variant in _weights_by_variant(folder / part, part)]
    if variant is not None and present and not with_variant:
        weights_path(folder / present[0], present[0], variant)  # raises an error that lists the variants
    parts = {
        part: read_part(folder / part, part, variant if part in with_variant else None) for part in present
    }
    read_json(folder / SCHEDULER)  # required in a whole model
    checkpoint = Checkpoint(parts, *read_companions(folder))
    return repaired(checkpoint, pipeline if isinstance(pipeline, str) else None)


def read_companions(folder):
    """Read the schedules and the tokenizer's folder that belong to a folder's parts; None if missing.

    Returns:
        `(scheduler, low_res_scheduler, tokenizer)` as in `Checkpoint`.
    """
    paths = (folder / SCHEDULER, folder / LOW_RES_SCHEDULER)
    schedulers = (read_json(path) if os.path.lexists(path) else None for path in paths)
    tokenizer = folder / "tokenizer"
    return *schedulers, tokenizer if tokenizer.is_dir() else None


def check_folder_name(path):
    """Raise a UserError for a folder whose name has the suffix of a weight file."""
    suffix = Path(path).suffix.lower()
    if suffix in _FILE_SUFFIXES:
        raise UserError(
            f"{path}: {suffix} files are read, not written; name a folder or a {_SINGLE_FILE} file"
        )
    if suffix != _SINGLE_FILE and difflib.get_close_matches(suffix, [_SINGLE_FILE], cutoff=_ALIKE):
        raise UserError(
            f"{path}: {suffix} resembles {_SINGLE_FILE}, the suffix of a single file; correct it, or give "
            "the folder another name"
        )


def write_part(folder, part, config, tensors, dtype=None):
    """Write one part of a folder: its `config.json` and its weights.

    Args:
        folder: the diffusers folder; created if it does not exist.
        part: "unet", "vae", "text_encoder" or "image_encoder".
        config: a JSON dictionary.
        tensors, dtype: as in `write_safetensors`.
    """
    directory = Path(folder) / part
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / f"{_STEMS[part][0]}.safetensors", tensors, dtype)
    write_json(directory / "config.json", config)


def write_folder(path, checkpoint, save_tokenizer=None, dtype=None, write_more=None):
    """Write a `Checkpoint` as a folder that diffusers opens too.

    All files are on disk before the first one gets its final name. So a kill before that, or weights that
    `dtype` cannot hold, leave an existing folder unchanged.

    Args:
        path: the folder; created if it does not exist. Files with the same names in it are replaced.
        checkpoint: the model. Without a UNet the folder holds single parts, not a pipeline.
        save_tokenizer: called with the folder of the tokenizer's files to write them, or None.
        dtype: as in `write_safetensors`.
        write_more: called with the folder to write further files at its top, or None.
    """
    if not Path(path).is_dir():
        check_folder_name(path)
    with replaced_folder(path, last=INDEX) as staging:
        for part, (config, tensors, _) in checkpoint.parts.items():
            write_part(staging, part, config, tensors, dtype)
        if save_tokenizer is not None:
            save_tokenizer(staging / "tokenizer")
        schedulers = (checkpoint.scheduler, checkpoint.low_res_scheduler)
        for place, config in zip((SCHEDULER, LOW_RES_SCHEDULER), schedulers, strict=True):
            if config is not None:
                write_scheduler(staging / place, config)
        if write_more is not None:
            write_more(staging)
        if "unet" in checkpoint.parts:
            write_json(staging / INDEX, _model_index(checkpoint))


def write_scheduler(path, config):
    """Write the dictionary of a noise schedule as the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def _model_index(checkpoint):
    """Return the content of `model_index.json`, with which diffusers opens a folder."""
    latents = checkpoint.parts["unet"].config.get("out_channels", 4)
    index = {"_diffusers_version": "0.35.0"} | _LIBRARIES | _ABSENT
    if checkpoint.low_res_scheduler is not None:
        index |= {"_class_name": UPSCALE, "max_noise_level": 350}
        index["low_res_scheduler"] = _library(checkpoint.low_res_scheduler)
    else:
        inpaints = checkpoint.parts["unet"].config.get("in_channels", latents) > latents
        kind = INPAINT if inpaints else "StableDiffusionPipeline"
        index |= {"_class_name": kind, "requires_safety_checker": False, "image_encoder": _NONE}
    if checkpoint.scheduler is not None:
        index["scheduler"] = _library(checkpoint.scheduler)
    return dict(sorted(index.items()))


def _library(scheduler):
    return ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
