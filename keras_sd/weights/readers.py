"""Reads models of every format; the format is detected from the file or folder itself."""

import os
from pathlib import Path

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.files.json_files import read_json, shown
from keras_sd.weights import diffusers_folder
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.keras_cv_h5 import read_keras_cv
from keras_sd.weights.lora_files import holds_lora
from keras_sd.weights.old_models import UPSCALE, repaired
from keras_sd.weights.open_clip import is_open_clip, read_open_clip
from keras_sd.weights.single_file import read_single_file

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# Class names in `config.json`.
_PART_NAMES = {
    "_class_name": {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"},
    "model_type": {"clip_text_model": "text_encoder", "clip_vision_model": "image_encoder"},
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_KERAS_CV_SUFFIXES = (".h5", ".hdf5")


def read_checkpoint(
    path: str | Path, *, weights: str = "ema", variant: str | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """Read a model, or some parts of one, in any format.

    Args:
        path: a diffusers folder, a folder of KerasCV's H5 files, or a single file: of a whole model in
            latent-diffusion's names, of one part, of an OpenCLIP model, or of KerasCV.
        weights: "ema" or "raw", if a single file holds both.
        variant: variant of a folder's files, such as "fp16".
        prediction_type: "epsilon", "v_prediction" or "sample"; replaces that of the model's schedule.

    Returns:
        A `Checkpoint`.

    Raises:
        UserError: it is missing, damaged, not what its suffix says, or not of Stable Diffusion.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights {shown(weights)}: unknown; use ema or raw")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise UserError(
            f"prediction_type {shown(prediction_type)}: unknown; use {' or '.join(PREDICTION_TYPES)}"
        )
    with os_errors_in_one_line(path):
        checkpoint = _read_checkpoint(checked_path("path", path), weights, variant, prediction_type)
    if prediction_type is not None and checkpoint.scheduler is not None:
        chosen = {"prediction_type": prediction_type}
        repairs = checkpoint.scheduler_repairs and checkpoint.scheduler_repairs | chosen
        checkpoint = checkpoint._replace(scheduler=checkpoint.scheduler | chosen, scheduler_repairs=repairs)
    return checkpoint


def _read_checkpoint(path, weights, variant, prediction_type):
    if path.is_dir():
        return _read_directory(path, variant)
    if not path.is_file():
        if os.path.lexists(path):
            raise UserError(f"{path}: not a plain file (a pipe, a device or a broken link); give a model")
        raise UserError(f"{path}: no such file or folder; give a model")
    with path.open("rb") as file:
        is_hdf5 = file.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC
    if is_hdf5 and path.suffix.lower() in _KERAS_CV_SUFFIXES:
        return read_keras_cv(path)
    if not is_hdf5 and path.suffix.lower() in _KERAS_CV_SUFFIXES:
        raise UserError(f"{path}: not an HDF5 file, as its suffix says; fetch it again")
    if not is_hdf5 and is_open_clip(path):
        return read_open_clip(path)
    return read_single_file(path, weights, prediction_type)


def _read_directory(folder, variant):
    if os.path.lexists(folder / diffusers_folder.INDEX):
        return diffusers_folder.read_folder(folder, variant)
    if any(folder.glob("*.h5")):
        return read_keras_cv(folder)
    parts = {
        part: diffusers_folder.read_part(folder / part, part, variant)
        for part in diffusers_folder.PARTS
        if os.path.lexists(folder / part / "config.json")
    }
    if not parts:
        _refuse_folder_of_training(folder)
    if not parts and (folder / "config.json").is_file():
        part = _part_of(folder / "config.json")
        parts[part] = diffusers_folder.read_part(folder, part, variant)
    if not parts:
        raise UserError(f"{folder}: no {diffusers_folder.INDEX} there; give a folder in diffusers' layout")
    checkpoint = Checkpoint(parts, *diffusers_folder.read_companions(folder))
    if "unet" not in parts:
        return checkpoint
    return repaired(checkpoint, UPSCALE if checkpoint.low_res_scheduler else None)


def _refuse_folder_of_training(folder):
    """Raise a UserError for a folder that training has written, and that is no model but is near one."""
    if (folder / "run.json").is_file():
        model = folder / "model"
        remedy = f"give {model}" if model.is_dir() else "its model is written when the run ends"
        raise UserError(f"{folder}: is the folder of a run; {remedy}")
    if (folder / "manifest.json").is_file() and folder.name.startswith("checkpoint-"):
        raise UserError(f"{folder}: is a checkpoint of a run; make a model of it by `keras-sd export`")
    if holds_lora(folder):
        raise UserError(f"{folder}: is a LoRA; give the model, and this as its LoRA")


def _part_of(path):
    """Return the part that a `config.json` describes."""
    config = read_json(path)
    for key, names in _PART_NAMES.items():
        part = names.get(config.get(key)) if isinstance(config.get(key), str) else None
        if part is not None:
            return part
    raise UserError(f"{path}: describes no part of Stable Diffusion; give a folder in diffusers' layout")


def read_configs(path: str | Path) -> Checkpoint:
    """Read a model as `read_checkpoint` does, but of a diffusers folder without the weights.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = checked_path("path", path)
    with os_errors_in_one_line(path):
        if not (path / diffusers_folder.INDEX).is_file():
            return _read_checkpoint(path, "ema", None, None)
        parts = {
            part: Part(read_json(path / part / "config.json"), {}, path / part)
            for part in diffusers_folder.PARTS
            if os.path.lexists(path / part / "config.json")
        }
        pipeline = read_json(path / diffusers_folder.INDEX).get("_class_name")
        checkpoint = Checkpoint(parts, *diffusers_folder.read_companions(path))
        return repaired(checkpoint, pipeline if isinstance(pipeline, str) else None)


def read_part(path, part, variant=None):
    """Read one part of a model.

    Args:
        path: a diffusers folder, a folder of the part alone (`config.json` and weights), or a file that holds
            the part.
        part: "text_encoder", "image_encoder", "unet" or "vae".
        variant: as in `read_checkpoint`.

    Returns:
        A `Part`.

    Raises:
        UserError: the part is not found, or as `read_checkpoint`.
    """
    with os_errors_in_one_line(path):
        return _read_part(checked_path("path", path), part, variant)


def _read_part(path, part, variant):
    if (path / part).is_dir():
        return diffusers_folder.read_part(path / part, part, variant)
    if (path / "config.json").is_file() and not (path / diffusers_folder.INDEX).is_file():
        return diffusers_folder.read_part(path, part, variant)
    checkpoint = _read_checkpoint(path, "ema", variant, None)
    if part not in checkpoint.parts:
        there = ", ".join(checkpoint.parts)
        raise UserError(f"{path}: holds {there}, not the {part}; give one that holds it")
    return checkpoint.parts[part]
