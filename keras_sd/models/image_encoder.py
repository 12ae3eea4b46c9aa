"""CLIP's image tower: a vision transformer.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021;
Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020. The attribute tree is that of transformers'
``CLIPVisionModelWithProjection``, its spelling ``pre_layrnorm`` included.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.config import ImageEncoderConfig
from keras_sd.errors import UserError
from keras_sd.models.clip_transformer import Transformer
from keras_sd.models.initializers import normal, uniform
from keras_sd.models.layers import Layer, LayerNormalization, dense, embedding
from keras_sd.models.precision import ConfiguredModel

# Mean and standard deviation of the RGB values in [0, 1] over CLIP's training images, published with it.
PIXEL_MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
PIXEL_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711))


class PatchEmbedding(Layer):
    """A convolution without bias whose stride is its kernel size: one vector for each patch.

    It is computed as a matrix multiplication, since XLA's CPU backend has no fast path for the weight
    gradient of a strided convolution. The kernel keeps the convolution's shape.
    """

    def __init__(self, patch_size, channels, width, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.kernel = self.add_weight(
            name="kernel",
            shape=(patch_size, patch_size, channels, width),
            initializer=uniform((patch_size * patch_size * channels) ** -0.5),
        )

    def call(self, images):
        height, width, channels = images.shape[1:]
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = ops.reshape(images, (-1, rows, size, columns, size, channels))
        patches = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
        patches = ops.reshape(patches, (-1, rows * columns, size * size * channels))
        return ops.matmul(patches, ops.reshape(self.kernel, (size * size * channels, -1)))


class ImageEmbeddings(Layer):
    """A learned class vector and one vector for each patch, plus a learned vector for each position."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        width = config.hidden_size
        self.positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = self.add_weight(
            name="class_embedding", shape=(width,), initializer=normal(width**-0.5)
        )
        self.patch_embedding = PatchEmbedding(config.patch_size, config.num_channels, width)
        self.position_embedding = embedding(self.positions, width, normal(width**-0.5))

    def call(self, images):
        patches = self.patch_embedding(images)
        # Added to zeros, since the batch size may be unknown during tracing.
        class_vectors = ops.zeros_like(patches[:, :1]) + self.class_embedding
        hidden = ops.concatenate([class_vectors, patches], axis=1)
        return hidden + self.position_embedding(np.arange(self.positions))


@keras.saving.register_keras_serializable("keras_sd")
class ImageEncoder(ConfiguredModel):
    """A vision transformer with a projection into the space that it shares with the text tower.

    Call it on float `(n, image_size, image_size, channels)` in [-1, 1]. It returns the embeddings, float32
    `(n, projection_dim)`, not scaled to unit length. All weights exist after construction.

    Raises:
        UserError: the images have another size.
    """

    config_class = ImageEncoderConfig

    def __init__(self, config: ImageEncoderConfig, **kwargs: Any) -> None:
        # Images are normalised before they are cast.
        super().__init__(config, autocast=False, **kwargs)
        if config.image_size % config.patch_size:
            raise UserError(
                f"image encoder config: image_size {config.image_size} does not divide into patches of "
                f"{config.patch_size}; make it a multiple of patch_size"
            )
        if config.num_channels != len(PIXEL_MEAN):
            raise UserError(
                f"image encoder config: num_channels is {config.num_channels}; CLIP sees RGB, set 3"
            )
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = LayerNormalization(width, epsilon)
        self.encoder = Transformer(config, causal=False)
        self.post_layernorm = LayerNormalization(width, epsilon)
        self.visual_projection = dense(
            width, config.projection_dim, use_bias=False, kernel_initializer=normal(width**-0.5)
        )
        self.built = True

    def __call__(self, images: Tensor, **kwargs: Any) -> Tensor:
        # Keras adds lines to the message of an error that is raised inside `call`.
        self._check(images)
        return super().__call__(images, **kwargs)

    def call(self, images: Tensor) -> Tensor:
        return ops.cast(self.visual_projection(self.features(images)), "float32")

    def features(self, images: Tensor) -> Tensor:
        """Return the last block's class vector after its layer normalisation, float32 `(n, hidden_size)`.

        Args:
            images: as in a call.
        """
        return ops.cast(self.post_layernorm(self.encoder(self._embedded(images))[:, 0]), "float32")

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """Return each block's outputs for the patches, `(n, patches, hidden_size)`, first block first.

        Patches are in rows from the top left. The class vector is left out.

        Args:
            images: as in a call.
        """
        hidden, states = self._embedded(images), []
        for layer in self.encoder.layers:
            hidden = layer(hidden)
            states.append(hidden[:, 1:])
        return states

    def patch_features(self, images: Tensor) -> Tensor:
        """Return the last block's vectors of the patches, float32 `(n, rows, columns, hidden_size)`.

        They are transformers' `last_hidden_state` without the class vector, on the grid of the patches.

        Args:
            images: as in a call.
        """
        grid = self.config.image_size // self.config.patch_size
        patches = self.encoder(self._embedded(images))[:, 1:]
        return ops.cast(ops.reshape(patches, (-1, grid, grid, self.config.hidden_size)), "float32")

    def _embedded(self, images):
        self._check(images)
        return self.pre_layrnorm(self.embeddings(normalize_pixels(images)))

    def _check(self, images):
        size, shape = self.config.image_size, tuple(images.shape[1:])
        expected = (size, size, self.config.num_channels)
        if shape != expected:
            raise UserError(f"image encoder: images are {shape}, not {expected}; resize them")


def normalize_pixels(images):
    """Normalise RGB images in [-1, 1] to mean 0 and standard deviation 1 over CLIP's training images."""
    scale, offset = 0.5 / PIXEL_DEVIATION, (0.5 - PIXEL_MEAN) / PIXEL_DEVIATION
    return images * scale.astype("float32") + offset.astype("float32")
