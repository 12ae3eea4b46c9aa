"""Captions the images of one shard of a folder after another."""

import concurrent.futures
import gc
import os
from typing import Any

from PIL import Image

from keras_sd.captions.captioner import Captioner
from keras_sd.captions.interrogator import Interrogator
from keras_sd.captions.journal import Entry, read_journal
from keras_sd.captions.ranking import Clip
from keras_sd.data.images import read_image
from keras_sd.errors import UserError
from keras_sd.files.cache import private_folder

_SMALLEST_SIDE = 1024  # larger images are shrunk to this; the models see 224 to 384 pixels


class ShardCaptioner:
    """Captions one shard of a folder after another, with models that stay open.

    Args:
        captioned: a `dataset.CaptionedFolder` that has begun.
        device, threads: as in `caption_shard`.
    """

    def __init__(self, captioned: Any, device: str = "cpu", threads: int | None = None) -> None:
        self.captioned, self._device = captioned, device
        self._interrogator: Interrogator | None = None
        settings = captioned.settings
        self._by_turns = settings.low_memory and settings.captioner is not None and settings.mode != "caption"
        if threads is not None:
            _limit_threads(threads)

    def caption(self, shard_index, num_shards, missing, advance=None):
        """Append captions to the journal of a shard.

        Args:
            missing: returns the names of the images to caption, by the kind of journal; called once that
                journal is open.
            advance: called with the number of images after each batch.
        """
        captioned, mode = self.captioned, self.captioned.settings.mode
        sentences = self._sentences(shard_index, num_shards, missing) if self._by_turns else {}

        def describe(images, names):
            known = [sentences[name] for name in names] if self._by_turns else None
            return self._interrogator.describe(images, mode, known)

        with captioned.journal(shard_index, num_shards) as journal:
            names = missing("captions")
            if not names:
                return
            if self._interrogator is None:
                self._interrogator = _open_interrogator(captioned.settings, self._device, not self._by_turns)
            _describe(captioned, names, journal, describe, advance or (lambda _: None))

    def caption_part(self, names: list[str], index: int, count: int) -> None:
        """Caption images of a folder that has been divided otherwise than by `CaptionedFolder.missing`.

        Args:
            names: of images without a caption; those in the journal of the part have been captioned since.
            index, count: number of the part, from 0, and of the parts.
        """

        def missing(kind):
            entries = read_journal(self.captioned.journal(index, count, kind).path, Entry)
            known = {entry["file_name"] for entry in entries if "text" in entry}
            return [name for name in names if name not in known]

        self.caption(index, count, missing)

    def _sentences(self, shard_index, num_shards, missing):
        """Return the captioner's sentences by file name, before CLIP is in memory."""
        captioned = self.captioned
        with captioned.journal(shard_index, num_shards, "sentences") as journal:
            names = missing("sentences")
            if names:
                self._interrogator = None
                _free()
                captioner = Captioner(captioned.settings.captioner, self._device)
                _describe(captioned, names, journal, lambda images, _: captioner(images), lambda _: None)
                del captioner
        _free()
        return captioned.described("sentences")[0]


def _open_interrogator(settings, device, with_captioner):
    captioner = settings.captioner if with_captioner else None
    return Interrogator(
        None if settings.mode == "caption" else Clip(settings.clip, device, private_folder("captions")),
        settings.lists,
        Captioner(captioner, device) if captioner is not None else None,
        settings.maximum_phrases,
    )


def _describe(captioned, names, journal, describe, advance):
    """Read images, one batch ahead, and append the captions of `describe(images, names)` to the journal."""
    parent, size = os.getppid(), captioned.settings.batch_size
    batches = [names[start : start + size] for start in range(0, len(names), size)]
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        loaded = ahead.submit(_read_batch, captioned.folder, batches[0]) if batches else None
        for number, batch in enumerate(batches, start=1):
            images, faults = loaded.result()
            if number < len(batches):
                loaded = ahead.submit(_read_batch, captioned.folder, batches[number])
            texts = describe(list(images.values()), list(images)) if images else []
            entries = [{"file_name": n, "text": t} for n, t in zip(images, texts, strict=True)]
            journal.append(entries + [{"file_name": n, "fault": fault} for n, fault in faults.items()])
            advance(len(batch))
            if os.getppid() != parent:  # the parent process was killed
                break


def _read_batch(folder, names):
    images, faults = {}, {}
    for name in names:
        try:
            images[name] = Image.fromarray(read_image(folder / name, smallest_side=_SMALLEST_SIDE))
        except UserError as error:
            faults[name] = str(error)
    return images, faults


def _limit_threads(threads):
    try:
        import torch
    except ModuleNotFoundError:
        return  # the UserError comes when a model is opened
    torch.set_num_threads(threads)


def _free():
    """Free the memory of a deleted model."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
