"""Reading LoRA files (Hu et al., 2022) for a model: finds the layer of each update, and its scale.

A name that kohya has joined by underscores cannot be split again, so the names of the model are joined and
compared.
"""

import warnings

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.weights import ldm_names
from keras_sd.weights.lora_files import (
    KOHYA_PREFIXES,
    PARTS,
    PEFT_PREFIX,
    by_layer,
    lora_file,
    read_tensors,
    single_alpha,
    without_processor,
)
from keras_sd.weights.lora_strength import ADAPTER_CONFIG, read_strengths
from keras_sd.weights.lora_updates import decomposed, fitted, update_of
from keras_sd.weights.rules import torch_shape


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
    tensors = read_tensors(path)
    shapes = {part: _layer_shapes(model) for part, model in models.items()}
    names = {part: _spellings(part, shapes[part], model.config.to_dict()) for part, model in models.items()}
    found = by_layer(tensors, lambda name: _resolve(name, names, path), path)
    strengths = read_strengths(path, PARTS)
    if not strengths and any(key.startswith(PEFT_PREFIX) for key in tensors):
        warnings.warn(
            f"{path}: PEFT's weights without {ADAPTER_CONFIG}, so each update has scale 1; put that file "
            "beside adapter_model.safetensors, or set the weight",
            stacklevel=4,
        )
    lora = {}
    for (part, layer), halves in found.items():
        update = _checked(part, layer, halves, strengths.get(part), shapes[part][layer], path)
        lora.setdefault(part, {})[layer] = update
    return lora


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
            spellings[KOHYA_PREFIXES[part] + name.replace(".", "_")] = layer
    if part == "unet":
        renamed = ldm_names.unet_to_ldm({f"{layer}.weight": layer for layer in layers}, config)
        for name, layer in renamed.items():
            spellings[KOHYA_PREFIXES[part] + name.removesuffix(".weight").replace(".", "_")] = layer
    return spellings


def _resolve(name, names, path):
    """Return the part and the layer for a name in a file."""
    plain = without_processor(name)
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
            return single_alpha(name, halves["alpha"], path)
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
