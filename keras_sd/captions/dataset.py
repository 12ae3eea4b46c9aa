"""From a folder of pictures to a data set: captions are made, cleaned, and written as `metadata.jsonl`.

What the models said is kept in `.captions` inside the folder, a journal for each shard, so a run that was
killed goes on where it was, and cleaning can be changed without describing a picture again.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import json
import os
import shutil
from pathlib import Path

from PIL import Image

from keras_sd.cache import cache_root
from keras_sd.captions.captioner import Captioner
from keras_sd.captions.cleaning import Cleaner
from keras_sd.captions.interrogator import MODES, Interrogator, check_vocabulary
from keras_sd.captions.journal import Journal, count_lines, read_journal
from keras_sd.captions.keywords import keywords
from keras_sd.captions.ranking import Clip
from keras_sd.captions.vocabulary import Vocabulary, read_phrases
from keras_sd.data.folders import METADATA, image_paths
from keras_sd.data.images import read_picture
from keras_sd.errors import UserError
from keras_sd.files import write_json, write_text

JOURNALS = ".captions"
_SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """How captions are made.

    Attributes:
        mode: one of `interrogator.MODES`.
        clip: as in `ranking.Clip`.
        captioner: as in `captioner.Captioner`, or None.
        vocabulary: file for each of `vocabulary.KINDS` that is wanted; empty, `clip-interrogator`'s own.
        maximum_phrases: most phrases of a caption.
        batch_size: pictures at a time.
        low_memory: has the captioner go over all pictures before CLIP is loaded.
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
    def lists(self):
        """The `Vocabulary`, read when first asked for and checked for the mode.

        Raises:
            UserError: as `Vocabulary.read`, or it has nothing for the mode.
        """
        if self.mode == "caption":
            return Vocabulary()
        vocabulary = Vocabulary.read(**self.vocabulary)
        check_vocabulary(vocabulary, self.mode)
        return vocabulary

    def identity(self):
        """What captions of one data set have in common."""
        identity = {"mode": self.mode, "captioner": self.captioner}
        if self.mode != "caption":
            identity |= {"clip": self.clip, "vocabulary": self.lists.digest()}
            identity |= {"maximum_phrases": self.maximum_phrases}
        return identity


@dataclasses.dataclass(frozen=True)
class CleaningSettings:
    """What is done to captions before they are written; the order and the reasons are `cleaning.Cleaner`'s.

    Attributes:
        artists: names to be removed, or the path of a file of them; None leaves artists in.
        patterns: regular expressions of what is to be removed.
        product_type: such as "whisky"; stands in every caption.
        introductions: JSON lines with `file_name` and `text`, a product's introduction for a picture.
        keywords: how many significant words of it are added.
        maximum_tokens: longest caption in CLIP's tokens, without the marks of begin and end.
    """

    artists: tuple[str, ...] | str | None = None
    patterns: tuple[str, ...] = ()
    product_type: str | None = None
    introductions: str | None = None
    keywords: int = 5
    maximum_tokens: int | None = None

    def prepare(self):
        """What cleans a caption: a function of a picture's name and its caption that gives a `Cleaned`.

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


def _read_introductions(path):
    try:
        lines = [
            json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()
        ]
        return {line["file_name"]: str(line["text"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); "
            'write lines such as {"file_name": "image.png", "text": "..."}, in UTF-8'
        ) from error


@dataclasses.dataclass
class Summary:
    """What came of a run.

    Attributes:
        pictures: how many there are in the folder.
        captions: text by file name, in the order of the names; empty while shards are missing.
        missing: pictures that other shards have not described yet.
        passed_over: fault by file name.
        artists: how often each name was removed.
        cut: phrases left out for the sake of length.
    """

    pictures: int
    captions: dict[str, str]
    missing: int = 0
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    artists: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0


class CaptionedFolder:
    """A folder of pictures and what has been said of them.

    Args:
        folder: the folder, which `metadata.jsonl` and `.captions` are written into.
        settings: a `CaptionSettings`.
        overwrite: begin anew where there are captions of another kind.

    Raises:
        UserError: there is no picture, or there are captions of another model, mode or vocabulary.
    """

    def __init__(self, folder, settings, overwrite=False):
        self.folder, self.settings, self.overwrite = Path(folder), settings, overwrite
        self.outside = {}
        paths = image_paths(self.folder, self._pass_over)
        self.names = [self._name(path) for path in paths]
        self.journals = self.folder / JOURNALS
        self._stale = self._check_settings()

    def _name(self, path):
        return path.relative_to(self.folder).as_posix()

    def _pass_over(self, path, error):
        self.outside[self._name(path)] = str(error)

    def _check_settings(self):
        """Whether there are journals of other settings; refuses without `overwrite`."""
        identity, path = self.settings.identity(), self.journals / _SETTINGS
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            differing = [name for name in identity | found if identity.get(name) != found.get(name)]
            if not differing:
                return False
            fault = f"holds captions of another {', '.join(differing).replace('_', ' ')}"
        elif (self.folder / METADATA).exists():
            fault = f"holds a {METADATA} that was not made here"
        else:
            return False
        if not self.overwrite:
            raise UserError(f"{self.folder}: {fault}; use another folder, or replace them with --overwrite")
        return True

    def begin(self):
        """Makes the folder of journals, empty of those of other settings."""
        if self._stale:
            shutil.rmtree(self.journals, ignore_errors=True)
            self._stale = False
        self.journals.mkdir(exist_ok=True)
        if not (self.journals / _SETTINGS).exists():
            write_json(self.journals / _SETTINGS, self.settings.identity())

    def described(self, kind="captions"):
        """What all shards have said, text by file name, and the fault of what could not be read."""
        texts, faults = {}, {}
        if not self._stale:
            for path in sorted(self.journals.glob(f"{kind}-*.jsonl")):
                for entry in read_journal(path):
                    name = entry["file_name"]
                    (texts if "text" in entry else faults)[name] = entry.get("text", entry.get("fault"))
        return texts, {name: fault for name, fault in faults.items() if name not in texts}

    def lines(self):
        """How many lines the journals of captions have; grows by one for each picture that was looked at."""
        return count_lines(self.journals)

    def missing(self, shard_index=0, num_shards=1, kind="captions"):
        """The names of a shard's pictures that nothing has been said of."""
        if not 0 <= shard_index < num_shards:
            raise UserError(f"shard {shard_index} of {num_shards}: out of range; count shards from 0")
        texts, _ = self.described(kind)
        return [name for name in self.names[shard_index::num_shards] if name not in texts]

    def journal(self, shard_index, num_shards, kind="captions"):
        """The `Journal` of a shard."""
        return Journal(self.journals / f"{kind}-{shard_index}-of-{num_shards}.jsonl")

    def write(self, clean=None, text_files=False):
        """Cleans what has been said and writes `metadata.jsonl`, once every picture was looked at.

        Args:
            clean: what `CleaningSettings.prepare` gives; None writes what the models said.
            text_files: write a `.txt` beside each picture too.

        Returns:
            A `Summary`.
        """
        clean = clean or CleaningSettings().prepare()
        texts, faults = self.described()
        faults |= self.outside
        missing = [name for name in self.names if name not in texts and name not in faults]
        summary = Summary(len(self.names) + len(self.outside), {}, len(missing), dict(sorted(faults.items())))
        if missing:
            return summary
        for name in self.names:
            if name in texts:
                cleaned = clean(name, texts[name])
                summary.artists.update(cleaned.artists)
                summary.cut += cleaned.cut
                if cleaned.text:
                    summary.captions[name] = cleaned.text
                else:
                    summary.passed_over[name] = f"{name}: nothing is left of its caption; clean it less"
        lines = [
            json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in summary.captions.items()
        ]
        write_text(self.folder / METADATA, "".join(f"{line}\n" for line in lines))
        if text_files:
            for name, text in summary.captions.items():
                write_text((self.folder / name).with_suffix(".txt"), text + "\n")
        return summary

    def check_text_files(self):
        """Makes sure that `.txt` files may be written.

        Raises:
            UserError: two pictures would share one, or there is one already that was not made here.
        """
        places = collections.Counter((self.folder / name).with_suffix(".txt") for name in self.names)
        place, count = places.most_common(1)[0]
        if count > 1:
            raise UserError(f"{place}: would be the caption of {count} pictures; rename all but one of them")
        if not self.overwrite and not (self.journals / _SETTINGS).exists():
            found = next((place for place in places if place.exists()), None)
            if found:
                raise UserError(f"{found}: exists; move it away, or replace captions with --overwrite")


