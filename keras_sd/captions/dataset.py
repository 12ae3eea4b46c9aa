"""Turns a folder of images into a data set: generates captions, cleans them and writes `metadata.jsonl`.

The uncleaned captions are kept in `.captions` inside the folder, one journal for each shard. So a run that
was killed resumes where it stopped, and the cleaning can be changed without captioning an image again.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from keras_sd.arguments import checked_path
from keras_sd.captions.caption_settings import CaptionSettings, CleaningSettings
from keras_sd.captions.edited_captions import ByHand, Written, read_lines, text_path, with_caption
from keras_sd.captions.journal import Entry, Journal, count_lines, read_journal
from keras_sd.captions.shards import ShardCaptioner
from keras_sd.data.folders import METADATA, image_paths
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.files.writing import utf8, write_json, write_text

JOURNALS = ".captions"
_SETTINGS, _WRITTEN = "settings.json", "written.json"


@dataclasses.dataclass
class Summary:
    """The result of a run.

    Attributes:
        images: number of images in the folder.
        captions: caption by file name, sorted by name; empty while shards are missing.
        missing: number of images that other shards have not captioned yet.
        passed_over: the fault by file name, for images without a caption.
        artists: how often each name was removed.
        cut: number of phrases that the length limit cut.
        kept: number of captions written or edited by hand; they stay.
        removed: number of images whose line was deleted by hand; they stay without a caption.
    """

    images: int
    captions: dict[str, str]
    missing: int = 0
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    artists: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0
    kept: int = 0
    removed: int = 0


class CaptionedFolder:
    """A folder of images and their captions.

    Args:
        folder: the folder; `metadata.jsonl` and `.captions` are written into it.
        settings: a `CaptionSettings`.
        overwrite: start again where the captions have other settings, and replace captions that people wrote
            or edited.

    Raises:
        UserError: there is no image, or existing captions have another model, mode or vocabulary.
    """

    def __init__(self, folder, settings, overwrite=False):
        self.folder, self.settings, self.overwrite = checked_path("folder", folder), settings, overwrite
        self.outside = {}
        paths = image_paths(self.folder, self._pass_over)
        self.names = [self._name(path) for path in paths]
        self.journals = self.folder / JOURNALS
        self._stale = self._check_settings()
        self.by_hand = self._find_by_hand()

    def _name(self, path):
        return path.relative_to(self.folder).as_posix()

    def _pass_over(self, path, error):
        self.outside[self._name(path)] = str(error)

    def _check_settings(self):
        """Return whether the journals have other settings; without `overwrite` that is a UserError."""
        identity, path = self.settings.identity(), self.journals / _SETTINGS
        if path.is_file():
            try:
                found = read_json(path)
            except UserError:
                found = {}
            differing = [name for name in identity | found if identity.get(name) != found.get(name)]
            if not differing:
                return False
            if self.overwrite or not self._has_texts():
                return True
            kind = ", ".join(differing).replace("_", " ")
            raise UserError(
                f"{self.folder}: holds captions of another {kind}; "
                "use another folder, or replace them with `overwrite=True`"
            )
        return False

    def _has_texts(self):
        """Return whether any journal holds a caption; without one, nothing would be lost."""
        return any(
            "text" in entry for path in self.journals.glob("*.jsonl") for entry in read_journal(path, Entry)
        )

    def _find_by_hand(self):
        if self.overwrite:
            return ByHand()
        return Written(self.folder, self.journals / _WRITTEN).by_hand(self.names)

    def begin(self):
        """Create the folder of journals, and delete journals of other settings."""
        if self._stale:
            for path in self.journals.glob("*.jsonl"):
                with Journal(path):  # a UserError if another run has it open
                    path.unlink()
            (self.journals / _SETTINGS).unlink(missing_ok=True)
            self._stale = False
        self.journals.mkdir(exist_ok=True)
        if not (self.journals / _SETTINGS).exists():
            write_json(self.journals / _SETTINGS, self.settings.identity())

    def described(self, kind="captions"):
        """Return the captions of all shards and the faults of unreadable images, both by file name."""
        texts, faults = {}, {}
        if not self._stale:
            for path in sorted(self.journals.glob(f"{kind}-*.jsonl")):
                for entry in read_journal(path, Entry):
                    name = entry["file_name"]
                    (texts if "text" in entry else faults)[name] = entry.get(
                        "text", entry.get("fault", "damaged")
                    )
        return texts, {name: fault for name, fault in faults.items() if name not in texts}

    def lines(self):
        """Return the number of lines in the journals of captions: one for each image processed so far."""
        return count_lines(self.journals)

    def missing(self, shard_index=0, num_shards=1, kind="captions"):
        """Return the names of a shard's images that have no caption yet, neither generated nor by hand."""
        if not 0 <= shard_index < num_shards:
            raise UserError(f"shard {shard_index} of {num_shards}: out of range; count shards from 0")
        texts, _ = self.described(kind)
        known = texts.keys() | self.by_hand.names
        return [name for name in self.names[shard_index::num_shards] if name not in known]

    def journal(self, shard_index, num_shards, kind="captions"):
        """Return the `Journal` of a shard."""
        return Journal(self.journals / f"{kind}-{shard_index}-of-{num_shards}.jsonl")

    def write(self, clean=None, text_files=False):
        """Clean the captions and write `metadata.jsonl`, once every image was processed.

        Lines and text files that people wrote or edited stay, and lines that they deleted stay deleted. If
        only the text file of an image was edited, its content becomes the caption in `metadata.jsonl`.

        Args:
            clean: the function from `CleaningSettings.prepare`; None cleans nothing.
            text_files: write a `.txt` beside each image too.

        Returns:
            A `Summary`.
        """
        clean = clean or CleaningSettings().prepare()
        texts, faults = self.described()
        faults |= self.outside
        own = self.by_hand = self._find_by_hand()  # again: people may have edited captions meanwhile
        known = texts.keys() | faults.keys() | own.names
        missing = [name for name in self.names if name not in known]
        faults = {name: fault for name, fault in sorted(faults.items()) if name not in own.names}
        summary = Summary(len(self.names) + len(self.outside), {}, len(missing), faults)
        if missing:
            return summary
        cleaned = {name: clean(name, texts[name]) for name in self.names if name in texts}
        for name in self.names:
            caption = self._caption(name, cleaned.get(name), summary)
            if caption:
                summary.captions[name] = caption
        self._write(summary.captions, {name: one.text for name, one in cleaned.items()}, text_files)
        return summary

    def _caption(self, name, cleaned, summary):
        """Return the caption of an image, or None, and count it in the summary."""
        own = self.by_hand
        if name in own.removed:
            summary.removed += 1
            return None
        theirs = own.captions.get(name) or own.texts.get(name)
        if theirs and (cleaned is None or theirs != cleaned.text):
            summary.kept += 1
            return theirs
        if cleaned is None:
            return None
        summary.artists.update(cleaned.artists)
        summary.cut += cleaned.cut
        if not cleaned.text:
            summary.passed_over[name] = f"{name}: nothing is left of its caption; clean it less"
        return cleaned.text

    def _write(self, captions, said, text_files):
        """Write `metadata.jsonl`, and those text files that nobody wrote or edited by hand.

        Args:
            captions: caption by file name.
            said: cleaned caption of the models by file name.
        """
        own, lines = self.by_hand, self._lines()
        content = [
            with_caption(lines.get(name, json.dumps({"file_name": name}, ensure_ascii=False)), caption)
            for name, caption in captions.items()
        ]
        content = "".join(f"{line}\n" for line in [*content, *own.others.values()])
        kept = {name for name, caption in own.captions.items() if caption != said.get(name)}
        names = [name for name in captions if text_files and own.texts.get(name) in (None, said.get(name))]
        texts = {name: f"{captions[name]}\n" for name in names}
        written = Written(self.folder, self.journals / _WRITTEN)
        ours = {name: caption for name, caption in captions.items() if name not in kept}
        written.begin(ours, texts, own.removed | kept)
        places = {self.folder / METADATA: content}
        places |= {text_path(self.folder, name): text for name, text in texts.items()}
        for place, text in places.items():
            if not place.exists() or place.read_bytes() != utf8(text):
                write_text(place, text)
        written.end()

    def _lines(self):
        """Return the existing lines; the lines of a damaged file are lost, but only with `overwrite`."""
        try:
            return read_lines(self.folder / METADATA)
        except UserError:
            if not self.overwrite:
                raise
            return {}

    def check_text_files(self):
        """Make sure that no two images would share a text file.

        Raises:
            UserError: two would.
        """
        places = collections.Counter(text_path(self.folder, name) for name in self.names)
        place, count = places.most_common(1)[0]
        if count > 1:
            raise UserError(f"{place}: would be the caption of {count} images; rename all but one of them")


