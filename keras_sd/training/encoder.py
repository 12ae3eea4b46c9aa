"""Computes the encodings that training on latents needs: moments of images, and contexts of captions.

Batches have one size, whatever is in them, and are padded. So each size of images is compiled once, and an
image has the same encoding whichever way it is kept: in memory, on disk, or encoded when it is drawn.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.batches import padded_indices
from keras_sd.models.pixels import any_white, images_to_unit
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.rules import weights_fingerprint

BATCH_SIZE = 4
"""Images per encoding batch; each image of 512 px takes 0.6 GiB in Stable Diffusion's encoder."""

_CAPTIONS_PER_IMAGE = 4  # a batch holds so many times more captions than images
_MOST_READERS = 32


class Encoder:
    """The frozen parts of a model, compiled for encoding. Every process works alone.

    Args:
        vae, text_encoder, tokenizer: the frozen parts. If the text encoder is None, because it is trained,
            the context of a caption is its token ids.
        batch_size: images per batch.
        jit_compile: whether to compile with XLA on TensorFlow.
        alignment: `alignment.Alignment`, whose targets examples have, too; None for none.

    Attributes:
        condition: the key of contexts in a training batch: "context", or "token_ids" without a text encoder.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: TextEncoder | None,
        tokenizer: Tokenizer,
        batch_size: int = BATCH_SIZE,
        jit_compile: bool = True,
        alignment: Any = None,
    ) -> None:
        self.alignment = alignment
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.batch_size, self.text_batch_size = batch_size, _CAPTIONS_PER_IMAGE * batch_size
        self.condition = "token_ids" if text_encoder is None else "context"
        self._posterior = backend.jit(
            lambda images: _scaled_moments(vae, images_to_unit(images)),
            vae.variables,
            jit_compile,
            title="VAE encoder, for training",
            of_process=True,
        )
        self._masked = backend.jit(
            lambda images, hidden: _scaled_mean(
                vae, images_to_unit(images) * (1.0 - ops.cast(hidden, "float32"))
            ),
            vae.variables,
            jit_compile,
            title="VAE encoder of masked images",
            of_process=True,
        )
        if alignment is not None:
            self._targets = backend.jit(
                lambda images: alignment.targets(images),
                alignment.image_encoder.variables,
                jit_compile,
                title="image encoder of the alignment",
                of_process=True,
            )
        if text_encoder is not None:
            encode = text_encoder  # of the type that is not None
            self._encode_text = backend.jit(
                lambda ids: encode(ids),
                encode.variables,
                jit_compile,
                title="text encoder, for training",
                of_process=True,
            )

    def moments(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return mean and standard deviation of the images' scaled latents.

        Args:
            images: uint8 `(n, height, width, 3)`.

        Returns:
            float32 `(n, 2, height / factor, width / factor, channels)`.
        """
        return in_batches(self._posterior, self.batch_size, images)

    def alignment_targets(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the targets of the images' alignment, float32 `(n, rows, columns, features)`.

        Args:
            images: uint8 `(n, height, width, 3)`.
        """
        return in_batches(self._targets, self.batch_size, images)

    def inpainting_channels(
        self, images: npt.NDArray[np.uint8], hidden: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Return what an inpainting UNet gets: masks, and the latents of images without what they hide.

        Args:
            images: uint8 `(n, height, width, 3)`.
            hidden: bool `(n, height, width, 1)`; True is hidden.

        Returns:
            float32 `(n, height / factor, width / factor, 1 + channels)`.
        """
        latents = in_batches(self._masked, self.batch_size, images, hidden)
        small = any_white(hidden, self.vae.config.downsampling).astype("float32")
        return np.concatenate([small, latents], axis=-1)

    def contexts(self, token_ids: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the encodings of captions, float32 `(n, tokens, width)`, by the text encoder.

        Args:
            token_ids: integers `(n, tokens)`.
        """
        return in_batches(self._encode_text, self.text_batch_size, token_ids.astype("int32"))

    def batch_sizes(self, count: int) -> list[int]:
        """Return how many of so many images are in each batch."""
        return [min(self.batch_size, count - start) for start in range(0, count, self.batch_size)]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the latents of an image."""
        factor = self.vae.config.downsampling
        return height // factor, width // factor, self.vae.config.latent_channels

    def vae_identity(self) -> str:
        """Return what names the VAE: SHA-256 of its weights and its config, and the precision."""
        return _identity(self.vae)

    def text_identity(self) -> str:
        """Return what names the text encoder; its input is the token ids, so the tokenizer is not in it."""
        skipped = self.text_encoder.clip_skip if self.text_encoder is not None else 0
        return _identity(self.text_encoder) + (f"-{skipped} skipped" if skipped else "")


def _identity(model):
    config = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    return f"{weights_fingerprint(model)}-{config.hexdigest()[:16]}-{model.compute_dtype}"


class CaptionIndex:
    """The distinct captions of a source, as token ids, and which of them are those of an example.

    Args:
        captions: the captions of each example.
        tokenizer: the tokenizer.

    Attributes:
        token_ids: of each distinct caption, integers `(n, tokens)`. The empty caption comes first; it
            replaces dropped captions.
    """

    def __init__(self, captions: Iterable[Sequence[str]], tokenizer: Tokenizer) -> None:
        rows, flat, ends = {"": 0}, [], [0]
        for of_image in captions:
            flat += [rows.setdefault(caption, len(rows)) for caption in of_image]
            ends.append(len(flat))
        self._rows, self._ends = np.array(flat, np.int32), np.array(ends)
        texts = list(rows)
        # In half the space, as the ids of CLIP's words have 16 bits.
        kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        parts = (texts[start : start + 4096] for start in range(0, len(texts), 4096))
        self.token_ids = np.concatenate([tokenizer(part).astype(kind) for part in parts])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def rows(self, index: int) -> npt.NDArray[np.int32] | slice:
        """Return the rows of an example's captions; a slice, which copies nothing, where it can."""
        rows = self._rows[self._ends[index] : self._ends[index + 1]]
        if len(rows) and (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows


def _scaled_moments(vae, images):
    """Return mean and standard deviation of the images' latents, scaled as the UNet takes them."""
    posterior = vae.encode(images)
    scale = vae.config.scaling_factor
    moments = [posterior.mean * scale, ops.exp(0.5 * posterior.log_variance) * scale]
    return ops.cast(ops.stack(moments, axis=1), "float32")


def _scaled_mean(vae, images):
    """Return the mean of the images' latents, scaled as the UNet takes them."""
    return ops.cast(vae.encode(images).mean * vae.config.scaling_factor, "float32")


def in_batches(function, batch_size, *arrays):
    """Return a compiled function of arrays as float32, computed in batches of exactly this size."""
    parts = []
    for start in range(0, len(arrays[0]), batch_size):
        count = len(arrays[0][start : start + batch_size])
        padded = padded_indices(0, batch_size, count)
        found = function(*(array[start : start + batch_size][padded] for array in arrays))
        parts.append(np.asarray(ops.convert_to_numpy(found)[:count], "float32"))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_finite(
    encodings: npt.NDArray[np.float32], names: Sequence[str], what: str = "latents", model: str = "VAE"
) -> None:
    """Raise UserError if an image's latents, or what else is encoded, are not finite; it names the image."""
    for array, name in zip(encodings, names, strict=True):
        if not np.isfinite(array).all():
            raise UserError(
                f"{name}: its {what} are not finite numbers; use another precision (bf16 or none), or "
                f"another {model}"
            )


def name_of(example: dict[str, Any], index: int) -> str:
    """Return the name of an example's image in messages."""
    return example.get("path") or f"image {index}"


def read_ahead(source: Any, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield examples of a source in this order; Grain's threads read the next ones meanwhile."""
    import grain

    threads = min(_MOST_READERS, os.cpu_count() or 1)
    dataset = grain.MapDataset.source(list(map(int, indices))).map(lambda index: source[index])
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))


def batched(elements: Iterator[Any], sizes: Iterable[int]) -> Iterator[list[Any]]:
    """Yield lists of so many elements each."""
    for size in sizes:
        yield [next(elements) for _ in range(size)]
