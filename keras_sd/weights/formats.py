"""Files: safetensors, and the diffusers folder that is made of them."""

import contextlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keras_sd.errors import UserError

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

# The libraries that read a folder look for each part's weights under the name they would give it.
_WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
}

_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def read_safetensors(path):
    """Reads a safetensors file by mapping it into memory.

    Returns:
        A dictionary of read-only NumPy arrays; their bytes stay on disk until they are used.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a safetensors file")
    try:
        with safe_open(path, framework="np"):
            pass  # opening checks the header: its size, and that the offsets fill the file exactly
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or no safetensors file ({error}); fetch it again") from error
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(data[start:], name, entry, path) for name, entry in header.items()}


def _view(data, name, entry, path):
    if entry["dtype"] not in _NUMPY_DTYPES:
        raise UserError(f"{path}: {name} is of type {entry['dtype']}; convert the file to F32, F16 or BF16")
    begin, end = entry["data_offsets"]
    return data[begin:end].view(_NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write_safetensors(path, tensors, dtype=None):
    """Writes arrays as a safetensors file that torch libraries accept, whole or not at all.

    Args:
        path: the file; an earlier one is replaced by a rename once the new one is on disk.
        tensors: a dictionary of NumPy arrays.
        dtype: "float32", "float16" or "bfloat16" for all of them; None leaves them as they are.

    Raises:
        UserError: `dtype` is unknown or cannot hold a value, or the file cannot be written.
    """
    check_dtype(dtype)
    path = Path(path)
    arrays = {name: _convert(name, array, dtype) for name, array in tensors.items()}
    with _staged(path) as staging:
        try:
            save_file(arrays, staging, metadata={"format": "pt"})
        except SafetensorError as error:
            line = f"{path}: cannot be written ({error}); free some space or choose another place"
            raise UserError(line) from error


def check_dtype(dtype):
    """Raises a UserError unless `dtype` names a type that weights are written in, or is None."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: unknown; use one of {', '.join(DTYPES)}")


def _convert(name, array, dtype):
    # Contiguous, as the library writes a transposed view's memory in the order in which it lies.
    with np.errstate(over="ignore"):  # told below
        converted = np.asarray(array if dtype is None else array.astype(DTYPES[dtype]), order="C")
    if not np.isfinite(converted).all():
        raise UserError(f"{name}: holds values that are no finite {converted.dtype}; save as float32")
    return converted


@contextlib.contextmanager
def _staged(path):
    """Yields a path beside `path` to write to, and gives it that name once it is on disk."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield staging
        os.chmod(staging, 0o644)
        with open(staging, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def read_json(path):
    """Reads a JSON dictionary.

    Raises:
        UserError: the file is missing or holds no JSON dictionary.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; give a folder in diffusers' layout") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: no JSON dictionary; fetch it again")
    return values


def write_json(path, values):
    """Writes a dictionary as a JSON file, whole or not at all."""
    path = Path(path)
    with _staged(path) as staging:
        staging.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def weights_path(folder, part):
    """The safetensors file of a part ("unet", "vae", "text_encoder", "image_encoder") of a folder."""
    return Path(folder) / part / _WEIGHT_FILES[part]


def read_part(folder, part):
    """Reads one part of a diffusers folder.

    Returns:
        `(config dictionary, tensors)`, the latter as `read_safetensors` gives them.
    """
    return read_json(Path(folder) / part / "config.json"), read_safetensors(weights_path(folder, part))


def write_part(folder, part, config, tensors, dtype=None):
    """Writes one part of a diffusers folder: its `config.json` and its weights.

    Args:
        folder: the diffusers folder; made if there is none.
        part: "unet", "vae", "text_encoder" or "image_encoder".
        config: a JSON dictionary.
        tensors, dtype: as in `write_safetensors`.
    """
    path = weights_path(folder, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, dtype)
    write_json(path.with_name("config.json"), config)


def read_scheduler(folder):
    """Reads the noise schedule's dictionary of a diffusers folder."""
    return read_json(Path(folder) / "scheduler" / "scheduler_config.json")


def write_scheduler(folder, config):
    """Writes the noise schedule's dictionary of a diffusers folder."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def write_model_index(folder):
    """Writes the table of contents by which diffusers' `StableDiffusionPipeline` opens a folder."""
    write_json(Path(folder) / "model_index.json", _MODEL_INDEX)
