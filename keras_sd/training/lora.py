"""Training of LoRA (Hu et al., 2022): adds low-rank updates to the layers of a model and saves them."""

import contextlib
from pathlib import Path
from typing import Any

from keras_sd.errors import UserError
from keras_sd.models.layers import LowRankUpdate
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.weights.lora import PEFT_FILE, write_lora
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.rules import torch_state

# Suffixes of layer names. LoRA was published for attention, and is mostly used there.
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# All linear layers of a transformer and all convolutions of a residual block.
UNET_ALL = (
    *(*UNET_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)
TEXT_ALL = (*TEXT_ATTENTION, "fc1", "fc2")


def add_lora(model: UNet | TextEncoder, rank: int, alpha: float, *, everywhere: bool = False) -> None:
    """Add low-rank updates to layers of a UNet or a text encoder, and freeze all other weights.

    The updates are zero at first. Call this before anything is compiled with the model.

    Args:
        model: a `UNet` or a `TextEncoder`.
        rank: the rank of every update.
        alpha: every update is scaled by alpha / rank.
        everywhere: add updates to all linear layers and the convolutions of residual blocks; False adds them
            to the projections of attention only.

    Raises:
        UserError: the rank or alpha is not positive, or the model has no such layer.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: too small; give at least 1")
    if not 0 < alpha < float("inf"):
        raise UserError(f"alpha {alpha}: out of range; give more than 0")
    if isinstance(model, TextEncoder):
        targets = TEXT_ALL if everywhere else TEXT_ATTENTION
    else:
        targets = UNET_ALL if everywhere else UNET_ATTENTION
    layers = {
        parameter.name.removesuffix(".weight"): parameter.layer
        for parameter in parameter_paths(model)
        if parameter.variable.name == "kernel" and isinstance(parameter.layer, LowRankUpdate)
    }
    endings = tuple(f".{target}" for target in targets)
    adapted = [layer for name, layer in layers.items() if f".{name}".endswith(endings)]
    if not adapted:
        raise UserError("LoRA: the model has no attention to put it on; train all layers or the full model")
    freeze(model)
    for layer in adapted:
        layer.add_low_rank(rank, alpha)


@contextlib.contextmanager
def without_updates(model):
    """Disable the low-rank updates of a model inside the block."""
    layers = {
        parameter.layer for parameter in parameter_paths(model) if isinstance(parameter.layer, LowRankUpdate)
    }
    updates = {layer: layer.lora_A for layer in layers}
    for layer in layers:
        layer.lora_A = None
    try:
        yield
    finally:
        for layer, update in updates.items():
            layer.lora_A = update


def freeze(model):
    """Freeze all weights that a model has now."""
    # Variable by variable: a layer that is not trainable would hide weights that are added later.
    for variable in model.weights:
        variable.trainable = False


def lora_tensors(model):
    """Return the updates' tensors under PEFT's names, in torch layout, as a dictionary of NumPy arrays."""
    return {name: tensor for name, tensor in torch_state(model).items() if ".lora_" in name}


def save_lora(folder: Path, models: dict[str, Any], alpha: float) -> None:
    """Write the updates of models in both dialects: PEFT's, which diffusers loads, and kohya's.

    Args:
        folder: created if necessary; the files are `pytorch_lora_weights.safetensors` and
            `lora_kohya.safetensors`.
        models: dictionary of part ("unet", "text_encoder") -> the model.
        alpha: the value given to `add_lora`.
    """
    lora = {part: _layers(lora_tensors(model), alpha) for part, model in models.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_lora(folder / PEFT_FILE, lora, "peft")
    write_lora(folder / "lora_kohya.safetensors", lora, "kohya")


def _layers(tensors, alpha):
    ends = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    names = [name.removesuffix(ends["down"]) for name in tensors if name.endswith(ends["down"])]
    return {name: LowRank(tensors[name + ends["down"]], tensors[name + ends["up"]], alpha) for name in names}
