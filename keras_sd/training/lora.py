"""Training of LoRA (Hu et al., 2022) and its relatives: adds updates to layers of models and saves them."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from keras_sd.errors import UserError
from keras_sd.models.layers import LowRankUpdate
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.quantization import refuse_quantized
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.training.adapter_settings import AdapterSettings, kronecker_factors, longest_block
from keras_sd.weights.lora import is_update, read_lora
from keras_sd.weights.lora_files import KOHYA_FILE, PEFT_FILE
from keras_sd.weights.lora_updates import Decomposed, Hadamard, Kronecker, LowRank
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.rules import from_torch, torch_state


def add_updates(models: dict[str, Any], settings: AdapterSettings) -> None:
    """Add updates to layers of models, and freeze all other weights of these models.

    The updates have no effect at first. Call this before anything is compiled with a model.

    Args:
        models: part ("unet", "text_encoder") -> its model.
        settings: which layers get which update.

    Raises:
        UserError: a model has no such layer, no layer is in a named block, or a factor of LoKr does not
            divide a layer's width.
    """
    for model in models.values():
        refuse_quantized("LoRA", model)
    chosen = {part: _chosen(part, model, settings) for part, model in models.items()}
    for name in ("rank_by_block", "alpha_by_block"):
        for block in getattr(settings, name):
            _check_block(name, block, models, settings)
    _check_factor(chosen, settings)
    if not all(chosen.values()):
        raise UserError("LoRA: the model has no attention to put it on; train all layers or the full model")
    for part, model in models.items():
        freeze(model)
        for layer, rank, alpha in chosen[part].values():
            _add_update(layer, rank, alpha, settings)


def add_lora(
    model: UNet | TextEncoder, rank: int, alpha: float, *, everywhere: bool = False, **options: Any
) -> None:
    """Add low-rank updates to layers of a UNet or a text encoder, and freeze all other weights.

    Args:
        model: a `UNet` or a `TextEncoder`.
        rank: the rank of every update.
        alpha: every update is scaled by alpha / rank.
        everywhere: add updates to all linear layers and the convolutions of residual blocks; False adds them
            to the projections of attention only.
        options: further settings of `AdapterSettings`, such as `use_dora=True` or `adapter="lokr"`.

    Raises:
        UserError: an option is out of range, or as `add_updates`.
    """
    layers = "all" if everywhere else "attention"
    settings = AdapterSettings(rank=rank, alpha=alpha, layers=layers, **options)
    add_updates({"text_encoder" if isinstance(model, TextEncoder) else "unet": model}, settings)


def _chosen(part, model, settings):
    """Return the layers that get updates: name -> (layer, rank, alpha)."""
    chosen = {}
    for name, layer in adaptable_layers(model).items():
        rank_and_alpha = settings.rank_and_alpha(part, name)
        if rank_and_alpha is not None:
            chosen[name] = (layer, *rank_and_alpha)
    return chosen


def _check_factor(chosen, settings):
    """Raise UserError unless the factor of LoKr divides the widths of all chosen layers."""
    factor = settings.lokr_factor
    widths = {
        size: f"{part}.{name}"
        for part, layers in chosen.items()
        for name, (layer, *_) in layers.items()
        for size in layer.kernel.shape[-2:]
    }
    bad = [size for size in sorted(widths) if factor is not None and size % factor]
    if bad:
        common = math.gcd(*widths)
        divisors = [str(divisor) for divisor in range(2, 65) if common % divisor == 0]
        either = f"give one of {', '.join(divisors)}, or " if divisors else ""
        raise UserError(
            f"lokr_factor {factor}: does not divide {bad[0]}, a width of {widths[bad[0]]}; "
            f"{either}leave it out"
        )


def adaptable_layers(model):
    """Return the layers of a model that can have an update: name -> layer."""
    return {
        parameter.name.removesuffix(".weight"): parameter.layer
        for parameter in parameter_paths(model)
        if parameter.variable.name == "kernel"
        and isinstance(parameter.layer, LowRankUpdate)
        and not is_update(parameter.name)
    }


def _check_block(name, block, models, settings):
    """Raise UserError unless a layer that could have an update is in the block."""
    layers = [
        (part, layer)
        for part, model in models.items()
        for layer in adaptable_layers(model)
        if _would_have(part, layer, settings)
    ]
    if any(longest_block({block: 0}, part, layer) for part, layer in layers):
        return
    blocks = sorted({layer.split(".")[0] for _, layer in layers})
    raise UserError(
        f"{name} {block}: no layer with an update has a name that begins so; use {', '.join(blocks)} "
        "or the beginning of a layer's name"
    )


def _would_have(part, layer, settings):
    """Return whether a layer has an update where no block has the rank 0."""
    return dataclasses.replace(settings, rank_by_block={}).rank_and_alpha(part, layer) is not None


def _add_update(layer, rank, alpha, settings):
    if settings.adapter == "lora":
        layer.add_low_rank(rank, settings.scale(rank, alpha), use_dora=settings.use_dora)
        return
    inputs, outputs, rank = _kronecker_shape(layer, rank, settings)
    layer.add_kronecker(inputs, outputs, rank, 1.0 if rank is None else settings.scale(rank, alpha))


def _kronecker_shape(layer, rank, settings):
    """Return the factors of a layer's inputs and outputs, and the rank, None for a whole second matrix."""
    inputs, outputs = (kronecker_factors(size, settings.lokr_factor) for size in layer.kernel.shape[-2:])
    return inputs, outputs, rank if rank < max(inputs[1], outputs[1]) / 2 else None


