"""Arithmetic with LoRA files, without a model: sums, other ranks, and the LoRA between two checkpoints.

Layers are called as in kohya's files, and results are in that dialect, which all programs read.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_sd.errors import UserError
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
from keras_sd.weights.lora_strength import read_strengths
from keras_sd.weights.lora_updates import LowRank, update_of
from keras_sd.weights.safetensors_files import read_metadata

_OLD_BLOCKS = tuple(f"lora_unet_{name}_" for name in ("input_blocks", "middle_block", "output_blocks"))
# Layers that every program looks for in a LoRA.
_STARTS = {"unet": ("down_blocks.", "mid_block.", "up_blocks."), "text_encoder": ("text_model.encoder.",)}
_NO_LIMIT = (2**62,) * 4
_PLAIN = {"down", "up", "mid"}
_OWN = ("ss_network_dim", "ss_network_alpha", "sshs_", "format", "lora_adapter_metadata")


class LoraFile(NamedTuple):
    """The updates of a file, and the texts in its header.

    Attributes:
        updates: kohya's name of a layer -> `LowRank`, or what `read_products` returns.
        metadata: dictionary of texts.
    """

    updates: dict[str, LowRank]
    metadata: dict[str, str]


def read_plain_lora(path: Any) -> LoraFile:
    """Read a file that holds LoRA or LoCon only.

    Raises:
        UserError: the file is damaged, or has updates of another kind; the message names it.
    """
    return _read(path, _PLAIN)


def read_products(path: Any) -> LoraFile:
    """Read a file of any kind without the magnitudes of DoRA: values are `LowRank`, `Kronecker`, `Hadamard`.

    Raises:
        UserError: the file is damaged.
    """
    return _read(path)


def _read(path, roles=None):
    """Read a file whose layers have tensors of these roles only; None for all."""
    path = lora_file(path)
    tensors = read_tensors(path)
    found = by_layer(tensors, lambda name: _layer_of(name, path), path)
    strengths = read_strengths(path, PARTS)
    updates = {}
    for (part, layer), halves in found.items():
        name = KOHYA_PREFIXES[part] + layer.replace(".", "_")
        own = {role: array for role, array in halves.items() if role != "alpha"}
        other = sorted(own.keys() - roles) if roles else ()
        if other:
            raise UserError(
                f"{path}: {name} has {other[0]}, and only LoRA and LoCon can be computed with; "
                "merge the file into a model instead"
            )

        def alpha_of(rank, name=name, halves=halves, part=part, layer=layer):
            if "alpha" in halves:
                return single_alpha(name, halves["alpha"], path)
            return strengths[part].alpha(layer, rank) if part in strengths else float(rank)

        updates[name] = update_of(own, _NO_LIMIT, name, path, alpha_of)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    return LoraFile(updates, metadata)


def _layer_of(name, path):
    """Return the part of a layer's name in a file, and the layer, with dots if the file has them."""
    for part, prefix in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    plain = without_processor(name).removeprefix(PEFT_PREFIX)
    for part in PARTS:
        if plain.startswith(f"{part}."):
            return part, _published(part, plain.removeprefix(f"{part}."))
    for part, starts in _STARTS.items():
        if _published(part, plain).startswith(starts):
            return part, _published(part, plain)
    raise UserError(f"{path}: {name} is no layer of Stable Diffusion; give a LoRA for it")


def _published(part, layer):
    """Return a layer's name with what transformers 5 has left out before those of CLIP."""
    is_short = part == "text_encoder" and layer.startswith("encoder.")
    return f"text_model.{layer}" if is_short else layer


def summed(files: Iterable[tuple[LoraFile, float]]) -> dict[str, LowRank]:
    """Return the sum of several LoRAs, each with its weight: factors side by side, so nothing is lost.

    The rank of each update is the sum of theirs, and its scale is 1.

    Raises:
        UserError: a layer has other sizes in another file, or only some have latent-diffusion's names.
    """
    terms: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for file, weight in files:
        for name, update in file.updates.items():
            down, up = (np.asarray(factor, "float32") for factor in (update.down, update.up))
            scale = weight * update.alpha / len(down)
            terms.setdefault(name, []).append((down, up * np.float32(scale)))
    has_old = [name.startswith(_OLD_BLOCKS) for name in terms if name.startswith("lora_unet_")]
    if any(has_old) and not all(has_old):
        raise UserError(
            "LoRAs: some have latent-diffusion's names of layers; merge them into a model instead"
        )
    return {name: _side_by_side(name, pairs) for name, pairs in terms.items()}


