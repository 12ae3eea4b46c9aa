"""Sources of encoded images and captions, as the VAE and the text encoder stay frozen during training.

`EncodedSource` has all encodings in memory, `stored_encodings.StoredSource` on disk, and `UnencodedSource`
encodes each batch while the step before it runs. All three give a training run the same examples.
"""

import collections
import copy
import hashlib
import threading
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from keras_sd import backend
from keras_sd.data.masks import mask_keys
from keras_sd.errors import UserError
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.vae import AutoencoderKL
from keras_sd.progress import Progress
from keras_sd.training.encoder import (
    BATCH_SIZE,
    CaptionIndex,
    Encoder,
    batched,
    check_finite,
    name_of,
    read_ahead,
)

_KEPT_CONTEXTS = 64  # captions that are not encoded again, such as the empty one
_BATCHES_AHEAD = 2


def framing_of(source, name):
    """Return a value of how a source's images are framed; None if they come as they are."""
    return getattr(getattr(source, "framing", None), name, None)


class Examples:
    """The base class of all three sources.

    Attributes:
        condition: the key of contexts in a training batch: "context", or "token_ids" without a text encoder.
        framing: `data.framing.Framing`; None if images come as they are.
        cache_dtype: the precision in which encodings are kept.
    """

    def __init__(self, source: Any, encoder: Encoder, dtype: str = "float32") -> None:
        self.framing = getattr(source, "framing", None)
        self.condition, self.cache_dtype = encoder.condition, dtype
        self._buckets = getattr(source, "buckets", None)
        # Computed before the files are read, so that a change meanwhile is noticed by the next run.
        self._fingerprint = fingerprint_of(source)
        self._has_flips = bool(framing_of(source, "random_flip"))
        self._has_masks = bool(getattr(source, "has_masks", False))
        self._start, self._count = 0, len(source)

    @property
    def buckets(self) -> npt.NDArray[np.int64] | None:
        """Index of each example's bucket, int `(n,)`; None if all images have one size."""
        return None if self._buckets is None else self._buckets[self._start : self._start + self._count]

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, that identifies the encoded data.

        It is the source's own fingerprint or, for a source without one, that of pixels and captions.
        """
        return self._fingerprint

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example that is not flipped.

        Keys: mean and standard_deviation of the scaled latents `(h, w, c)`, contexts and empty_context. The
        contexts `(n, tokens, width)` are those of the captions; `(n, tokens)` without a text encoder. In
        place of the moments an `UnencodedSource` has the image and latent_shape. A source with masks has
        mask: the weight of each latent `(h, w, 1)`. One for an alignment has alignment_target, in memory.
        """
        return self._example(self._place(index), is_flipped=False)

    def draw_example(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return an example, flipped in half of the draws if the source's framing says so."""
        is_flipped = self._has_flips and generator.random() < 0.5
        return self._example(self._place(index), is_flipped)

    def _example(self, index, is_flipped):
        raise NotImplementedError

    def _place(self, index):
        if not 0 <= index < self._count:
            raise IndexError("out of range")
        return self._start + index

    def split(self, count: int) -> tuple[Self, ...]:
        """Return two sources: the first `count` examples, and the others."""
        parts = copy.copy(self), copy.copy(self)
        for part, place in zip(parts, (slice(0, count), slice(count, None)), strict=True):
            start, stop, _ = place.indices(self._count)
            part._start, part._count = self._start + start, max(stop - start, 0)
            described = f"{self._fingerprint} {place.start} {place.stop}"
            part._fingerprint = hashlib.sha256(described.encode()).hexdigest()
        return parts


def cached_example(moments, contexts, empty_context, mask=None, is_flipped=False, target=None):
    """Return an example of kept encodings; a mask is kept as that of the image that is not flipped."""
    example = {
        "mean": moments[0].astype("float32", copy=False),
        "standard_deviation": moments[1].astype("float32", copy=False),
        "contexts": contexts,
        "empty_context": empty_context,
    }
    if mask is not None:
        example["mask"] = mask[:, ::-1] if is_flipped else mask
    if target is not None:
        example["alignment_target"] = target.astype("float32", copy=False)
    return example


def latent_mask(mask: npt.NDArray[np.uint8], latent_shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Return the weight of each latent: the mean of its pixels in a mask, from 0 to 1.

    Args:
        mask: uint8 `(height, width)`.
        latent_shape: (height / factor, width / factor, channels).

    Returns:
        float32 `(height / factor, width / factor, 1)`.
    """
    rows, columns, _ = latent_shape
    cells = mask.reshape(rows, mask.shape[0] // rows, columns, mask.shape[1] // columns)
    return (cells.mean(axis=(1, 3)) / 255).astype("float32")[..., None]


class MaskReading:
    """The masks of a framed source by latents, for `encoder.read_ahead`.

    Args:
        source: a `data.framing.FramedSource` with masks.
        encoder: `encoder.Encoder`.
    """

    def __init__(self, source: Any, encoder: Encoder) -> None:
        self._source, self._encoder = source, encoder

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        mask = self._source.mask(index)
        return latent_mask(mask, self._encoder.latent_shape(*mask.shape))


class EncodedSource(Examples):
    """A source of encoded images and captions, all in memory.

    Each image is read once, while earlier ones are encoded, so only the pixels of a few batches are in
    memory. Equal captions are encoded once.

    Args:
        source: examples with `image` uint8 and optionally `captions`; a `data.framing.FramedSource` has
            several sizes of images, and flips.
        vae, text_encoder, tokenizer: the frozen parts. If the text encoder is None, because it is trained,
            captions are stored as token ids.
        batch_size: images per batch.
        jit_compile: whether to compile with XLA on TensorFlow.
        progress: whether to show progress on standard error.
        dtype: "float32", "float16" or "bfloat16", in which encodings are kept.

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
        dtype: str = "float32",
    ) -> None:
        if not len(source):
            raise UserError("data set: no examples to encode; give one with images")
        self._encode(source, Encoder(vae, text_encoder, tokenizer, batch_size, jit_compile), dtype, progress)

    @classmethod
    def of_encoder(
        cls,
        source: Any,
        encoder: Encoder,
        dtype: str,
        progress: bool,
        captions: CaptionIndex | None = None,
    ) -> Self:
        """Return the source for an `encoder.Encoder`, and an `encoder.CaptionIndex` if there is one."""
        self = cls.__new__(cls)
        self._encode(source, encoder, dtype, progress, captions)
        return self

    def _encode(self, source, encoder, dtype, progress, captions=None):
        super().__init__(source, encoder, dtype)
        versions = [source, source.flipped()] if self._has_flips else [source]
        show = progress and backend.process_index() == 0
        total = len(versions) * len(source)
        with Progress("encoding images", total, "images", disable=not show) as bar:
            self._images, read = [], []
            for version in versions:
                encoded, of_images = self._encode_images(version, encoder, bar)
                self._images.append(encoded)
                read.append(of_images)
        self._captions = captions or CaptionIndex(read[0], encoder.tokenizer)
        self._contexts = self._captions.token_ids
        if encoder.text_encoder is not None:
            total = len(self._captions.token_ids)
            with Progress("encoding captions", total, "captions", delay=2.0, disable=not show) as bar:
                self._contexts = self._encode_captions(encoder, bar)
        self._masks = None
        if self._has_masks:
            with Progress("reading masks", len(source), "masks", delay=2.0, disable=not show) as bar:
                self._masks = []
                for mask in read_ahead(MaskReading(source, encoder), range(len(source))):
                    self._masks.append(mask)
                    bar.update(1)

    def _encode_captions(self, encoder, bar):
        ids, size = self._captions.token_ids, encoder.text_batch_size
        parts = []
        for start in range(0, len(ids), size):
            parts.append(narrowed(encoder.contexts(ids[start : start + size]), self.cache_dtype))
            bar.update(len(parts[-1]))
        return np.concatenate(parts)

    def _encode_images(self, source, encoder, bar):
        """Return the encodings of all images by name, for each bucket, and their captions."""
        buckets = np.zeros(len(source), int) if self._buckets is None else np.asarray(self._buckets)
        pixels = None if self._fingerprint else hashlib.sha256()
        places = [np.flatnonzero(buckets == bucket) for bucket in range(buckets.max() + 1)]
        self._within = np.empty(len(source), int)  # where an example is in its bucket
        captions, encoded = [()] * len(source), []
        examples = read_ahead(source, np.concatenate(places))
        for of_bucket in places:
            self._within[of_bucket] = np.arange(len(of_bucket))
            whole, done = {}, 0
            for part in batched(examples, encoder.batch_sizes(len(of_bucket))):
                indices = of_bucket[done : done + len(part)].tolist()
                images = np.stack([example["image"] for example in part])
                if pixels:
                    pixels.update(images.data)
                found = encoded_images(encoder, images, list(map(name_of, part, indices)))
                for name, arrays in found.items():
                    if name not in whole:
                        whole[name] = np.empty((len(of_bucket), *arrays.shape[1:]), self.cache_dtype)
                    whole[name][done : done + len(part)] = narrowed(arrays, self.cache_dtype)
                for index, example in zip(indices, part, strict=True):
                    captions[index] = example.get("captions", ())
                done += len(part)
                bar.update(len(part))
            encoded.append(whole)
        if pixels:
            self._fingerprint = hashlib.sha256(f"{pixels.hexdigest()} {captions}".encode()).hexdigest()
        return encoded, captions

    def _example(self, index, is_flipped):
        bucket = 0 if self._buckets is None else self._buckets[index]
        encoded, place = self._images[is_flipped][bucket], self._within[index]
        target = encoded["alignment_target"][place] if "alignment_target" in encoded else None
        mask = None if self._masks is None else self._masks[index]
        contexts = self._context(self._captions.rows(index)), self._context(0)
        return cached_example(encoded["moments"][place], *contexts, mask, is_flipped, target)

    def _context(self, rows):
        kind = "int32" if self.condition == "token_ids" else "float32"
        return self._contexts[rows].astype(kind, copy=False)


def encoded_images(encoder, images, names):
    """Return what is encoded of images by name: moments and, for an alignment, alignment_target.

    Args:
        encoder: `encoder.Encoder`.
        images: uint8 `(n, height, width, 3)`.
        names: of the images, for messages.

    Raises:
        UserError: a number is not finite.
    """
    encoded = {"moments": encoder.moments(images)}
    check_finite(encoded["moments"], names)
    if encoder.alignment is not None:
        encoded["alignment_target"] = encoder.alignment_targets(images)
        check_finite(encoded["alignment_target"], names, "features", "image encoder")
    return encoded


def narrowed(array, dtype):
    """Return an array in another floating-point type.

    Raises:
        UserError: a number is too large for it.
    """
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        raise UserError(f"encodings: a number is too large for {dtype}; use float32 or bfloat16")
    return narrow


class UnencodedSource(Examples):
    """A source of images and token ids; `encode_batches` encodes each batch while the step before it runs.

    Args:
        source: a `data.framing.FramedSource`.
        encoder: `encoder.Encoder`.
        captions: `encoder.CaptionIndex`.
    """

    def __init__(self, source: Any, encoder: Encoder, captions: CaptionIndex) -> None:
        super().__init__(source, encoder)
        self._source, self._encoder, self._captions = source, encoder, captions
        self._contexts: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _example(self, index, is_flipped):
        masks = {"mask": self._source.mask(index)} if self._has_masks else {}
        return self._with_captions(index, self._source[index] | masks)

    def draw_example(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return an example, cropped and flipped as the source's framing says."""
        index = self._place(index)
        draw = getattr(self._source, "draw_example", lambda index, generator: self._source[index])
        return self._with_captions(index, draw(index, generator))

    def _with_captions(self, index, example):
        ids = self._captions.token_ids
        shape = self._encoder.latent_shape(*example["image"].shape[:2])
        masks = {"mask": latent_mask(example["mask"], shape)} if self._has_masks else {}
        return masks | {
            "image": example["image"],
            "latent_shape": shape,
            "contexts": ids[self._captions.rows(index)].astype("int32"),
            "empty_context": ids[0].astype("int32"),
        }

    def encode_batches(self, batches: Any) -> Any:
        """Return a Grain data set of batches with latents and contexts; a thread encodes the next ones.

        Args:
            batches: Grain data set of batches of `text_to_image.diffusion_example`.
        """
        from grain.experimental import ThreadPrefetchIterDataset

        return ThreadPrefetchIterDataset(batches.map(self.encode_batch), prefetch_buffer_size=_BATCHES_AHEAD)

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with latents and contexts in place of images and token ids."""
        batch = dict(batch)
        images, noise = batch.pop("image"), batch.pop("posterior_noise")
        images = images.reshape(-1, *images.shape[-3:])  # pairs of images, too
        names = [f"image {index} of a batch" for index in range(len(images))]
        encoded = encoded_images(self._encoder, images, names)
        moments = encoded.pop("moments")
        batch |= encoded
        means, deviations = (moments[:, part].reshape(noise.shape) for part in range(2))
        batch["samples"] = means + deviations * noise
        if "hidden" in batch:
            channels = self._encoder.inpainting_channels(images, batch.pop("hidden"))
            check_finite(channels, [f"masked image {index} of a batch" for index in range(len(channels))])
            batch["channels"] = channels
        for name in ("context", "negative"):
            if name in batch and self._encoder.text_encoder is not None:
                batch[name] = self._encoded_captions(batch[name])
        return batch

    def _encoded_captions(self, token_ids):
        """Return the contexts of captions; those that were encoded last are kept."""
        rows = token_ids.reshape(-1, token_ids.shape[-1])
        keys = [row.tobytes() for row in rows]
        with self._lock:
            new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._contexts}
            found = (
                dict(zip(new, self._encoder.contexts(np.stack(list(new.values()))), strict=True))
                if new
                else {}
            )
            contexts = np.stack([found[key] if key in found else self._contexts[key] for key in keys])
            self._contexts.update(found)
            while len(self._contexts) > _KEPT_CONTEXTS:
                self._contexts.popitem(last=False)
        return contexts.reshape(*token_ids.shape[:-1], *contexts.shape[1:])


def _white(size):
    return np.full(size, 255, np.uint8)


class JoinedSource:
    """The examples of several framed sources with one framing, one source after the other.

    Args:
        sources: each a `data.framing.FramedSource`; an empty sequence is left out.
    """

    def __init__(self, *sources: Any) -> None:
        self.sources = [source for source in sources if len(source)]
        self.framing = self.sources[0].framing
        self.bucket_sizes = list(dict.fromkeys(size for one in self.sources for size in one.bucket_sizes))
        places = [[self.bucket_sizes.index(size) for size in one.bucket_sizes] for one in self.sources]
        self.buckets = np.concatenate(
            [np.array(place)[one.buckets] for place, one in zip(places, self.sources, strict=True)]
        )

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def _found(self, index):
        for source in self.sources:
            if 0 <= index < len(source):
                return source, index
            index -= len(source)
        raise IndexError("out of range")

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, index = self._found(index)
        return source[index]

    def draw_example(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return an example, cropped and flipped as its source's framing says."""
        source, index = self._found(index)
        example = source.draw_example(index, generator)
        return {"mask": _white(example["image"].shape[:2])} | example if self.has_masks else example

    @property
    def has_masks(self) -> bool:
        """Whether one of the sources has masks; in the others all of an image counts."""
        return any(source.has_masks for source in self.sources)

    def mask(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the mask of `self[index]`, uint8 `(height, width)`."""
        source, index = self._found(index)
        return source.mask(index) if source.has_masks else _white(source.bucket_sizes[source.buckets[index]])

    def mask_keys(self) -> list[str]:
        """Return a text for each image that names its mask's content."""
        return [key for source in self.sources for key in mask_keys(source)]

    def frame_key(self, index: int) -> str:
        """Return what names the framing of an image."""
        source, index = self._found(index)
        return source.frame_key(index)

    def flipped(self) -> "JoinedSource":
        """Return the same sources with every image mirrored."""
        return JoinedSource(*(source.flipped() for source in self.sources))

    def captions(self) -> list[tuple[str, ...]]:
        """Return the captions of every example."""
        return [captions for source in self.sources for captions in source.captions()]

    def content_keys(self) -> list[str]:
        """Return a SHA-256 of each image's content."""
        return [key for source in self.sources for key in source.content_keys()]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the sources' fingerprints."""
        parts = [source.fingerprint() for source in self.sources]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def fingerprint_of(source):
    """Return a source's fingerprint, or None if it has none."""
    fingerprint = getattr(source, "fingerprint", None)
    return fingerprint() if fingerprint else None