@contextlib.contextmanager
def without_updates(model):
    """Disable the updates of a model inside the block."""
    layers = adaptable_layers(model).values()
    for layer in layers:
        layer.has_active_update = False
    try:
        yield
    finally:
        for layer in layers:
            layer.has_active_update = True


def freeze(model):
    """Freeze all weights that a model has now."""
    # Variable by variable: a layer that is not trainable would hide weights that are added later.
    for variable in model.weights:
        variable.trainable = False


def lora_tensors(model):
    """Return the updates' tensors by published name, in torch layout, as a dictionary of NumPy arrays."""
    return torch_state(model, is_update)


def trained_updates(model):
    """Return the updates of a model: layer -> `lora_updates.Update`."""
    tensors = lora_tensors(model)
    updates = {}
    for name, layer in adaptable_layers(model).items():
        if f"{name}.lora_A.weight" in tensors:
            down, up = (tensors[f"{name}.lora_{half}.weight"] for half in "AB")
            update = LowRank(down, up, layer.lora_scale * len(down))
            magnitude = tensors.get(f"{name}.lora_magnitude_vector")
            updates[name] = update if magnitude is None else Decomposed(update, magnitude)
        elif f"{name}.lokr_w1" in tensors:
            updates[name] = _trained_kronecker(name, layer, tensors)
    return updates


def _trained_kronecker(name, layer, tensors):
    first = (tensors[f"{name}.lokr_w1"],)
    if f"{name}.lokr_w2.weight" in tensors:
        return Kronecker(first, (tensors[f"{name}.lokr_w2.weight"],), 1.0)
    a, b = (tensors[f"{name}.lokr_w2_{half}.weight"] for half in "ab")
    return Kronecker(first, (a.reshape(a.shape[:2]), b), layer.lora_scale * len(b))


def assign_updates(models: dict[str, Any], path: str | Path) -> None:
    """Assign the updates of a LoRA file to those that models have, from which training then begins.

    An update whose scale is multiplied into its factors, as in diffusers' files, is scaled back.

    Args:
        models: part -> model, of all parts that a file can be for. Parts without updates are not trained.
        path: as `read_lora` takes it.

    Raises:
        UserError: the file has other layers, or updates of another kind, rank or alpha; or as `read_lora`.
            Then nothing has changed.
    """
    lora = read_lora(path, models)
    remedies = _remedies_for_numbers(lora)
    tensors = {}
    for part, model in models.items():
        own, theirs = trained_updates(model), lora.get(part, {})
        if theirs and not own:
            raise UserError(
                f"{path}: has updates of the {part.replace('_', ' ')}, which is not trained; "
                "train it, too, or use another LoRA"
            )
        surplus, lacking = theirs.keys() - own.keys(), own.keys() - theirs.keys()
        if surplus or lacking:
            if lacking:
                fault = f"lacks an update of {part}.{min(lacking)}, which gets one here"
            else:
                fault = f"has an update of {part}.{min(surplus)}, which gets none here"
            raise UserError(
                f"{path}: {fault}; choose the layers by `lora_layers`, `conv_rank` and `rank_by_block`"
            )
        for layer, update in theirs.items():
            name = f"{path}: {part}.{layer}"
            tensors[part] = tensors.get(part, {}) | _tensors_like(own[layer], update, layer, name, remedies)
    for part, model in models.items():
        for parameter in parameter_paths(model):
            if parameter.name in tensors.get(part, {}):
                parameter.variable.assign(from_torch(parameter, tensors[part][parameter.name]))


_TITLES = {LowRank: "LoRA", Kronecker: "LoKr", Hadamard: "LoHa", Decomposed: "DoRA"}


