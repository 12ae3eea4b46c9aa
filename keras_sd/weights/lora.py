"""LoRA as a file format (Hu et al., 2022): reads and writes low-rank updates in PEFT's and kohya's dialects.

PEFT's dialect, which diffusers writes, names layers as the models do (`unet.….to_q.lora_A.weight`). kohya's
joins the names by underscores (`lora_unet_…_to_q.lora_down.weight`) and sometimes has latent-diffusion's
names. A joined name cannot be split again, so the names of the model are joined and compared.
"""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.weights import ldm_names
from keras_sd.weights.lora_strength import ADAPTER_CONFIG, read_strengths
from keras_sd.weights.rules import torch_shape
from keras_sd.weights.safetensors_files import DTYPES, file_in, read_safetensors, write_safetensors
from keras_sd.weights.torch_pickle import read_torch

PEFT_FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder")

# The files of a folder in the order in which they are looked for: diffusers' names, then PEFT's.
_FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
_MOST_NAMED = 10
_DORA = ("dora_scale", "magnitude_vector")
_PEFT_PREFIX = "base_model.model."

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# PEFT inserts the name of the adapter before ".weight" while it trains.
_TENSOR_PATTERN = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|lora(?:_linear_layer)?[._](?P<half>down|up)\.weight|(?P<alpha>alpha))"
)
# diffusers' first dialect keeps the updates of attention in an attention processor.
_PROCESSOR_PATTERN = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


class LowRank(NamedTuple):
    """The update `alpha / rank * up @ down` of one layer, in torch layout: (rank, in, …), (out, rank, …)."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def scaled_product(self):
        """The full update of the layer's weight, in torch layout, float32."""
        rank = len(self.down)
        down = np.asarray(self.down, "float32").reshape(rank, -1)
        product = np.asarray(self.up, "float32").reshape(-1, rank) @ down
        return np.float32(self.alpha / rank) * product.reshape(-1, *self.down.shape[1:])


def holds_lora(folder):
    """Return whether the path is a folder with a LoRA of diffusers or PEFT."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _FOLDER_FILES)


def loras_in(folder):
    """Return the paths of the LoRAs in a folder: its safetensors files, and folders as PEFT writes them."""
    paths = sorted(Path(folder).iterdir())
    return [path for path in paths if path.suffix == ".safetensors" or holds_lora(path)]


def lora_file(path):
    """Return the path of a LoRA file: the path itself, or the file in a folder.

    Raises:
        UserError: the folder holds no LoRA. The message names those near it.
    """
    file = file_in(path, _FOLDER_FILES)
    if file.exists() or not Path(path).is_dir():
        return file
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


def read_lora(path, models):
    """Read a LoRA file, or a folder with `pytorch_lora_weights` or `adapter_model`.

    Alpha comes from the tensors named alpha, otherwise from the `adapter_config.json` beside an
    `adapter_model`, otherwise from the file's header. Without any of these alpha is the rank, so the scale is
    1.

    Args:
        path: a safetensors file, a torch file or a folder.
        models: dictionary of part ("unet", "text_encoder") -> the Keras model that the LoRA is for.

    Returns:
        A dictionary of part -> layer -> `LowRank`.

    Raises:
        UserError: the file is damaged or no LoRA, is for another model, or its config has an unsupported
            option; the message names the difference.
    """
    path = lora_file(path)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: holds no tensors by name; give a LoRA")
    shapes = {part: _layer_shapes(model) for part, model in models.items()}
    names = {part: _spellings(part, shapes[part], model.config.to_dict()) for part, model in models.items()}
    found = _by_layer(tensors, names, path)
    if not found:
        raise UserError(f"{path}: holds no tensors; give a LoRA")
    strengths = read_strengths(path, PARTS)
    if not strengths and any(key.startswith(_PEFT_PREFIX) for key in tensors):
        warnings.warn(
            f"{path}: PEFT's weights without {ADAPTER_CONFIG}, so each update has scale 1; put that file "
            "beside adapter_model.safetensors, or set the weight",
            stacklevel=4,
        )
    return {
        part: {
            layer: _checked(part, layer, halves, strengths.get(part), shapes[part][layer], path)
            for layer, halves in layers.items()
        }
        for part, layers in found.items()
    }


def _by_layer(tensors, names, path):
    """Return a dictionary of part -> layer -> "down", "up" or "alpha" -> array for the tensors of a file."""
    found = {}
    for key, array in tensors.items():
        match = _TENSOR_PATTERN.fullmatch(key) if isinstance(key, str) else None
        if match is None and str(key).endswith(_DORA):
            raise UserError(f"{path}: {key} belongs to DoRA, which is not supported; use a plain LoRA")
        if match is None or not isinstance(array, np.ndarray):
            raise UserError(
                f"{path}: {key} is not a tensor of a LoRA; give one in diffusers', PEFT's or kohya's format"
            )
        part, layer = _resolve(match["layer"], names, path)
        half = _HALVES.get(match["peft"] or match["half"], "alpha")
        halves = found.setdefault(part, {}).setdefault(layer, {})
        if half in halves:
            raise UserError(
                f"{path}: {key} is a second {half} for {part}.{layer}; give each update in a file of its own"
            )
        halves[half] = array
    return found


def _layer_shapes(model):
    """Return the weight shape, in torch layout, of each layer that can have an update."""
    return {
        parameter.name.removesuffix(".weight"): torch_shape(parameter)
        for parameter in parameter_paths(model)
        if parameter.variable.name == "kernel" and ".lora_" not in parameter.name
    }


def _spellings(part, layers, config):
    """Return a dictionary from every spelling of a layer's name in files to the layer."""
    spellings = {}
    for layer in layers:
        short = layer.removeprefix("text_model.")
        dotted = [layer, short, f"{part}.{layer}", f"{part}.{short}"]
        spellings |= dict.fromkeys([*dotted, f"base_model.model.{layer}", f"base_model.model.{short}"], layer)
        for name in (layer, short):
            spellings[_KOHYA_PREFIXES[part] + name.replace(".", "_")] = layer
    if part == "unet":
        renamed = ldm_names.unet_to_ldm({f"{layer}.weight": layer for layer in layers}, config)
        for name, layer in renamed.items():
            spellings[_KOHYA_PREFIXES[part] + name.removesuffix(".weight").replace(".", "_")] = layer
    return spellings


