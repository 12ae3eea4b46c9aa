"""How the caption of a training example is drawn from its captions: which one, and which of its tags."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sd.arguments import whole_number
from keras_sd.errors import UserError


@dataclasses.dataclass(frozen=True)
class Captions:
    """How captions are drawn.

    A caption is a list of tags, as in kohya's scripts: `1girl, red hair, smile`. The first `keep_tokens` tags
    stay in their place; the others may be shuffled and left out. Captions that are not fixed differ at each
    draw, so they are encoded during training.

    Attributes:
        shuffle_caption: put the tags in a new order at each draw.
        keep_tokens: number of first tags that are neither moved nor left out.
        caption_separator: what stands between tags.
        caption_tag_dropout_rate: share of the tags that is left out at each draw, 0 to 1.

    Raises:
        UserError: a value is out of range.
    """

    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_separator: str = ","
    caption_tag_dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        whole_number("keep_tokens", self.keep_tokens, 0)
        if not self.caption_separator.strip():
            raise UserError("caption_separator: empty; give what stands between tags, such as a comma")
        if not 0 <= self.caption_tag_dropout_rate <= 1:
            raise UserError(
                f"caption_tag_dropout_rate {self.caption_tag_dropout_rate}: out of range; give 0 to 1"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether each caption is always taken as it is, so that it can be encoded once."""
        return not (self.shuffle_caption or self.caption_tag_dropout_rate)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the run that resumes it; none if fixed."""
        return {} if self.is_fixed else dataclasses.asdict(self)

    def draw(self, captions: Sequence[str], generator: np.random.Generator) -> str:
        """Draw a caption of an example, and the tags of this caption.

        Half of the draws take the first caption, the canonical one; the others take any caption.

        Args:
            captions: the captions of the example; an example without captions has the empty one.
            generator: all randomness is taken from it.
        """
        if not captions:
            return ""
        choice = int(generator.integers(len(captions))) if generator.random() < 0.5 else 0
        return captions[choice] if self.is_fixed else self.draw_tags(captions[choice], generator)

    def draw_tags(self, caption: str, generator: np.random.Generator) -> str:
        """Return a caption with its tags shuffled and left out."""
        separator = self.caption_separator.strip()
        tags = [tag.strip() for tag in caption.split(separator)]
        tags = [tag for tag in tags if tag]
        kept, others = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.shuffle_caption:
            others = [others[index] for index in generator.permutation(len(others))]
        if self.caption_tag_dropout_rate:
            stays = generator.random(len(others)) >= self.caption_tag_dropout_rate
            others = [tag for tag, is_kept in zip(others, stays, strict=True) if is_kept]
        return f"{separator} ".join([*kept, *others])
