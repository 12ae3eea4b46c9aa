"""Lists of phrases for captions: artists, media, movements, flavours and negative phrases."""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import warnings
from pathlib import Path

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, read_text

KINDS = ("artists", "mediums", "movements", "flavors", "negative")
"""The kinds of lists, named as the files of the optional package `clip-interrogator`."""

_LARGEST_FILE = 64 * MIB
_SITES = ("Artstation", "behance", "cg society", "deviantart", "dribbble", "flickr", "instagram", "pexels")
_SITES += ("pinterest", "pixabay", "pixiv", "polycount", "reddit", "shutterstock", "tumblr", "unsplash")
_SITES_PHRASES = tuple(
    phrase.format(site) for site in _SITES for phrase in ("{}", "trending on {}", "featured on {}")
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Phrases by kind; each kind is a tuple of distinct strings and may be empty."""

    artists: tuple[str, ...] = ()
    mediums: tuple[str, ...] = ()
    movements: tuple[str, ...] = ()
    flavors: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    @classmethod
    def read(cls, **paths):
        """Read the lists from text files, one phrase a line.

        Args:
            paths: path of a file by kind, from `KINDS`. Without any, all lists of the installed package
                `clip-interrogator` are read.

        Raises:
            UserError: a file is missing, empty or not UTF-8, or no file is given and the package is missing.
        """
        paths = {kind: path for kind, path in paths.items() if path is not None}
        if not paths:
            folder = _installed_folder()
            paths = {kind: folder / f"{kind}.txt" for kind in KINDS}
        return cls(**{kind: read_phrases(path) for kind, path in paths.items()})

    @functools.cached_property
    def styles(self):
        """The phrases for artists: "by ..." and "inspired by ..."."""
        return tuple(f"{word} {artist}" for word in ("by", "inspired by") for artist in self.artists)

    @functools.cached_property
    def sites(self):
        """Phrases for web sites that show images; empty if there are no artists."""
        return _SITES_PHRASES if self.artists else ()

    @functools.cached_property
    def phrases(self):
        """All distinct phrases, except the negative ones."""
        return tuple(
            dict.fromkeys((*self.styles, *self.flavors, *self.mediums, *self.movements, *self.sites))
        )

    def digest(self):
        """Return a digest of the lists, 16 hexadecimal digits."""
        text = "\n".join(f"{kind}\t{phrase}" for kind in KINDS for phrase in getattr(self, kind))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_phrases(path):
    """Return the distinct lines of a text file without blank ones; warn of duplicates.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    path = checked_path("path", path)
    try:
        text = read_text(path, _LARGEST_FILE, "give a text file in UTF-8, a phrase a line")
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; give a text file, a phrase a line") from error
    lines = [line.strip() for line in text.splitlines()]
    phrases = [line for line in lines if line]
    if not phrases:
        raise UserError(f"{path}: empty vocabulary; write one phrase a line into it")
    counts = collections.Counter(phrases)
    distinct = tuple(counts)
    if len(distinct) < len(phrases):
        doubled = next(phrase for phrase, count in counts.items() if count > 1)
        warnings.warn(
            f"{path}: {len(phrases) - len(distinct)} duplicate lines, the first is {doubled!r}; "
            "each counts once",
            stacklevel=2,
        )
    return distinct


def _installed_folder():
    package = importlib.util.find_spec("clip_interrogator")
    folder = Path(package.origin).parent / "data" if package and package.origin else None
    if folder is None or not all((folder / f"{kind}.txt").is_file() for kind in KINDS):
        raise UserError(
            "no vocabulary: give text files by `flavors`, `mediums`, `movements`, `artists`, "
            "or pip install --no-deps clip-interrogator"
        )
    return folder
