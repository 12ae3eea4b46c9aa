"""Encodings on disk as a source of training, and the choice between memory, disk and neither."""

import dataclasses
import hashlib
import itertools
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_sd import backend
from keras_sd.data.encoding_store import SHARD_SIZE, EncodingStore, keys_of
from keras_sd.errors import UserError
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.vae import AutoencoderKL
from keras_sd.progress import Progress
from keras_sd.training.caching import Caching
from keras_sd.training.encoder import (
    BATCH_SIZE,
    CaptionIndex,
    Encoder,
    batched,
    check_finite,
    name_of,
    read_ahead,
)
from keras_sd.training.encodings import (
    EncodedSource,
    Examples,
    MaskReading,
    UnencodedSource,
    cached_example,
    fingerprint_of,
    framing_of,
)

MOST_IN_MEMORY = 2**30
"""Bytes of encodings that are kept in memory if the user does not choose: 2,700 images of 512 px."""


def encoded_source(
    source: Any,
    vae: AutoencoderKL,
    text_encoder: TextEncoder | None,
    tokenizer: Tokenizer,
    caching: Caching | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    jit_compile: bool = True,
    progress: bool = True,
    alignment: Any = None,
) -> "EncodedSource | StoredSource | UnencodedSource":
    """Return a source of encoded examples, kept where `caching` says.

    Args:
        source: a `data.framing.FramedSource`; any sequence of examples if encodings are kept in memory.
        vae, text_encoder, tokenizer, batch_size, jit_compile, progress: as in `EncodedSource`.
        caching: `Caching`.
        alignment: `alignment.Alignment`, whose targets the examples have, too; not kept on disk.

    Raises:
        UserError: there are no examples, an image cannot be read or encoded, images are cropped at random
            but kept, or the folder cannot be written.
    """
    caching = caching or Caching()
    if alignment is not None:
        caching.refuse_disk_for_alignment()
    if not len(source):
        raise UserError("data set: no examples to encode; give one with images")
    encoder = Encoder(vae, text_encoder, tokenizer, batch_size, jit_compile, alignment)
    mode = caching.cache_latents
    if backend.plan() is not None:  # one batch is enough
        return UnencodedSource(source, encoder, CaptionIndex(source.captions(), tokenizer))
    if not hasattr(source, "bucket_sizes"):
        if mode not in (None, "memory") or caching.cache_dir is not None:
            raise UserError(f"cache_latents {mode or 'disk'}: images are not framed; use a `FramedSource`")
        mode = "memory"
    if framing_of(source, "crop") == "random":
        mode = caching.with_random_crops().cache_latents
    captions = None
    if mode != "memory":
        captions = CaptionIndex(source.captions(), tokenizer)
        size = _size(source, captions, encoder, caching.cache_dtype)
        if mode is None:
            mode = _usual_mode(size, caching, alignment, progress and not backend.process_index())
    if mode == "memory":
        return EncodedSource.of_encoder(source, encoder, caching.cache_dtype, progress, captions)
    assert captions is not None
    if mode == "off":
        return UnencodedSource(source, encoder, captions)
    store = EncodingStore(caching.folder())
    return StoredSource(source, encoder, captions, store, caching.cache_dtype, progress)


def _usual_mode(size, caching, alignment, show):
    """Return where so many bytes of encodings are kept if the user does not say; tell if not in memory."""
    if size <= MOST_IN_MEMORY and caching.cache_dir is None:
        return "memory"
    mode = "disk" if alignment is None else "off"
    if show and caching.cache_dir is None:
        where = f"are kept in {caching.folder()}" if mode == "disk" else "are computed anew for each batch"
        _say(f"encodings take {size / 2**30:.1f} GiB, and {where}")
    return mode


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _size(source, captions, encoder, dtype):
    """Return the bytes of all encodings of a source."""
    counts = np.bincount(source.buckets, minlength=len(source.bucket_sizes))
    shapes = [encoder.latent_shape(*size) for size in source.bucket_sizes]
    latents = sum(2 * int(count) * math.prod(shape) for count, shape in zip(counts, shapes, strict=True))
    if encoder.alignment is not None:
        shapes = [encoder.alignment.shape(*size) for size in source.bucket_sizes]
        latents += sum(int(count) * math.prod(shape) for count, shape in zip(counts, shapes, strict=True))
    if framing_of(source, "random_flip"):
        latents *= 2
    text_encoder = encoder.text_encoder
    texts = 0 if text_encoder is None else captions.token_ids.size * text_encoder.config.hidden_size
    return (latents + texts) * np.dtype(dtype).itemsize


