"""The options of captioning and of cleaning captions."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from keras_sd.captions.cleaning import Cleaner
from keras_sd.captions.interrogator import MODES, check_vocabulary
from keras_sd.captions.keywords import keywords
from keras_sd.captions.vocabulary import Vocabulary, read_phrases
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json_lines


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """How captions are generated.

    Attributes:
        mode: one of `interrogator.MODES`.
        clip: model name, as `ranking.Clip` takes it.
        captioner: model name, as `captioner.Captioner` takes it, or None.
        vocabulary: path of a file by kind, from `vocabulary.KINDS`; empty for the lists of the package
            `clip-interrogator`.
        maximum_phrases: the largest number of phrases in a caption.
        batch_size: images per batch.
        low_memory: run the captioner over all images first and load CLIP afterwards.
    """

    mode: str = "best"
    clip: str = "ViT-L-14/openai"
    captioner: str | None = "Salesforce/blip-image-captioning-large"
    vocabulary: dict[str, str] = dataclasses.field(default_factory=dict)
    maximum_phrases: int = 32
    batch_size: int = 16
    low_memory: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r}: unknown; use {', '.join(MODES)}")
        if self.mode == "caption" and self.captioner is None:
            raise UserError("mode caption: is the captioner's sentence alone; name a captioner")

    @functools.cached_property
    def lists(self) -> Vocabulary:
        """The `Vocabulary`, read at the first access and checked for the mode.

        Raises:
            UserError: as `Vocabulary.read`, or no list has phrases for the mode.
        """
        if self.mode == "caption":
            return Vocabulary()
        vocabulary = Vocabulary.read(**self.vocabulary)
        check_vocabulary(vocabulary, self.mode)
        return vocabulary

    def identity(self) -> dict[str, Any]:
        """Return the settings that all captions of one data set must share, as a JSON dictionary."""
        identity: dict[str, Any] = {"mode": self.mode, "captioner": self.captioner}
        if self.mode != "caption":
            identity |= {"clip": self.clip, "vocabulary": self.lists.digest()}
            identity |= {"maximum_phrases": self.maximum_phrases}
        return identity


@dataclasses.dataclass(frozen=True)
class CleaningSettings:
    """How captions are cleaned before they are written; see `cleaning.Cleaner` for the order of the steps.

    Attributes:
        artists: names to remove, or the path of a file with one name a line; None keeps artists' names.
        patterns: regular expressions; every match is removed.
        product_type: a word such as "whisky" that every caption must contain.
        introductions: path of a JSON Lines file with `file_name` and `text`, the product's introduction.
        keywords: how many keywords of the introduction are added.
        maximum_tokens: the largest length in CLIP tokens, without the begin and end tokens.
    """

    artists: tuple[str, ...] | str | None = None
    patterns: tuple[str, ...] = ()
    product_type: str | None = None
    introductions: str | None = None
    keywords: int = 5
    maximum_tokens: int | None = None

    def prepare(self) -> Callable[[str, str], Any]:
        """Return the cleaning function: (file name, caption) -> `Cleaned`.

        Raises:
            UserError: a pattern is no regular expression; a file of names or of introductions cannot be read.
        """
        count_tokens = None if self.maximum_tokens is None else _token_count()
        artists = read_phrases(self.artists) if isinstance(self.artists, str) else self.artists
        cleaner = Cleaner(artists, self.patterns, self.product_type, self.maximum_tokens, count_tokens)
        words = {}
        if self.introductions is not None:
            texts = _read_introductions(Path(self.introductions))
            words = dict(zip(texts, keywords(list(texts.values()), self.keywords), strict=True))
        return lambda name, caption: cleaner(caption, words.get(name, ()))


def _token_count():
    from keras_sd.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.clip()
    return lambda text: len(tokenizer.encode([text])[0])


class Introduction(TypedDict):
    """The shape of a line of introductions."""

    file_name: str
    text: str


def _read_introductions(path):
    remedy = 'write lines such as {"file_name": "image.png", "text": "..."}, in UTF-8'
    try:
        lines = [entry for _, entry in read_json_lines(path, Introduction, remedy=remedy, file_names=True)]
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; {remedy}") from error
    return {line["file_name"]: line["text"] for line in lines}
