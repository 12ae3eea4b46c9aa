"""Encodes all images and captions once before training, as the VAE and the text encoder stay frozen."""

import concurrent.futures
import copy
import hashlib
import itertools
import os
from typing import Any, Self

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.batches import padded_indices
from keras_sd.models.pixels import images_to_unit
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.vae import AutoencoderKL
from keras_sd.progress import Progress

BATCH_SIZE = 4
"""Images per encoding batch; each image of 512 px takes 0.6 GiB in Stable Diffusion's encoder."""


class EncodedSource:
    """A source of encoded images and captions, all in memory.

    Each image is read once, while earlier ones are encoded, so only the pixels of a few batches are in
    memory. Equal captions are encoded once.

    Args:
        source: examples with `image` uint8 and optionally `captions`.
        vae, text_encoder, tokenizer: the frozen parts. If the text encoder is None, because it is trained,
            captions are stored as token ids.
        batch_size: the largest number of images per batch.
        jit_compile: whether to compile with XLA on TensorFlow.
        progress: whether to show progress on standard error.

    Attributes:
        condition: the key of `contexts` in a training batch: "context", or "token_ids" without a text
            encoder.

    Raises:
        UserError: there are no examples, or an image cannot be read or has latents that are not finite.
    """

    def __init__(
        self,
        source: Any,
        vae: AutoencoderKL,
        text_encoder: TextEncoder | None,
        tokenizer: Tokenizer,
        batch_size: int = BATCH_SIZE,
        jit_compile: bool = True,
        progress: bool = True,
    ) -> None:
        if not len(source):
            raise UserError("data set: no examples to encode; give one with images")
        # Computed before the files are read, so that a change meanwhile is noticed by the next run.
        self._fingerprint = _fingerprint_of(source)
        show = progress and backend.process_index() == 0
        batch_size = min(batch_size, len(source))
        self.means, self.standard_deviations, captions = self._encode_images(
            source,
            vae,
            batch_size,
            jit_compile,
            Progress("encoding images", len(source), "images", disable=not show),
        )
        # The empty caption comes first; it replaces dropped captions.
        rows = {"": 0}
        self._rows = [
            _as_slice([rows.setdefault(caption, len(rows)) for caption in of_image]) for of_image in captions
        ]
        self.condition, self.contexts = "token_ids", tokenizer(list(rows))
        if text_encoder is not None:
            encode = backend.jit(lambda ids: (text_encoder(ids),), text_encoder.variables, jit_compile)
            bar = Progress("encoding captions", len(rows), "captions", delay=2.0, disable=not show)
            size = min(4 * batch_size, len(rows))
            batches = (self.contexts[start : start + size] for start in range(0, len(rows), size))
            (self.contexts,) = _in_batches(encode, batches, size, len(rows), bar)
            self.condition = "context"

    def _encode_images(self, source, vae, batch_size, jit_compile, bar):
        """Return the means and the standard deviations of all latents, and the captions."""
        posterior = backend.jit(
            lambda images: _scaled_moments(vae, images_to_unit(images)), vae.variables, jit_compile
        )
        captions, names = [], []
        pixels = None if self._fingerprint else hashlib.sha256()

        def batches():
            for examples in _read_ahead(source, batch_size):
                captions.extend(example.get("captions", ()) for example in examples)
                names.extend(example.get("path") for example in examples)
                images = np.stack([example["image"] for example in examples])
                if pixels:
                    pixels.update(images.data)
                yield images

        def check(start, means, standard_deviations):
            for index, moments in enumerate(zip(means, standard_deviations, strict=True), start):
                if not all(np.isfinite(array).all() for array in moments):
                    name = names[index] or f"image {index}"
                    raise UserError(
                        f"{name}: its latents are not finite numbers; use another precision (bf16 or "
                        "none), or another VAE"
                    )

        means, standard_deviations = _in_batches(posterior, batches(), batch_size, len(source), bar, check)
        if pixels:
            self._fingerprint = hashlib.sha256(f"{pixels.hexdigest()} {captions}".encode()).hexdigest()
        return means, standard_deviations, captions

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, that identifies the encoded data.

        It is the source's own fingerprint or, for a source without one, that of pixels and captions.
        """
        return self._fingerprint

    def split(self, count: int) -> tuple[Self, ...]:
        """Return two sources: the first `count` examples, and the others."""
        parts = copy.copy(self), copy.copy(self)
        for part, place in zip(parts, (slice(0, count), slice(count, None)), strict=True):
            part.means, part.standard_deviations = self.means[place], self.standard_deviations[place]
            part._rows = self._rows[place]
            described = f"{self._fingerprint} {place.start} {place.stop}"
            part._fingerprint = hashlib.sha256(described.encode()).hexdigest()
        return parts

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Keys: mean and standard_deviation of the scaled latents `(h, w, c)`, contexts and empty_context.

        The contexts `(n, tokens, width)` are those of the captions; `(n, tokens)` without a text encoder.
        """
        return {
            "mean": self.means[index],
            "standard_deviation": self.standard_deviations[index],
            "contexts": self.contexts[self._rows[index]],
            "empty_context": self.contexts[0],
        }