class StoredSource(Examples):
    """A source of encoded images and captions on disk; what is missing there is encoded first.

    Of each example memory holds a few numbers.

    Args:
        source: a `data.framing.FramedSource`.
        encoder: `encoder.Encoder`.
        captions: `encoder.CaptionIndex` of the source's captions.
        store: `data.encoding_store.EncodingStore`; several runs may share its folder.
        dtype: "float32", "float16" or "bfloat16", in which encodings are kept.
        progress: whether to show progress on standard error.

    Attributes:
        encoded: how many images this process has encoded.

    Raises:
        UserError: an image cannot be read or encoded, or the disk is full; what is written stays.
    """

    def __init__(
        self,
        source: Any,
        encoder: Encoder,
        captions: CaptionIndex,
        store: EncodingStore,
        dtype: str = "float32",
        progress: bool = True,
    ) -> None:
        super().__init__(source, encoder, dtype)
        self._store, self._captions = store, captions
        filling = Filling(source, encoder, captions, store, dtype, progress and not backend.process_index())
        filling.run()
        self.encoded = filling.encoded
        self._latents = store.find(filling.keys).reshape(-1, len(source))
        self._texts = None if filling.text_keys is None else store.find(filling.text_keys)
        self._masks = None if filling.mask_keys is None else store.find(filling.mask_keys)
        self._empty = self._context(0)

    def _example(self, index, is_flipped):
        moments = self._store.read(self._latents[int(is_flipped), index])
        rows = self._captions.rows(index)
        if self._texts is None:
            contexts = self._captions.token_ids[rows].astype("int32")
        else:
            contexts = _StoredContexts(self._store, self._texts[rows])
        mask = None if self._masks is None else self._store.read(self._masks[index])
        return cached_example(moments, contexts, self._empty, mask, is_flipped)

    def _context(self, row):
        if self._texts is None:
            return self._captions.token_ids[row].astype("int32")
        return self._store.read(self._texts[row])


class _StoredContexts(Sequence):
    """The contexts of an example's captions, read one by one, as a draw takes one of them."""

    def __init__(self, store, numbers):
        self._store, self._numbers = store, numbers

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, index):
        return self._store.read(self._numbers[index])


