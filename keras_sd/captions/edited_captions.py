"""Distinguishes captions that people wrote or edited from captions that this package generated.

`.captions/written.json` keeps a digest of every caption that this package wrote. A caption with another
digest, or with none, was written by hand. That holds for captions in `metadata.jsonl`, for the text file
beside an image, and for lines that someone deleted.
"""

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path, PurePosixPath
from typing import NotRequired

from typing_extensions import TypedDict

from keras_sd.data.folders import METADATA
from keras_sd.errors import UserError
from keras_sd.files import json_files
from keras_sd.files.json_files import MIB, parse_json, read_json
from keras_sd.files.writing import utf8, write_json

_LINES, _TEXTS = "metadata", "txt"

_LARGEST_FILE = 256 * MIB  # digests of some millions of images


class _Digests(TypedDict):
    metadata: NotRequired[dict[str, str | None]]
    txt: NotRequired[dict[str, str | None]]


class WrittenFile(_Digests):
    """The shape of `.captions/written.json`."""

    begun: NotRequired[_Digests]


class NamedLine(TypedDict):
    """What every line of `metadata.jsonl` has, whoever wrote it."""

    file_name: str


@dataclasses.dataclass
class ByHand:
    """What people wrote, edited or deleted.

    Attributes:
        captions: caption in `metadata.jsonl` by file name of the image.
        texts: content of the text file, stripped, by file name of the image.
        removed: file names whose line was deleted.
        others: lines about images that are not in the folder, by file name.
    """

    captions: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    removed: set[str] = dataclasses.field(default_factory=set)
    others: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self):
        """File names of the images that need no generated caption."""
        return self.captions.keys() | self.texts.keys() | self.removed


class Written:
    """The digests of the captions that this package wrote.

    Args:
        folder: the folder of images.
        path: the file that keeps the digests.
    """

    def __init__(self, folder, path):
        self.folder, self.path = folder, path
        try:
            found = read_json(path, WrittenFile, default={}, largest=_LARGEST_FILE)
        except UserError as error:
            warnings.warn(f"{error}. All existing captions count as written by hand", stacklevel=2)
            found = {}
        # None stands for a caption that existed and was written by hand.
        self._kept = {kind: found.get(kind, {}) for kind in (_LINES, _TEXTS)}
        # From a run that was killed while it wrote: each of these files may or may not have been written.
        self._begun = found.get("begun", {})

    def by_hand(self, names):
        """Return the `ByHand` of these images.

        Raises:
            UserError: `metadata.jsonl` or a text file cannot be read.
        """
        lines, own = read_lines(self.folder / METADATA), ByHand()
        for name in names:
            if name in lines:
                caption = caption_of(lines[name])
                if caption and not self._is_ours(_LINES, name, caption):
                    own.captions[name] = caption
            elif lines and name in self._kept[_LINES]:
                own.removed.add(name)
            text = read_text_file(text_path(self.folder, name))
            if text and text.strip() and not self._is_ours(_TEXTS, name, text):
                own.texts[name] = text.strip()
        for name in lines.keys() - set(names):
            if not self._is_ours(_LINES, name, caption_of(lines[name])):
                own.others[name] = lines[name]
        return own

    def _is_ours(self, kind, name, content):
        digests = self._kept[kind].get(name), self._begun.get(kind, {}).get(name)
        return _digest(content) in digests

    def begin(self, captions, texts, own):
        """Record what is about to be written.

        Args:
            captions: caption by file name.
            texts: content of the text file by file name.
            own: file names whose caption was written, or whose line was deleted, by hand.
        """
        self._begun = {_LINES: _digests(captions) | dict.fromkeys(own), _TEXTS: _digests(texts)}
        write_json(self.path, {**self._kept, "begun": self._begun}, indent=None)

    def end(self):
        """Record that writing is complete."""
        self._kept = {_LINES: self._begun[_LINES], _TEXTS: self._kept[_TEXTS] | self._begun[_TEXTS]}
        self._begun = {}
        write_json(self.path, self._kept, indent=None)


def read_lines(path):
    """Return the lines of a `metadata.jsonl` by file name; empty if there is no such file.

    Raises:
        UserError: a line names no image, or an image has two lines.
    """
    remedy = "correct it, or replace the captions with `overwrite=True`"
    if not path.exists():
        return {}
    lines = {}
    for number, line in enumerate(json_files.read_lines(path, remedy), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        entry = parse_json(line, place, NamedLine, remedy=remedy, file_names=True)
        name = PurePosixPath(entry["file_name"]).as_posix()
        if name in lines:
            raise UserError(f"{path}, line {number}: second caption for {name!r}; {remedy}")
        lines[name] = line.strip()
    return lines


def text_path(folder, name):
    """Return the text file of an image."""
    return (Path(folder) / name).with_suffix(".txt")


def read_text_file(path):
    """Return the content of a text file, or None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json_files.read_text(path, remedy="save it as UTF-8, or move it away")
    except FileNotFoundError:
        return None


def with_caption(line, caption):
    """Return a line of `metadata.jsonl` with a new caption; its other keys stay."""
    if caption_of(line) == caption:
        return line
    return json.dumps({**json.loads(line), "text": caption}, ensure_ascii=False)


def caption_of(line):
    """Return the caption in a line of `metadata.jsonl`; empty where it has none."""
    text = json.loads(line).get("text")
    return text.strip() if isinstance(text, str) else ""


def _digests(contents):
    return {name: _digest(content) for name, content in contents.items()}


def _digest(content):
    return hashlib.sha256(utf8(content)).hexdigest()[:16]