def _as_slice(rows):
    """Return an index of these rows: a slice, which copies nothing, if they are consecutive."""
    start = rows[0] if rows else 0
    end = start + len(rows)
    return slice(start, end) if rows == list(range(start, end)) else np.array(rows)


def _scaled_moments(vae, images):
    """Return mean and standard deviation of the images' latents, scaled as the UNet takes them."""
    posterior = vae.encode(images)
    scale = vae.config.scaling_factor
    return posterior.mean * scale, ops.exp(0.5 * posterior.log_variance) * scale


def _read_ahead(source, batch_size):
    """Yield lists of examples in order; threads read the next list while one is in use."""
    threads = min(batch_size, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        reading = (pool.submit(source.__getitem__, index) for index in range(len(source)))
        ahead = list(itertools.islice(reading, batch_size))
        try:
            while ahead:
                examples = [example.result() for example in ahead]
                ahead = list(itertools.islice(reading, batch_size))
                yield examples
        finally:
            for example in ahead:
                example.cancel()


def _in_batches(function, batches, batch_size, count, progress, check=None):
    """Call a compiled function batch by batch; the last batch is padded, so that it compiles once.

    Args:
        function: takes an array of `batch_size` rows and returns a tuple of arrays with as many rows.
        batches: arrays; the last may have fewer rows.
        count: total number of rows.
        progress: `Progress` over the rows.
        check: called with the index of a batch's first row and the batch's results.

    Returns:
        List of arrays with `count` rows.
    """
    whole, done = None, 0
    with progress:
        for batch in batches:
            padded = batch[padded_indices(0, batch_size, len(batch))]
            outputs = [ops.convert_to_numpy(output)[: len(batch)] for output in function(padded)]
            if check:
                check(done, *outputs)
            if whole is None:
                whole = [np.empty((count, *output.shape[1:]), output.dtype) for output in outputs]
            for array, output in zip(whole, outputs, strict=True):
                array[done : done + len(batch)] = output
            done += len(batch)
            progress.update(len(batch))
    return whole


class JoinedSource:
    """The examples of several sources, one source after the other."""

    def __init__(self, *sources):
        self.sources = sources

    def __len__(self):
        return sum(map(len, self.sources))

    def __getitem__(self, index):
        for source in self.sources:
            if 0 <= index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError("out of range")

    def fingerprint(self):
        """Return a SHA-256 over the sources' fingerprints; None if one has none."""
        parts = [_fingerprint_of(source) for source in self.sources if len(source)]
        return None if None in parts else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _fingerprint_of(source):
    fingerprint = getattr(source, "fingerprint", None)
    return fingerprint() if fingerprint else None