# What makes a run train an update of a kind; there is nothing for the others.
_REMEDIES = {
    LowRank: "train plain LoRA",
    Kronecker: "give `adapter='lokr'`",
    Decomposed: "give `use_dora=True`",
}


def _remedies_for_numbers(lora):
    """Return what to give where a rank or an alpha differs, by its name.

    One that is the same in the whole file is left out, as the message names it.
    """
    products = [
        update.update if isinstance(update, Decomposed) else update
        for layers in lora.values()
        for update in layers.values()
    ]
    ranks = {
        len(update.down) if isinstance(update, LowRank) else update.rank
        for update in products
        if not isinstance(update, Hadamard)
    } - {None}
    alphas = {update.alpha for update in products}
    remedies = {}
    for what, found, options in (
        ("rank", ranks, "`rank`, `conv_rank` and `rank_by_block`"),
        ("alpha", alphas, "`lora_alpha`, `conv_alpha` and `alpha_by_block`"),
    ):
        if len(found) > 1:
            listed = ", ".join(f"{number:g}" for number in sorted(found))
            remedies[what] = f"the file has {what}s {listed}: give {options} as it was trained with"
    return remedies


def _tensors_like(own, update, layer, name, remedies):
    """Return the tensors of an update by published name; raise UserError unless it is like the run's.

    Args:
        remedies: for another rank or alpha, as `_remedies_for_numbers` returns them.
    """
    if type(own) is not type(update):
        theirs = type(update)
        raise UserError(
            f"{name} is {_TITLES[theirs]}, and {_TITLES[type(own)]} is trained; "
            f"{_REMEDIES[theirs] + ', or ' if theirs in _REMEDIES else ''}use another LoRA"
        )
    tensors = {}
    if isinstance(own, Decomposed):
        if update.by_input:
            raise UserError(f"{name} has magnitudes of columns, which are not trained; use another LoRA")
        tensors[f"{layer}.lora_magnitude_vector"] = update.magnitude
        own, update = own.update, update.update
    if isinstance(own, LowRank):
        _check_rank(name, len(update.down), len(own.down), remedies)
        factors = {
            "lora_A.weight": update.down,
            "lora_B.weight": _rescaled(name, update, own, len(own.down), remedies),
        }
    else:
        is_like = len(update.w1) == 1 and [a.shape for a in update.w1] == [a.shape for a in own.w1]
        if not is_like or len(update.w2) != len(own.w2):
            raise UserError(
                f"{name} has matrices of other sizes than are trained; "
                "use the rank and `lokr_factor` of the file"
            )
        _check_rank(name, update.rank, own.rank, remedies)
        factors = {"lokr_w1": update.w1[0]}
        if own.rank is None:
            factors["lokr_w2.weight"] = update.w2[0]
        else:
            factors["lokr_w2_a.weight"] = _rescaled(name, update, own, own.rank, remedies)
            factors["lokr_w2_b.weight"] = update.w2[1]
    return tensors | {f"{layer}.{role}": np.asarray(array, "float32") for role, array in factors.items()}


def _check_rank(name, theirs, own, remedies):
    if theirs != own:
        remedy = remedies.get("rank", f"give `rank={theirs}`")
        raise UserError(f"{name} has rank {theirs}, and {own} is trained; {remedy}")


def _rescaled(name, update, own, rank, remedies):
    """Return the outer factor of an update with the scale of the run's in place of its own."""
    outer = update.up if isinstance(update, LowRank) else update.w2[0]
    if update.alpha == rank:
        return np.asarray(outer, "float32") * np.float32(rank / own.alpha)
    if not math.isclose(update.alpha, own.alpha, rel_tol=1e-6):
        remedy = remedies.get("alpha", f"give `lora_alpha={update.alpha:g}`")
        raise UserError(f"{name} has alpha {update.alpha:g}, and {own.alpha:g} is trained; {remedy}")
    return outer


def save_lora(folder: Path, models: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write the updates of models in both dialects: PEFT's, which diffusers loads, and kohya's.

    Args:
        folder: created if necessary; the files are `pytorch_lora_weights.safetensors`, except of LoKr, which
            PEFT's dialect lacks, and `lora_kohya.safetensors`.
        models: dictionary of part ("unet", "text_encoder") -> the model.
        metadata: texts for the headers of both.
    """
    lora = {part: trained_updates(model) for part, model in models.items()}
    folder.mkdir(parents=True, exist_ok=True)
    is_lokr = any(isinstance(update, Kronecker) for layers in lora.values() for update in layers.values())
    if not is_lokr:
        write_lora(folder / PEFT_FILE, lora, "peft", metadata=metadata)
    write_lora(folder / KOHYA_FILE, lora, "kohya", metadata=metadata)
