"""Files of low-rank updates (LoRA, Hu et al., 2022), in the dialects that people have.

PEFT's, which diffusers writes, names layers as the models do (`unet.….to_q.lora_A.weight`); kohya's joins the
names by underscores (`lora_unet_…_to_q.lora_down.weight`) and has latent-diffusion's names at times. Since a
joined name cannot be taken apart, the names of the model are joined and compared.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_sd.errors import UserError
from keras_sd.weights import ldm_names
from keras_sd.weights.formats import read_metadata, read_safetensors, write_safetensors
from keras_sd.weights.rules import parameter_paths
from keras_sd.weights.torch_pickle import read_torch

PEFT_FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder")

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# The last group but one is the name of the adapter, which PEFT puts in while it trains.
_TENSOR_PATTERN = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|lora(?:_linear_layer)?[._](?P<half>down|up)\.weight|(?P<alpha>alpha))"
)
# diffusers' first dialect has the updates of attention in a processor beside it.
_PROCESSOR_PATTERN = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


class LowRank(NamedTuple):
    """The update `alpha / rank * up @ down` of one layer, in torch layout: (rank, in, …), (out, rank, …)."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def scaled_product(self):
        """What is added to the layer's weight, in torch layout, float32."""
        rank = len(self.down)
        down = np.asarray(self.down, "float32").reshape(rank, -1)
        product = np.asarray(self.up, "float32").reshape(-1, rank) @ down
        return np.float32(self.alpha / rank) * product.reshape(-1, *self.down.shape[1:])


def read_lora(path, models):
    """Reads a file, or a folder with `pytorch_lora_weights.safetensors` in it.

    Args:
        path: a safetensors file, or torch's own.
        models: part ("unet", "text_encoder") -> the model that the updates are for.

    Returns:
        A dictionary: part -> layer -> `LowRank`.

    Raises:
        UserError: the file is damaged or no LoRA, or the LoRA of another model; the line says what differs.
    """
    path = Path(path)
    path = path / PEFT_FILE if path.is_dir() else path
    safe = path.suffix == ".safetensors"
    tensors = read_safetensors(path) if safe else read_torch(path)
    shapes = {part: _layer_shapes(model) for part, model in models.items()}
    names = {part: _spellings(part, shapes[part], model.config.to_dict()) for part, model in models.items()}
    found = {}
    for key, array in tensors.items():
        match = _TENSOR_PATTERN.fullmatch(key)
        if match is None or not isinstance(array, np.ndarray):
            raise UserError(
                f"{path}: {key} is no tensor of a LoRA; give one in diffusers', PEFT's or kohya's way"
            )
        part, layer = _resolve(match["layer"], names, path)
        half = _HALVES.get(match["peft"] or match["half"], "alpha")
        found.setdefault(part, {}).setdefault(layer, {})[half] = array
    if not found:
        raise UserError(f"{path}: holds no tensors; give a LoRA")
    alphas = _written_alphas(path) if safe else {}
    return {
        part: {
            layer: _checked(f"{part}.{layer}", halves, alphas.get(part), shapes[part][layer], path)
            for layer, halves in layers.items()
        }
        for part, layers in found.items()
    }


def _layer_shapes(model):
    """Layer -> the shape of its weight in torch layout, of all layers that an update could be for."""
    return {
        parameter.name.removesuffix(".weight"): _torch_shape(parameter.variable.shape)
        for parameter in parameter_paths(model)
        if parameter.variable.name == "kernel" and ".lora_" not in parameter.name
    }


def _torch_shape(shape):
    *window, inputs, outputs = shape
    return (outputs, inputs, *window)


def _spellings(part, layers, config):
    """Every spelling of a layer's name that files have -> the layer."""
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
    """The part and the layer that a name in a file means."""
    plain = _PROCESSOR_PATTERN.sub(lambda match: f".{match[1]}" + (".0" * (match[1] == "to_out")), name)
    for part, spellings in names.items():
        if plain in spellings:
            return part, spellings[plain]
    raise UserError(f"{path}: the model has no layer {name}; use a LoRA that was made for this kind of model")


def _written_alphas(path):
    """Part -> alpha, of files that say it in their header as diffusers writes it."""
    try:
        written = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return {}
    alphas = {part: written.get(f"{part}.lora_alpha") for part in PARTS}
    return {part: alpha for part, alpha in alphas.items() if alpha is not None}


def _checked(name, halves, written_alpha, shape, path):
    missing = {"down", "up"} - halves.keys()
    if missing:
        raise UserError(f"{path}: {name} lacks its {missing.pop()} half; fetch the file again")
    down, up = halves["down"], halves["up"]
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.shape[1]:
        raise UserError(f"{path}: {name} has halves {down.shape} and {up.shape} that do not fit together")
    # A 1x1 convolution and a linear layer hold the same numbers; files have either.
    own = (up.shape[0], *down.shape[1:])
    if np.prod(own) != np.prod(shape) or own[:2] != shape[:2]:
        raise UserError(
            f"{path}: {name} is for a layer of {own}, the model's is {shape}; use a LoRA of this base model"
        )
    for array in (down, up):
        if not np.isfinite(np.asarray(array, "float32")).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; use an undamaged file")
    alpha = halves.get("alpha", written_alpha)
    return LowRank(down, up, len(down) if alpha is None else float(np.asarray(alpha, "float32").item()))


def write_lora(path, lora, dialect="peft", dtype=None):
    """Writes updates as a safetensors file.

    Args:
        path: the file.
        lora: part -> layer -> `LowRank`, as `read_lora` gives it.
        dialect: "peft", which diffusers reads, or "kohya". The first has no place for alpha that all of its
            readers know, so the scale goes into `up`.
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
                scale = np.asarray(alpha / len(down), up.dtype)
                tensors[f"{part}.{layer}.lora_A.weight"] = down
                tensors[f"{part}.{layer}.lora_B.weight"] = up * scale
            else:
                name = _KOHYA_PREFIXES[part] + layer.replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = down
                tensors[f"{name}.lora_up.weight"] = up
                tensors[f"{name}.alpha"] = np.asarray(alpha, down.dtype)
    write_safetensors(path, tensors, dtype)