@dataclasses.dataclass(frozen=True)
class Job:
    """What becomes one shard: its keys, and the rows of a source or of its captions."""

    kind: str
    keys: npt.NDArray[np.bytes_]
    rows: npt.NDArray[np.int64]

    def process(self, count: int) -> int:
        """Return which of so many processes encodes it, whatever else is missing."""
        return int.from_bytes(hashlib.sha256(self.keys.tobytes()).digest()[:4], "big") % count

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for another machine."""
        return {"kind": self.kind, "keys": self.keys.tobytes().hex(), "rows": self.rows.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """Return the job of such values."""
        return cls(
            values["kind"],
            np.frombuffer(bytes.fromhex(values["keys"]), "S32"),
            np.array(values["rows"], np.int64),
        )


class ShardEncoder:
    """Encodes jobs, each into a shard of a store.

    Args:
        source, encoder, captions, store, dtype: as in `StoredSource`.
        show: whether to show progress on standard error.

    Attributes:
        encoded: number of images so far.
    """

    def __init__(
        self,
        source: Any,
        encoder: Encoder,
        captions: CaptionIndex,
        store: EncodingStore,
        dtype: str,
        show: bool = False,
    ) -> None:
        self._encoder, self._captions, self._store = encoder, captions, store
        self._dtype, self._show = dtype, show
        self._versions = [source, source.flipped()] if framing_of(source, "random_flip") else [source]
        self._count = len(source)
        self.encoded = 0
        self._vae = encoder.vae_identity()
        self._text_encoder = None if encoder.text_encoder is None else encoder.text_identity()

    def identity(self) -> dict[str, Any]:
        """Return what must be the same on all machines that share the work, as JSON values."""
        fingerprint = fingerprint_of(self._versions[0])
        return {"data set": fingerprint, "VAE": self._vae, "text encoder": self._text_encoder}

    def encode(self, jobs: Sequence[Job]) -> None:
        """Encode jobs, and write their shards.

        Raises:
            UserError: an image cannot be read or encoded, or a shard cannot be written.
        """
        self._encode_images([job for job in jobs if job.kind == "latents"])
        self._encode_captions([job for job in jobs if job.kind == "text"])
        self._write_masks([job for job in jobs if job.kind == "masks"])

    def _encode_images(self, jobs):
        total = sum(len(job.rows) for job in jobs)
        with Progress("encoding images", total, "images", disable=not self._show or not jobs) as bar:
            rows = np.concatenate([np.empty(0, int), *(job.rows for job in jobs)])
            examples = read_ahead(self, rows) if jobs else iter(())
            for job in jobs:
                moments = []
                for part in batched(examples, self._encoder.batch_sizes(len(job.rows))):
                    found = self._encoder.moments(np.stack([example["image"] for example in part]))
                    names = [
                        name_of(example, row)
                        for example, row in zip(part, job.rows[len(moments) :], strict=False)
                    ]
                    check_finite(found, names)
                    moments += list(found)
                    bar.update(len(part))
                self._store.write("latents", self._vae, job.keys, moments, self._dtype)
                self.encoded += len(job.rows)

    def __getitem__(self, row):
        """Return an example for `read_ahead`; a row counts the images, and then the flipped ones."""
        version, index = divmod(row, self._count)
        return self._versions[version][index]

    def _encode_captions(self, jobs):
        total = sum(len(job.rows) for job in jobs)
        hidden = not self._show or not jobs
        with Progress("encoding captions", total, "captions", delay=2.0, disable=hidden) as bar:
            for job in jobs:
                contexts = self._encoder.contexts(self._captions.token_ids[job.rows])
                self._store.write("text", self._text_encoder, job.keys, list(contexts), self._dtype)
                bar.update(len(job.rows))

    def _write_masks(self, jobs):
        total = sum(len(job.rows) for job in jobs)
        hidden = not self._show or not jobs
        with Progress("reading masks", total, "masks", delay=2.0, disable=hidden) as bar:
            rows = np.concatenate([np.empty(0, int), *(job.rows for job in jobs)])
            masks = read_ahead(MaskReading(self._versions[0], self._encoder), rows) if jobs else iter(())
            for job in jobs:
                (arrays,) = batched(masks, [len(job.rows)])
                self._store.write("masks", "", job.keys, arrays)
                bar.update(len(job.rows))


class Filling(ShardEncoder):
    """Encodes what a store lacks of a source; the arguments are those of `ShardEncoder`.

    What is missing is divided into shards bucket by bucket, in the source's order. Encoding takes away whole
    shards of this division, so a killed run goes on with the same ones, and so do other processes.

    Attributes:
        keys: of all images, and then of the flipped ones.
        text_keys: of the distinct captions; None without a text encoder.
        mask_keys: of the masks of images that are not flipped; None without masks.
    """

    def __init__(
        self,
        source: Any,
        encoder: Encoder,
        captions: CaptionIndex,
        store: EncodingStore,
        dtype: str,
        show: bool = False,
    ) -> None:
        super().__init__(source, encoder, captions, store, dtype, show)
        self._buckets = np.tile(source.buckets, len(self._versions))
        contents = source.content_keys()
        frames = (version.frame_key(index) for version in self._versions for index in range(self._count))
        self.keys = keys_of(
            ["latents", self._vae, dtype],
            (f"{content} {frame}" for content, frame in zip(itertools.cycle(contents), frames, strict=False)),
        )
        self.text_keys = None
        if encoder.text_encoder is not None:
            ids = captions.token_ids.astype("<i4")
            self.text_keys = keys_of(
                ["text", self._text_encoder, dtype], (row.tobytes().hex() for row in ids)
            )
        self.mask_keys = None
        if source.has_masks:
            described = enumerate(source.mask_keys())
            self.mask_keys = keys_of(
                ["masks", encoder.vae.config.downsampling],
                (f"{mask} {source.frame_key(index)}" for index, mask in described),
            )

    def run(self) -> None:
        """Encode until nothing is missing. Each process takes its part first, and then what is left."""
        processes, process = backend.process_count(), backend.process_index()
        self.tell(self.jobs())
        part = processes > 1
        while True:
            jobs = self.jobs()
            own = [job for job in jobs if not part or job.process(processes) == process]
            try:
                self.encode(own)
            finally:
                if not process:
                    self._store.save_catalogue()
            # Also waits for the other processes.
            if not backend.any_process(np.array([bool(jobs)])).any() or processes == 1:
                return
            self._store.refresh()
            part = False

    def jobs(self) -> list[Job]:
        """Return what is missing, as the shards that it becomes."""
        jobs = self._divided("latents", self.keys, self._buckets)
        if self.text_keys is not None:
            jobs += self._divided("text", self.text_keys, np.zeros(len(self.text_keys), int))
        if self.mask_keys is not None:
            jobs += self._divided("masks", self.mask_keys, self._buckets[: self._count])
        return jobs

    def _divided(self, kind, keys, groups):
        missing = np.flatnonzero(self._store.find(keys) < 0)
        _, first = np.unique(keys[missing], return_index=True)
        missing = missing[np.sort(first)]
        jobs = []
        for group in np.unique(groups[missing]):
            rows = missing[groups[missing] == group]
            parts = (rows[start : start + SHARD_SIZE] for start in range(0, len(rows), SHARD_SIZE))
            jobs += [Job(kind, keys[part], part) for part in parts]
        return jobs

    def tell(self, jobs: Sequence[Job]) -> None:
        """Print what is there, and warn if the rest does not fit on the disk."""
        store = self._store
        missing = sum(len(job.rows) for job in jobs if job.kind == "latents")
        there = len(self.keys) - missing
        if self._show and there:
            _say(f"encodings: {there} of {len(self.keys)} images are in {store.folder}")
        others = {model: size for model, size in store.models("latents").items() if model != self._vae}
        if self._show and missing == len(self.keys) and others:
            size = sum(others.values()) / 2**20
            _say(
                f"{store.folder}: holds encodings of another VAE or precision ({size:.0f} MiB, which stay); "
                "images are encoded anew"
            )
        if jobs:
            store.check_writable()
        needed = sum(self._bytes(job) for job in jobs)
        free = shutil.disk_usage(store.folder).free
        if needed > free and not backend.process_index():
            warnings.warn(
                f"{store.folder}: {needed / 2**20:,.0f} MiB of encodings are missing and {free / 2**20:,.0f} "
                "MiB are free; choose a folder on another disk, or `cache_dtype='float16'`",
                stacklevel=2,
            )

    def _bytes(self, job):
        encoder = self._encoder
        if job.kind == "masks":
            return 4 * len(job.rows) * math.prod(encoder.latent_shape(*self._size_of(job))[:2])
        if job.kind == "text":
            size = self._captions.token_ids.shape[1] * encoder.text_encoder.config.hidden_size
        else:
            size = 2 * math.prod(encoder.latent_shape(*self._size_of(job)))
        return len(job.rows) * size * np.dtype(self._dtype).itemsize

    def _size_of(self, job):
        source = self._versions[0]
        return source.bucket_sizes[self._buckets[job.rows[0]]]
