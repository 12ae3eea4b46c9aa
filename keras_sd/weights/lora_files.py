"""Files of LoRA: where they are, and what their tensors are called. Nothing here needs a backend.

PEFT's dialect, which diffusers writes, names layers as the models do (`unet.….to_q.lora_A.weight`). kohya's
joins the names by underscores (`lora_unet_…_to_q.lora_down.weight`) and sometimes has latent-diffusion's
names.
"""

import os
import re
from pathlib import Path

import numpy as np

from keras_sd.errors import UserError
from keras_sd.weights.diffusers_folder import INDEX
from keras_sd.weights.safetensors_files import file_in, read_safetensors
from keras_sd.weights.torch_pickle import read_torch

PEFT_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"
PARTS = ("unet", "text_encoder")

# The files of a folder in the order in which they are looked for: diffusers' names, PEFT's, then ours of
# LoKr, which the others have no place for.
FOLDER_FILES = (
    *(PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin", KOHYA_FILE),
)
_MOST_NAMED = 10
PEFT_PREFIX = "base_model.model."

KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_HALVES = {"A": "down", "B": "up"}
# PEFT inserts the name of the adapter before ".weight" while it trains.
_TENSOR_PATTERN = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|lora(?:_linear_layer)?[._](?P<half>down|up|mid)\.weight"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.\w+)?(?:\.weight)?"
    r"|(?P<other>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))"
)
# diffusers' first dialect keeps the updates of attention in an attention processor.
_PROCESSOR_PATTERN = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


def holds_lora(folder):
    """Return whether the path is a folder with a LoRA of diffusers or PEFT."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in FOLDER_FILES)


def loras_in(folder):
    """Return the paths of the LoRAs in a folder: its safetensors files, and folders as PEFT writes them."""
    paths = sorted(Path(folder).iterdir())
    return [path for path in paths if path.suffix == ".safetensors" or holds_lora(path)]


def lora_file(path):
    """Return the path of a LoRA file: the path itself, or the file in a folder.

    Raises:
        UserError: the folder holds no LoRA. The message names those near it.
    """
    file = file_in(path, FOLDER_FILES)
    if file.exists() or not Path(path).is_dir():
        return file
    if (Path(path) / INDEX).is_file():
        raise UserError(f"{path}: is a whole model, no LoRA; give it as the model")
    run = next((parent for parent in (Path(path), Path(path).parent) if holds_lora(parent / "model")), None)
    if run is not None:
        remedy = f"give {run / 'model'}"
    elif Path(path).name.startswith("checkpoint-"):
        remedy = "make a LoRA of it by `keras-sd export`"
    elif there := loras_in(path):
        remedy = f"give one of {', '.join(map(str, there[:_MOST_NAMED]))}"
    else:
        remedy = f"give a file, or a folder with {PEFT_FILE}"
    raise UserError(f"{path}: is no folder of a LoRA; {remedy}")


def read_tensors(path):
    """Return the tensors of a LoRA file by name.

    Raises:
        UserError: the file is damaged, or holds no tensors by name.
    """
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: holds no tensors by name; give a LoRA")
    if not tensors:
        raise UserError(f"{path}: holds no tensors; give a LoRA")
    return tensors


def by_layer(tensors, resolve, path):
    """Return a dictionary of key -> role -> array, with the roles of `lora_updates.update_of` and "alpha".

    Args:
        tensors, path: of the file.
        resolve: `resolve(name)` returns the key, part and layer, of a layer's name in the file.
    """
    found = {}
    for key, array in tensors.items():
        match = _TENSOR_PATTERN.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(array, np.ndarray):
            raise UserError(
                f"{path}: {key} is not a tensor of a LoRA; give one in diffusers', PEFT's or kohya's format"
            )
        part, layer = key_of_layer = resolve(match["layer"])
        half = _HALVES.get(match["peft"]) or match["half"] or match["magnitude"] or match["other"]
        halves = found.setdefault(key_of_layer, {})
        if half in halves:
            raise UserError(
                f"{path}: {key} is a second {half} for {part}.{layer}; give each update in a file of its own"
            )
        halves[half] = array
    return found


def without_processor(name):
    """Return a layer's name in diffusers' first dialect as later ones have it."""
    return _PROCESSOR_PATTERN.sub(lambda match: f".{match[1]}" + (".0" * (match[1] == "to_out")), name)


def single_alpha(name, array, path):
    """Return the alpha of an update; raise UserError unless it is one finite number."""
    alpha = np.asarray(array, "float32")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise UserError(f"{path}: {name} has an alpha that is not a finite number; use an undamaged file")
    return float(alpha.item())
