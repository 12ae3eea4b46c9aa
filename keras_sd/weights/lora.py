"""LoRA as a file format (Hu et al., 2022): reads and writes updates in PEFT's and kohya's dialects.

PEFT's dialect, which diffusers writes, names layers as the models do (`unet.….to_q.lora_A.weight`). kohya's
joins the names by underscores (`lora_unet_…_to_q.lora_down.weight`) and sometimes has latent-diffusion's
names. A joined name cannot be split again, so the names of the model are joined and compared.
"""

import os
import re
import warnings
from pathlib import Path

import numpy as np

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.weights import ldm_names
from keras_sd.weights.lora_strength import ADAPTER_CONFIG, read_strengths
from keras_sd.weights.lora_updates import Decomposed, Kronecker, LowRank, decomposed, fitted, update_of
from keras_sd.weights.rules import torch_shape
from keras_sd.weights.safetensors_files import DTYPES, file_in, read_safetensors, write_safetensors
from keras_sd.weights.torch_pickle import read_torch

PEFT_FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder")

# The files of a folder in the order in which they are looked for: diffusers' names, then PEFT's.
_FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
_MOST_NAMED = 10
_PEFT_PREFIX = "base_model.model."

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_HALVES = {"A": "down", "B": "up"}
# PEFT inserts the name of the adapter before ".weight" while it trains.
_TENSOR_PATTERN = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|lora(?:_linear_layer)?[._](?P<half>down|up|mid)\.weight"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.\w+)?"
    r"|(?P<other>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))"
)
# diffusers' first dialect keeps the updates of attention in an attention processor.
_PROCESSOR_PATTERN = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


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
        A dictionary of part -> layer -> `lora_updates.Update`.

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
    """Return a dictionary of part -> layer -> role -> array; roles are those of `lora_updates.update_of`."""
    found = {}
    for key, array in tensors.items():
        match = _TENSOR_PATTERN.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(array, np.ndarray):
            raise UserError(
                f"{path}: {key} is not a tensor of a LoRA; give one in diffusers', PEFT's or kohya's format"
            )
        part, layer = _resolve(match["layer"], names, path)
        half = _HALVES.get(match["peft"]) or match["half"] or match["magnitude"] or match["other"]
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
        if parameter.variable.name == "kernel" and not is_update(parameter.name)
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


def is_update(name):
    """Return whether a variable of this published name belongs to an update that is trained."""
    return ".lora_" in name or ".lokr_" in name


def _checked(part, layer, halves, strength, shape, path):
    name = f"{part}.{layer}"
    tensors = {role: array for role, array in halves.items() if role != "alpha"}

    def alpha_of(rank):
        if "alpha" in halves:
            return _single_alpha(name, halves["alpha"], path)
        return strength.alpha(layer, rank) if strength else float(rank)

    update = update_of(tensors, shape, name, path, alpha_of)
    suited = fitted(update, shape)
    if suited is None:
        raise UserError(
            f"{path}: {name} is for a layer of {update.shape}, the model's is {shape}; "
            "use a LoRA of this base model"
        )
    if strength is not None and strength.use_dora != ("magnitude" in tensors):
        raise UserError(
            f"{path}: {name} {'lacks' if strength.use_dora else 'has'} a magnitude of DoRA, against use_dora "
            "of its config; use the config that was written with the weights"
        )
    return decomposed(suited, tensors, shape, name, path)


def _single_alpha(name, array, path):
    alpha = np.asarray(array, "float32")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise UserError(f"{path}: {name} has an alpha that is not a finite number; use an undamaged file")
    return float(alpha.item())


def write_lora(path, lora, dialect="peft", dtype=None, metadata=None):
    """Write the updates of a LoRA as a safetensors file.

    Args:
        path: the file.
        lora: dictionary of part -> layer -> `lora_updates.Update`, as `read_lora` returns it.
        dialect: "peft", which diffusers reads, or "kohya". PEFT's dialect has no entry for alpha that all
            readers know, so the scale is multiplied into `up`. It has no LoKr and no LoHa.
        dtype: as in `write_safetensors`.
        metadata: dictionary of texts for the file's header.

    Raises:
        UserError: the dialect is unknown or has no such kind of update, or as `write_safetensors`.
    """
    if dialect not in ("peft", "kohya"):
        raise UserError(f"LoRA dialect {dialect!r}: unknown; use peft or kohya")
    tensors = {}
    for part, layers in lora.items():
        for layer, update in layers.items():
            if dialect == "peft":
                tensors |= _peft_tensors(f"{part}.{layer}", update, dtype)
            else:
                tensors |= _kohya_tensors(_KOHYA_PREFIXES[part] + layer.replace(".", "_"), update)
    write_safetensors(path, tensors, dtype, metadata)


def _peft_tensors(name, update, dtype):
    tensors = {}
    if isinstance(update, Decomposed):
        if update.by_input:
            raise UserError(f"{name}: PEFT has no DoRA of columns; use the dialect kohya")
        tensors[f"{name}.lora_magnitude_vector"] = _peft_magnitude(update)
        update = update.update
    if not isinstance(update, LowRank):
        raise UserError(f"{name}: diffusers reads no LoKr and no LoHa; use the dialect kohya")
    down, up = _with_scale(update.down, update.up, update.alpha / len(update.down), dtype)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} | tensors


def _peft_magnitude(update):
    magnitude = np.asarray(update.magnitude).reshape(-1)
    window = len(update.update.shape) - 2
    return magnitude.reshape(1, -1, *(1,) * window) if window else magnitude


def _kohya_tensors(name, update):
    tensors = {}
    if isinstance(update, Decomposed):
        axes = len(update.update.shape) - 1
        shape = (1, -1, *(1,) * (axes - 1)) if update.by_input else (-1, *(1,) * axes)
        tensors["dora_scale"] = np.asarray(update.magnitude).reshape(shape)
        update = update.update
    if isinstance(update, LowRank):
        tensors |= {"lora_down.weight": update.down, "lora_up.weight": update.up}
    elif isinstance(update, Kronecker):
        tensors |= _factors("lokr_w1", update.w1) | _factors("lokr_w2", update.w2)
    else:
        tensors |= _factors("hada_w1", update.first) | _factors("hada_w2", update.second)
    tensors["alpha"] = np.asarray(update.alpha, "float32")
    return {f"{name}.{role}": array for role, array in tensors.items()}


def _factors(name, factors):
    if len(factors) == 1:
        return {name: factors[0]}
    a, b = factors
    return {f"{name}_a": a, f"{name}_b": b.reshape(len(b), -1)}


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