def caption_folder(
    folder: str | Path,
    settings: CaptionSettings | None = None,
    cleaning: CleaningSettings | None = None,
    **options: Any,
) -> Summary:
    """Caption a folder in this process, cleans the captions and write `metadata.jsonl`.

    Args:
        folder: the images, those in sub-folders included, except `validation`.
        settings: a `CaptionSettings`.
        cleaning: a `CleaningSettings`.
        options: `overwrite` of `CaptionedFolder`, and those of `caption_shard`.

    Returns:
        A `Summary`.

    Raises:
        UserError: something is wrong with the folder, a model or a vocabulary.
    """
    clean = (cleaning or CleaningSettings()).prepare()
    captioned = CaptionedFolder(folder, settings or CaptionSettings(), options.pop("overwrite", False))
    caption_shard(captioned, **options)
    return captioned.write(clean)


def caption_shard(captioned, shard_index=0, num_shards=1, device="cpu", threads=None, advance=None):
    """Caption the remaining images of a shard and append the captions to its journal.

    Args:
        captioned: a `CaptionedFolder`.
        shard_index, num_shards: of every `num_shards` images the one numbered `shard_index`, from 0.
        device: torch device.
        threads: CPU threads of torch; None for torch's default.
        advance: called with the number of images after each batch.
    """
    captioned.missing(shard_index, num_shards)  # a UserError for a wrong shard, before a model is loaded
    captioned.begin()
    captioner = ShardCaptioner(captioned, device, threads)
    captioner.caption(
        shard_index, num_shards, lambda kind: captioned.missing(shard_index, num_shards, kind), advance
    )