def caption_folder(folder, settings=None, cleaning=None, **options):
    """Captions a folder in this process, cleans the captions and writes `metadata.jsonl`.

    Args:
        folder: pictures, those of its sub-folders included, `validation` left out.
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
    """Describes those pictures of a shard that have not been, and writes them to its journal.

    Args:
        captioned: a `CaptionedFolder`.
        shard_index, num_shards: of every `num_shards` pictures the one numbered `shard_index`, from 0.
        device: where torch computes.
        threads: how many it uses on a CPU; None leaves that to torch.
        advance: called with the number of pictures after each batch.
    """
    settings = captioned.settings
    captioned.missing(shard_index, num_shards)  # refuses a wrong shard before a model is loaded
    captioned.begin()
    if threads is not None:
        _limit_threads(threads)
    advance = advance or (lambda _: None)
    sentences = {}
    by_turns = settings.low_memory and settings.captioner is not None and settings.mode != "caption"
    if by_turns:
        with captioned.journal(shard_index, num_shards, "sentences") as journal:
            names = captioned.missing(shard_index, num_shards, "sentences")
            if names:
                captioner = Captioner(settings.captioner, device)
                _describe(captioned, names, journal, lambda images, _: captioner(images), lambda _: None)
                del captioner
        _free()
        sentences, _ = captioned.described("sentences")
    with captioned.journal(shard_index, num_shards) as journal:
        names = captioned.missing(shard_index, num_shards)
        if not names:
            return
        interrogator = _open_interrogator(settings, device, with_captioner=not by_turns)

        def describe(images, names):
            known = [sentences[name] for name in names] if by_turns else None
            return interrogator.describe(images, settings.mode, known)

        _describe(captioned, names, journal, describe, advance)


def _open_interrogator(settings, device, with_captioner):
    captioner = settings.captioner if with_captioner else None
    root = cache_root()
    return Interrogator(
        None if settings.mode == "caption" else Clip(settings.clip, device, root and root / "captions"),
        settings.lists,
        Captioner(captioner, device) if captioner is not None else None,
        settings.maximum_phrases,
    )


def _describe(captioned, names, journal, describe, advance):
    """Reads pictures, one batch ahead, and journals what `describe(images, names)` says of them."""
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
            if os.getppid() != parent:  # whoever started this process was killed
                break


def _read_batch(folder, names):
    images, faults = {}, {}
    for name in names:
        try:
            images[name] = Image.fromarray(read_picture(folder / name))
        except UserError as error:
            faults[name] = str(error)
    return images, faults


def _limit_threads(threads):
    try:
        import torch
    except ModuleNotFoundError:
        return  # said when a model is opened
    torch.set_num_threads(threads)


def _free():
    """Gives memory back that a model had."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
