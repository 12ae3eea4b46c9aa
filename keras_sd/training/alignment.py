"""Alignment of a UNet's features with those of a frozen image encoder, so that it learns in fewer steps.

Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You
Think", 2024 (REPA). Of a UNet the bottleneck is aligned: skip connections carry details around it, so it is
where a UNet has to say what an image shows.
"""

import dataclasses
from typing import Any

from keras import ops

from keras_sd.arguments import Tensor, real_number, shown
from keras_sd.errors import UserError
from keras_sd.metrics.features import resize
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.layers import Layer, dense
from keras_sd.models.pixels import images_to_unit
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.weights.rules import weights_fingerprint

PROJECTION = "alignment_projection"
"""Name of the trained layers that belong to the alignment alone; they are no part of the written model."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What a UNet is aligned with, and how strongly.

    Attributes:
        image_encoder: the frozen encoder of the clean images.
        unet: the network that is trained.
        downsampling: pixels of an image, along a side, for each latent.
        weight: weight of the alignment beside the denoising loss (lambda in the paper's equation 9); 0.5 in
            the paper.

    Raises:
        UserError: the image encoder is none, or the weight is not above 0.
    """

    image_encoder: ImageEncoder
    unet: UNet
    downsampling: int
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.image_encoder, ImageEncoder):
            raise UserError(f"image_encoder {shown(self.image_encoder)}: not an ImageEncoder; give one")
        above_zero = "a number above 0, such as 0.5"
        real_number("alignment_weight", self.weight, lambda weight: weight > 0, above_zero)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return rows, columns and features of the target of an image of that size in pixels."""
        latents = height // self.downsampling, width // self.downsampling
        rows, columns, _ = self.unet.bottleneck_shape(*latents)
        return rows, columns, self.image_encoder.config.hidden_size

    def targets(self, images: Tensor) -> Tensor:
        """Return the encoder's features of the patches, float32 `(n, rows, columns, features)`.

        An image takes the encoder's square whatever its sides are, and the grid of the patches then takes the
        bottleneck's sides, so that both cover the same places.

        Args:
            images: uint8 `(n, height, width, 3)`.
        """
        rows, columns, _ = self.shape(*images.shape[1:3])
        squares = resize(images_to_unit(images), self.image_encoder.config.image_size)
        return resize(self.image_encoder.patch_features(squares), (rows, columns))

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the one that resumes it."""
        return {
            "alignment_weight": self.weight,
            "image_encoder": weights_fingerprint(self.image_encoder),
        }


class Projection(Layer):
    """Three linear layers with SiLU between them, for each position of `(n, rows, columns, features)`.

    They are twice as wide as the UNet's features, about as in the paper (2048 for 1152).
    """

    def __init__(self, features: int, target_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = 2 * features
        self.layers = [dense(features, width), dense(width, width), dense(width, target_features)]

    def call(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = ops.silu(layer(hidden))
        return self.layers[-1](hidden)


class AlignedObjective(DiffusionObjective):
    """The denoising loss, less the similarity of the UNet's bottleneck and an image encoder's features.

    The similarity is the cosine between the projected features of each position and those of the encoder,
    averaged over the positions (Yu et al., 2024, equation 8). A batch of `DiffusionObjective` also holds
    `alignment_target (n, rows, columns, features)`, as `Alignment.targets` makes it; a call then returns
    `loss (n,)`, the denoising loss, and `alignment (n,)`, the similarity. Without targets, as the validation
    loss is measured, it returns the denoising loss alone. A mask weights the positions as it weights errors.

    Args:
        arguments, options: of `DiffusionObjective`; the first is the UNet.
        alignment: `Alignment` of the same UNet.
    """

    def __init__(self, *arguments: Any, alignment: Alignment, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alignment_weight = alignment.weight
        self.alignment_projection = Projection(
            self.unet.config.block_out_channels[-1], alignment.image_encoder.config.hidden_size
        )

    def call(self, batch: dict[str, Any]) -> Any:
        if "alignment_target" not in batch:
            return super().call(batch)
        noisy, target, weight = self._noised(batch)
        predicted, bottleneck = self._predict(noisy, batch, returns_bottleneck=True)
        losses = self._denoising_losses(predicted, target, weight, batch)
        return {"loss": losses, "alignment": self._similarities(bottleneck, batch)}

    def _similarities(self, bottleneck, batch):
        projected = ops.cast(self.alignment_projection(bottleneck), "float32")
        target = ops.cast(batch["alignment_target"], "float32")
        cosines = ops.sum(
            ops.normalize(projected, axis=-1) * ops.normalize(target, axis=-1), axis=-1, keepdims=True
        )
        if "mask" in batch:
            cosines = resize(batch["mask"], tuple(cosines.shape[1:3])) * cosines
        return ops.mean(cosines, axis=(1, 2, 3))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        # Both are logged apart, so that the loss is that of a run without alignment.
        return ops.mean(y_pred["loss"]) - self.alignment_weight * ops.mean(y_pred["alignment"])
