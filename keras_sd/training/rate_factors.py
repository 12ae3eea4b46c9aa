"""Learning rates of parts of a model: of the text encoder, and of the UNet's blocks.

A rate is a factor of the common learning rate, so the schedule holds for all. A factor of 0 freezes a block.
"""

import math
import re
from typing import Any

from keras_sd.errors import UserError

TEXT_ENCODER = "learning_rate_text_encoder"
"""Name of the text encoder's learning rate in the log."""

_ENTRY = re.compile(r"([a-z_]+(?:\.\w+)*)=(\S+)")
_LARGEST = 1e6


def parse_block_factors(text: str) -> dict[str, float]:
    """Return block name -> factor of a text such as "down_blocks=0.5 mid_block=1 up_blocks.2=0".

    Args:
        text: entries NAME=FACTOR, with spaces or commas between them. A name is that of a block in the
            public checkpoint's names, such as "down_blocks", "up_blocks.2" or "down_blocks.1.attentions".

    Raises:
        UserError: an entry has another form, its factor is out of range, or a block is named twice.
    """
    factors: dict[str, float] = {}
    for entry in text.replace(",", " ").split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(
                f"learning_rate_by_block: {entry!r} is no NAME=FACTOR; write for example up_blocks.2=0.5"
            )
        try:
            factor = float(match[2])
        except ValueError:
            factor = math.nan
        if not 0 <= factor <= _LARGEST:
            raise UserError(
                f"learning_rate_by_block: {entry!r}: the factor is out of range; give 0 or more, up to "
                f"{_LARGEST:g}"
            )
        if match[1] in factors:
            raise UserError(f"learning_rate_by_block: {match[1]} is named twice; give it one factor")
        factors[match[1]] = factor
    if not factors:
        raise UserError("learning_rate_by_block: empty; write for example up_blocks.2=0.5, or leave it out")
    return factors


def _factor(name: str, factors: dict[str, float]) -> float:
    """Return the factor of a variable by the longest of the names that it begins with; 1 without one."""
    fitting = [block for block in factors if f"{name}.".startswith(f"{block}.")]
    return factors[max(fitting, key=len)] if fitting else 1.0


def check_blocks(unet: Any, text: str) -> None:
    """Check that every block named is one of the UNet, and trained.

    Args:
        unet: the `UNet`, with what is trained.
        text: as `parse_block_factors` takes it.

    Raises:
        UserError: a name matches no trained weights.
    """
    from keras_sd.models.parameters import parameter_paths

    names = [one.name for one in parameter_paths(unet) if one.variable.trainable]
    for block in parse_block_factors(text):
        if not any(f"{name}.".startswith(f"{block}.") for name in names):
            blocks = dict.fromkeys(re.match(r"\w+(\.\d+)?", name)[0] for name in names)  # type: ignore[index]
            raise UserError(
                f"learning_rate_by_block: {block} matches no trained weights of the UNet; there are "
                f"{', '.join(blocks)}"
            )


class RateFactors:
    """The factors of the learning rates of an objective's trained variables.

    Making it freezes the blocks whose factor is 0.

    Args:
        objective: a model with a `unet`, perhaps with a trained `text_encoder`.
        settings: `Settings`.

    Attributes:
        factors: variable's id -> factor, of all variables that are trained; None if all factors are 1.
        figures: name in the log -> factor.

    Raises:
        UserError: a setting has no effect on this objective.
    """

    def __init__(self, objective: Any, settings: Any) -> None:
        from keras_sd.models.parameters import parameter_paths
        from keras_sd.training.alignment import PROJECTION

        self.factors: dict[int, float] | None = None
        self.figures: dict[str, float] = {}
        text, own_rate = settings.learning_rate_by_block, settings.text_encoder_lr
        if text is None and own_rate is None:
            return
        unet = getattr(objective, "unet", None)
        trained = [one for one in parameter_paths(objective) if one.variable.trainable]
        factors = {id(one.variable): 1.0 for one in trained}
        if text is not None:
            if unet is None:
                raise UserError("learning_rate_by_block: has no effect without a UNet; leave it out")
            check_blocks(unet, text)
            by_block = parse_block_factors(text)
            for one in trained:
                if one.name.startswith("unet."):
                    factors[id(one.variable)] = _factor(one.name.removeprefix("unet."), by_block)
            for one in trained:
                if not factors[id(one.variable)]:
                    one.variable.trainable = False
            if not any(one.variable.trainable for one in trained if not one.name.startswith(PROJECTION)):
                raise UserError("learning_rate_by_block: freezes all that is trained; leave a factor above 0")
        if own_rate is not None:
            of_text = [one for one in trained if one.name.startswith("text_encoder.")]
            if not of_text:
                raise UserError("text_encoder_lr: has no effect on a frozen text encoder; leave it out")
            factor = own_rate / settings.learning_rate
            factors |= {id(one.variable): factor for one in of_text}
            self.figures = {TEXT_ENCODER: factor}
        self.factors = factors