def _resolve(name, names, path):
    """Return the part and the layer for a name in a file."""
    plain = _PROCESSOR_PATTERN.sub(lambda match: f".{match[1]}" + (".0" * (match[1] == "to_out")), name)
    for part, spellings in names.items():
        if plain in spellings:
            return part, spellings[plain]
    raise UserError(f"{path}: the model has no layer {name}; use a LoRA that was made for this kind of model")


def _checked(part, layer, halves, strength, shape, path):
    name = f"{part}.{layer}"
    missing = {"down", "up"} - halves.keys()
    if missing:
        raise UserError(f"{path}: {name} lacks its {missing.pop()} half; fetch the file again")
    down, up = halves["down"], halves["up"]
    if not down.size or not up.size:
        raise UserError(f"{path}: {name} has a half that is empty; fetch the file again")
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.shape[1]:
        raise UserError(f"{path}: {name} has halves {down.shape} and {up.shape} that do not fit together")
    # A 1x1 convolution and a linear layer hold the same numbers; files use either shape.
    own = (up.shape[0], *down.shape[1:])
    if np.prod(own) != np.prod(shape) or own[:2] != shape[:2]:
        raise UserError(
            f"{path}: {name} is for a layer of {own}, the model's is {shape}; use a LoRA of this base model"
        )
    for array in (down, up):
        if not np.isfinite(np.asarray(array, "float32")).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; use an undamaged file")
    if "alpha" in halves:
        return LowRank(down, up, _single_alpha(name, halves["alpha"], path))
    return LowRank(down, up, strength.alpha(layer, len(down)) if strength else float(len(down)))


def _single_alpha(name, array, path):
    alpha = np.asarray(array, "float32")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise UserError(f"{path}: {name} has an alpha that is not a finite number; use an undamaged file")
    return float(alpha.item())


def write_lora(path, lora, dialect="peft", dtype=None):
    """Write low-rank updates as a safetensors file.

    Args:
        path: the file.
        lora: dictionary of part -> layer -> `LowRank`, as `read_lora` returns it.
        dialect: "peft", which diffusers reads, or "kohya". PEFT's dialect has no entry for alpha that all
            readers know, so the scale is multiplied into `up`.
        dtype: as in `write_safetensors`.

    Raises:
        UserError: the dialect is unknown, or as `write_safetensors`.
    """
    if dialect not in ("peft", "kohya"):
        raise UserError(f"LoRA dialect {dialect!r}: unknown; use peft or kohya")
    tensors = {}
    for part, layers in lora.items():
        for layer, (down, up, alpha) in layers.items():
            if dialect == "peft":
                down, up = _with_scale(down, up, alpha / len(down), dtype)
                tensors[f"{part}.{layer}.lora_A.weight"] = down
                tensors[f"{part}.{layer}.lora_B.weight"] = up
            else:
                name = _KOHYA_PREFIXES[part] + layer.replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = down
                tensors[f"{name}.lora_up.weight"] = up
                tensors[f"{name}.alpha"] = np.asarray(alpha, "float32")
    write_safetensors(path, tensors, dtype)


def _with_scale(down, up, scale, dtype):
    """Return the two factors of an update with `scale` multiplied in, in the type to write."""
    kind = np.dtype(DTYPES[dtype] if dtype else up.dtype)
    scaled = np.asarray(up, "float32") * np.float32(scale)
    if kind != np.float16:
        return down, scaled.astype(kind)
    # float16 loses precision below 6e-5. A power of two, which is exact, gives both factors the same
    # magnitude.
    down = np.asarray(down, "float32")
    largest, own = np.abs(scaled).max(initial=0), np.abs(down).max(initial=0)
    share = np.float32(2.0 ** np.round(np.log2(largest / own) / 2)) if largest and own else np.float32(1)
    return (down * share).astype(kind), (scaled / share).astype(kind)
