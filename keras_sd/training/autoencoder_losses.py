"""The weights of an autoencoder's losses, which commands check before Keras is loaded."""

import dataclasses
from typing import Any

from keras_sd.arguments import real_number, whole_number
from keras_sd.errors import UserError

_WIDEST, _DEEPEST = 1024, 8  # of a discriminator, whose outputs then see more than 2000 pixels


@dataclasses.dataclass(frozen=True)
class AutoencoderLosses:
    """The weights of an autoencoder's losses.

    Attributes:
        kl_weight: of the divergence from the standard normal, in nats per latent number.
        perceptual_weight: of the perceptual distance; 0 leaves it out.
        adversarial_weight: of the discriminator's verdict, times the adaptive weight; 0 leaves it out.
        adversarial_start: the number of steps before its verdict counts. The discriminator learns from the
            first step, so that it has learned something by then.
        discriminator_width, discriminator_depth: as in `models.discriminator`.

    Raises:
        UserError: a value is out of range.
    """

    kl_weight: float = 3e-4
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    discriminator_width: int = 64
    discriminator_depth: int = 3

    def __post_init__(self) -> None:
        for name in ("kl_weight", "perceptual_weight", "adversarial_weight"):
            real_number(name, getattr(self, name), lambda value: value >= 0, "0 or more")
        whole_number("adversarial_start", self.adversarial_start, 0)
        if whole_number("discriminator_width", self.discriminator_width, 8, _WIDEST) % 8:
            raise UserError(f"discriminator_width {self.discriminator_width}: not a multiple of 8; change it")
        whole_number("discriminator_depth", self.discriminator_depth, 1, _DEEPEST)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the one that resumes it."""
        return dataclasses.asdict(self)