def _side_by_side(name, pairs):
    sizes = {(down.shape[1], len(up), down.size // len(down)) for down, up in pairs}
    if len(sizes) > 1:
        raise UserError(f"{name}: has another size in another file; merge LoRAs of one base model")
    # A 1x1 convolution and a linear layer hold the same numbers.
    window = pairs[0][0].shape[1:]
    down = np.concatenate([down.reshape(len(down), *window) for down, _ in pairs])
    up = np.concatenate([up.reshape(len(up), -1) for _, up in pairs], axis=1)
    return LowRank(down, up.reshape(*up.shape, *(1,) * (down.ndim - 2)), float(len(down)))


class Truncation(NamedTuple):
    """How many singular values are kept: those that all of these allow, and at least one.

    Attributes:
        rank: at most so many; None for no limit.
        sv_ratio: those that are not smaller than the largest divided by it; None for no limit.
    """

    rank: int | None = None
    sv_ratio: float | None = None

    def count(self, singular_values: np.ndarray) -> int:
        """Return how many of the values, which fall, are kept."""
        kept = len(singular_values)
        if self.sv_ratio is not None:
            kept = int((singular_values >= singular_values[0] / self.sv_ratio).sum())
        return max(1, min(kept, self.rank or kept))


def reduced(update: LowRank, truncation: Truncation) -> LowRank:
    """Return the closest update of a lower rank (Eckart and Young, 1936); its scale is 1."""
    rank, window = len(update.down), update.down.shape[1:]
    down = np.asarray(update.down, "float64").reshape(rank, -1)
    up = np.asarray(update.up, "float64").reshape(-1, rank) * (update.alpha / rank)
    # Singular values of a product of tall factors are those of the product of their triangles.
    left, left_triangle = np.linalg.qr(up)
    right, right_triangle = np.linalg.qr(down.T)
    inner_left, values, inner_right = np.linalg.svd(left_triangle @ right_triangle.T)
    return _low_rank(left @ inner_left, values, inner_right @ right.T, window, truncation)


def extracted(difference: np.ndarray, truncation: Truncation) -> LowRank | None:
    """Return the closest update to the difference of two weights in torch layout; None if there is none."""
    if not difference.any():
        return None
    matrix = np.asarray(difference, "float32").reshape(len(difference), -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return _low_rank(left, values, right, difference.shape[1:], truncation)


def _low_rank(left, values, right, window, truncation):
    count = truncation.count(values)
    # Both factors get the same magnitude, so that float16 holds them.
    root = np.sqrt(values[:count])
    up = (left[:, :count] * root).astype("float32")
    down = (root[:, None] * right[:count]).astype("float32")
    return LowRank(
        down.reshape(count, *window), up.reshape(*up.shape, *(1,) * (len(window) - 1)), float(count)
    )


def relative_error(update: LowRank, other: LowRank) -> tuple[float, float]:
    """Return the squared length of the difference of two updates, and of the second one.

    They are computed from the factors, so that no whole matrix is made.
    """
    factors = []
    for sign, one in ((1.0, update), (-1.0, other)):
        rank = len(one.down)
        up = np.asarray(one.up, "float64").reshape(-1, rank) * (sign * one.alpha / rank)
        factors.append((up, np.asarray(one.down, "float64").reshape(rank, -1)))
    difference = np.hstack([up for up, _ in factors]), np.vstack([down for _, down in factors])
    return max(_squared(*difference), 0.0), _squared(*factors[1])


def _squared(up, down):
    return float(((up.T @ up) * (down @ down.T)).sum())


def extract_lora(
    base: Mapping[str, Mapping[str, np.ndarray]],
    tuned: Mapping[str, Mapping[str, np.ndarray]],
    truncation: Truncation,
    convolutions: Truncation,
    progress: Callable[[list], Iterable] = iter,
) -> tuple[dict[str, LowRank], list[str]]:
    """Return the LoRA that makes one checkpoint from another, and the names of changes that it cannot hold.

    Args:
        base, tuned: part -> name -> tensor in torch layout, under diffusers' names.
        truncation: of linear layers and 1x1 convolutions.
        convolutions: of convolutions with a window.
        progress: wraps the list of layers, to show how far it is.

    Raises:
        UserError: a tensor is missing in one of them, has another shape or holds NaN or infinity.
    """
    layers, updates, left_out = [], {}, []
    for part in PARTS:
        if (part in base) != (part in tuned):
            raise UserError(f"{part}: is in one of the models only; give two whole models")
        before, after = base.get(part, {}), tuned.get(part, {})
        for name in sorted(before.keys() | after.keys()):
            if name not in before or name not in after or before[name].shape != after[name].shape:
                raise UserError(f"{part}.{name}: is not in both models alike; give two of the same kind")
            layers.append((part, name))
    for part, name in progress(layers):
        before, after = (np.asarray(model[part][name], "float32") for model in (base, tuned))
        difference = after - before
        if not np.isfinite(difference).all():
            raise UserError(f"{part}.{name}: holds NaN or infinity; use undamaged files")
        layer = _published(part, name.removesuffix(".weight"))
        if not name.endswith(".weight") or difference.ndim == 1 or not layer.startswith(_STARTS[part]):
            left_out += [f"{part}.{name}"] if difference.any() else []
            continue
        has_window = difference.ndim == 4 and difference.shape[2:] != (1, 1)
        update = extracted(difference, convolutions if has_window else truncation)
        if update is not None:
            updates[KOHYA_PREFIXES[part] + layer.replace(".", "_")] = update
    return updates, left_out


def common_metadata(files: Iterable[LoraFile], updates: Mapping[str, LowRank]) -> dict[str, str]:
    """Return the header of a result: what all sources say alike, and the rank."""
    first, *others = [file.metadata for file in files]
    kept = {
        key: text
        for key, text in first.items()
        if not key.startswith(_OWN) and all(other.get(key) == text for other in others)
    }
    ranks = {len(update.down) for update in updates.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # which is kohya's word
    return {**kept, "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
