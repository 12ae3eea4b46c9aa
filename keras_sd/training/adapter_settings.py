"""The settings of updates that are trained in place of a model's weights, checked without a backend."""

import dataclasses
import math
from typing import Any

from keras_sd.errors import UserError

ADAPTERS = {"lora": "LoRA", "lokr": "LoKr"}
"""The kinds of update, and their titles. DoRA is a LoRA with `use_dora`, LoCon one with `conv_rank`."""

LAYERS = ("attention", "all")

# Suffixes of layer names. LoRA was published for attention, and is mostly used there.
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# All linear layers of a transformer and all convolutions of a residual block.
UNET_ALL = (
    *(*UNET_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)
TEXT_ALL = (*TEXT_ATTENTION, "fc1", "fc2")
# Convolutions with a window, which LoCon updates.
UNET_CONVOLUTIONS = ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv")

_LARGEST_RANK = 2**20


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The layers that get updates, and the kind, the rank and the scale of each.

    An update is scaled by alpha / rank, and with `use_rslora` by alpha / sqrt(rank) (Kalajdzievski, 2023).

    Args:
        rank: the rank of the updates.
        alpha: None for the rank.
        layers: "attention" for its projections; "all" for all linear layers and the residual blocks'
            convolutions.
        conv_rank: the rank of convolutions with a window (LoCon): those of residual blocks and of down- and
            upsampling. None gives those of residual blocks `rank` with "all", and others no update.
        conv_alpha: alpha of these; None for their rank.
        adapter: "lora", or "lokr" (Yeh et al., 2024), whose second matrix has the rank. It is whole where the
            rank is at least half of its larger side.
        lokr_factor: the smaller factor of a layer's inputs and of its outputs, which must divide both; None
            for the largest divisor up to the square root of each.
        use_dora: train the lengths of the weight's rows, too (Liu et al., 2024).
        use_rslora: scale by alpha / sqrt(rank).
        rank_by_block: block -> rank of the updates in it; 0 for none. A block is the beginning of layers'
            names, such as "mid_block", "down_blocks.1.attentions" or "text_encoder". The longest one counts.
        alpha_by_block: block -> alpha.

    Raises:
        UserError: a value is out of range, or has no effect beside the others.
    """

    rank: int = 8
    alpha: float | None = None
    layers: str = "attention"
    conv_rank: int | None = None
    conv_alpha: float | None = None
    adapter: str = "lora"
    lokr_factor: int | None = None
    use_dora: bool = False
    use_rslora: bool = False
    rank_by_block: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_by_block: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST_RANK:
                raise UserError(f"{name} {value}: out of range; give 1 or more")
        for name, value in (("alpha", self.alpha), ("conv_alpha", self.conv_alpha)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} {value}: out of range; give more than 0")
        for name, values in (("layers", LAYERS), ("adapter", tuple(ADAPTERS))):
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r}: unknown; use {' or '.join(values)}")
        self._check_blocks()
        if self.conv_alpha is not None and self.conv_rank is None:
            raise UserError("conv_alpha: has no effect without `conv_rank`; give both, or leave it out")
        if self.lokr_factor is not None and self.adapter != "lokr":
            raise UserError("lokr_factor: has no effect without `adapter='lokr'`; give both, or leave it out")
        if self.lokr_factor is not None and self.lokr_factor < 1:
            raise UserError(f"lokr_factor {self.lokr_factor}: out of range; give 1 or more")
        if self.use_dora and self.adapter == "lokr":
            raise UserError("use_dora: is not trained with `adapter='lokr'`; leave one of them out")

    def _check_blocks(self) -> None:
        for block, rank in self.rank_by_block.items():
            if not 0 <= rank <= _LARGEST_RANK:
                raise UserError(f"rank_by_block {block}={rank}: out of range; give 0 for no update, or more")
        for block, alpha in self.alpha_by_block.items():
            if not 0 < alpha < float("inf"):
                raise UserError(f"alpha_by_block {block}={alpha}: out of range; give more than 0")

    def rank_and_alpha(self, part: str, layer: str) -> tuple[int, float] | None:
        """Return the rank and alpha of a layer's update, or None if it gets none.

        Args:
            part: "unet" or "text_encoder".
            layer: the layer's published name.
        """
        is_text = part == "text_encoder"
        if self.layers == "all":
            targets = TEXT_ALL if is_text else UNET_ALL
        else:
            targets = TEXT_ATTENTION if is_text else UNET_ATTENTION
        has_window = not is_text and _ends(layer, UNET_CONVOLUTIONS)
        rank, alpha = self.rank, self.alpha
        if has_window and self.conv_rank is not None:
            rank, alpha = self.conv_rank, self.conv_alpha
        elif not _ends(layer, targets):
            return None
        block, own = (
            longest_block(self.rank_by_block, part, layer),
            longest_block(self.alpha_by_block, part, layer),
        )
        rank = rank if block is None else self.rank_by_block[block]
        alpha = alpha if own is None else self.alpha_by_block[own]
        return (rank, float(rank if alpha is None else alpha)) if rank else None

    def scale(self, rank: int, alpha: float) -> float:
        """Return what an update of this rank and alpha is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the one that resumes it.

        Those that older checkpoints lack are only there if they are not defaults.
        """
        alpha = self.rank if self.alpha is None and not self.rank_by_block else self.alpha
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("rank", "alpha", "layers")
            and getattr(self, field.name) not in (field.default, {})
        }
        return {"rank": self.rank, "lora_alpha": alpha, "lora_layers": self.layers, **values}


def longest_block(blocks: dict[str, Any], part: str, layer: str) -> str | None:
    """Return the longest of the blocks that a layer of a part is in, or None."""
    names = (f"{layer}.", f"{part}.{layer}.", f"{part}.{layer.removeprefix('text_model.')}.")
    inside = [block for block in blocks if any(name.startswith(f"{block}.") for name in names)]
    return max(inside, key=len, default=None)


def _ends(layer, targets):
    return f".{layer}".endswith(tuple(f".{target}" for target in targets))


def kronecker_factors(size: int, factor: int | None) -> tuple[int, int]:
    """Return the factors of a layer's width, the smaller one first.

    Args:
        factor: one of them, a divisor of the width; None for the largest one up to the square root.
    """
    if factor is None:
        factor = max(divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0)
    return min(factor, size // factor), max(factor, size // factor)
