"""Cleaning of captions: remove artists' names and other patterns, add product words, limit the length."""

import dataclasses
import re
import unicodedata

from keras_sd.errors import UserError

# Marks where something was removed, so that only the phrases around it are repaired.
_GAP = "\0"

_WORD = re.compile(r"[^\W_]+")
# Characters that may stand between the words of any name; commas and the like only in some: "Art & Language".
_INSIDE_NAMES = frozenset(" \t\n.-'’´`")
_INSIDE_SOME_NAMES = _INSIDE_NAMES | frozenset(',&"/')

# One-word names that are also ordinary words: they count as names only next to a word such as "by".
_ORDINARY_NAMES = frozenset(
    "art artist banks bauhaus bell berry bird black blue bloom bond book bridge brook brown bush "
    "carpenter chance constant church cross day dean diamond dove field fish flowers forest fox "
    "frank frost garden gold grant gray green grey hall hand hart hill hope hunt hunter june king "
    "knight lamb lane light long love mark marsh may miles moon mountain night ocean page park "
    "parrish penny pepper pike pool potter price rain reed rich rivers robin rock rose sands sea "
    "shell silver singer smith snow star steel stone storm street summer sun swan violet walker wall "
    "ward waters weaver west white will winter wolf wood woods young".split()
)

_MAKERS = r"(?:artists?|painters?|illustrators?|photographers?|designers?|sculptors?|directors?)"
_MADE = (
    r"(?:inspired|influenced|painted|drawn|illustrated|created|made|designed|directed|photographed|sculpted|"
    r"rendered|filmed|sketched|etched)"
)
_BY = rf"(?:(?:(?:heavily|strongly)\s+)?{_MADE}\s+)?by\s+(?:the\s+)?(?:(?:famous|great)\s+)?(?:{_MAKERS}\s+)?"
_LIKE = r"(?:in\s+|after\s+)?(?:the\s+|a\s+)?(?:style|styles|manner|spirit|vein)\s+of\s+(?:the\s+)?"
_BEFORE = re.compile(rf"(?:\b(?:{_BY}|{_LIKE})|[àa]\s+la\s+)$")
_IN = re.compile(r"\bin\s+(?:the\s+|a\s+)?$")
_AFTER = re.compile(r"(?:['’]s?)?(?P<style>[\s\-]*(?:inspired|esque|like|styles?|styled|stylized)\b)?")
_BETWEEN = re.compile(r"\.?\s*(?:,\s*(?:and\s+|&\s*|or\s+)?|\s(?:and|or|with|x)\s|&|/|\+)\s*(?:by\s+)?")

# "by" and capitalised words up to the end of a phrase: a name that is in no list.
_CAPITAL = r"(?-i:[A-ZÀ-ÖØ-Þ][\w.\-'’]*)"
_NAME = rf"{_CAPITAL}(?:\s+(?:(?:van|von|der|den|de|da|di|du|la|le|el|al)\s+)*{_CAPITAL}){{0,3}}"
_DRAWN = r"(?<!inspired )(?<!influenced )\b(?:(?:painted|drawn|illustrated|photographed|sculpted)\s+)?"
_UNKNOWN = re.compile(rf"{_DRAWN}by\s+({_NAME}(?:\s*(?:&|\band)\s+{_NAME})*)\s*(?=,|$)")
_UNKNOWN_NEXT = re.compile(rf"\s*(?:,\s*)?(?:\band|&)\s+({_NAME})\s*(?=,|$)")
_NO_NAMES = frozenset(
    "hand hands night day me moonlight candlelight sunlight firelight starlight lamplight sea god nature ai "
    "machine machines ocean heart light train car boat sunset sunrise itself himself herself".split()
)
_PLACES = frozenset("lake river mount sea st saint bay cape port fort the".split())

# Words to drop at either end of a phrase, or as a whole phrase, once the name is removed.
_DANGLING = (
    r"(?:by|and|or|&|with|in|of|the|from|after|à la|a la|inspired by|influenced by|in the style of|style of)"
)
_DANGLING_START = re.compile(rf"^(?:{_DANGLING}\s*\0\s*|\0\s*(?:and|or|&|by)\s+)+", re.IGNORECASE)
_DANGLING_END = re.compile(rf"(?:\s*\b{_DANGLING})+\s*\0\s*$", re.IGNORECASE)
_LEFT_OVER = re.compile(
    r"(?:(?:digital |concept )?art|artworks?|works?|style|inspired|a|an|the)?", re.IGNORECASE
)


class ArtistRemover:
    """Removes artists' names from captions, together with the words that introduce them.

    Known names are removed everywhere, in upper or lower case, with or without accents, full stops and
    hyphens: after "by", "inspired by" or "in the style of", before "style", as a phrase of their own and
    inside a sentence. An unknown name is removed where "by" and capitalised words end a phrase. A name that
    is also an ordinary word ("Rose") is removed only after such words or as a capitalised phrase of its own.

    Args:
        artists: names, such as the lines of a vocabulary file.
    """

    def __init__(self, artists=()):
        names = {name: _words(name) for name in artists}
        self._names = {"".join(words): frozenset(name) for name, words in names.items() if words}
        self._longest = max(map(len, names.values()), default=0) + 2

    def __call__(self, caption):
        """Return the caption without names, and the names as they were written in it."""
        folded, places = _folded(caption)
        spans, names = [], []
        for start, end, found in self._groups(folded, caption, places):
            spans.append((start, end))
            names.extend(found)
        text = _without(caption, spans)
        text, unknown = _without_unknown(text)
        names.extend(unknown)
        return (mended(text) if names else caption), names

    def _groups(self, folded, caption, places):
        """Yield (start, end, names) of runs of names in the caption, with the words around them."""
        occurrences = self._occurrences(folded, caption, places)
        index = 0
        while index < len(occurrences):
            start, end = occurrences[index]
            names = [caption[places[start] : places[end]]]
            before = _BEFORE.search(folded, 0, start)
            while index + 1 < len(occurrences) and _BETWEEN.fullmatch(folded, end, occurrences[index + 1][0]):
                index += 1
                names.append(caption[places[occurrences[index][0]] : places[occurrences[index][1]]])
                end = occurrences[index][1]
            after = _AFTER.match(folded, end)
            if before is None and after["style"]:
                before = _IN.search(folded, 0, start)
            if before is not None:
                start = before.start()
            begin, stop = places[start], places[after.end()]
            following = _UNKNOWN_NEXT.match(caption, stop) if before is not None else None
            if following:
                names.append(following[1])
                stop = following.end()
            yield begin, stop, names
            index += 1

    def _occurrences(self, folded, caption, places):
        """Return the (start, end) of known names in the folded caption, the longest name at each place."""
        words = list(_WORD.finditer(folded))
        found, index = [], 0
        while index < len(words):
            count = self._name_at(folded, words, index)
            if count == 1 and not self._is_name(folded, caption, places, words[index]):
                count = 0
            if count:
                found.append((words[index].start(), words[index + count - 1].end()))
            index += max(count, 1)
        return found

    def _name_at(self, folded, words, index):
        """Return the number of words of the longest name that starts at this word; 0 if none does."""
        key, best, between = "", 0, frozenset()
        for count, word in enumerate(words[index : index + self._longest], start=1):
            if count > 1:
                between |= frozenset(folded[words[index + count - 2].end() : word.start()])
                if not between <= _INSIDE_SOME_NAMES:
                    break
            key += word[0]
            if key in self._names and between <= _INSIDE_NAMES | self._names[key]:
                best = count
        return best

    @staticmethod
    def _is_name(folded, caption, places, word):
        """Return whether a single word that matches a name is used as a name here."""
        if word[0] not in _ORDINARY_NAMES:
            return True
        if _BEFORE.search(folded, 0, word.start()) or _AFTER.match(folded, word.end())["style"]:
            return True
        alone = not folded[: word.start()].rpartition(",")[2].strip()
        alone &= not folded[word.end() :].partition(",")[0].strip()
        return alone and caption[places[word.start()]].isupper()


def _words(name):
    return _WORD.findall(_folded(name)[0])


def _folded(text):
    """Return the text in lower case without accents, and the index in the text of each of its characters.

    The list of indices has one more entry for the end of the text.
    """
    characters, places = [], []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).lower():
            if not unicodedata.combining(part):
                characters.append(part)
                places.append(place)
    return "".join(characters), [*places, len(text)]


def _without(text, spans):
    for start, end in reversed(spans):
        text = text[:start] + _GAP + text[end:]
    return text


def _without_unknown(text):
    spans, names = [], []
    for match in _UNKNOWN.finditer(text):
        words = match[1].split()
        if words[0].lower() in _PLACES or (len(words) == 1 and words[0].lower() in _NO_NAMES):
            continue
        spans.append(match.span())
        names.append(match[1])
    return _without(text, spans), names


def mended(text):
    """Repair the phrases of a caption from which something was removed; other phrases stay as they are."""
    phrases = []
    for phrase in text.split(","):
        if _GAP in phrase:
            phrase = re.sub(rf"\(\s*(?:{_GAP}\s*)+(?::[\d.]+)?\)", _GAP, phrase).strip()
            phrase = _DANGLING_START.sub(_GAP, phrase)
            phrase = _DANGLING_END.sub("", phrase)
            phrase = " ".join(phrase.replace(_GAP, " ").split()).lstrip(" .;")
            if _LEFT_OVER.fullmatch(phrase):
                continue
            phrase = " " + phrase
        elif not phrase.strip():
            continue
        phrases.append(phrase)
    return ",".join(phrases).strip()


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """A cleaned caption, the artists' names removed from it, and how many phrases the length limit cut."""

    text: str
    artists: tuple[str, ...] = ()
    cut: int = 0


class Cleaner:
    """Cleans captions in four steps.

    1. Remove artists' names. This comes first, as the user's patterns might remove words such as "by".
    2. Remove what the user's patterns match.
    3. Add the product type and the keywords, after the removals, so that they are not removed again.
    4. Shorten to the limit: first drop CLIP's phrases from the end, where they fit least, then the keywords,
       then words at the end of the sentence. The product type always stays.

    Args:
        artists: names to remove; None keeps artists' names.
        patterns: regular expressions.
        product_type: put before a caption that does not contain it.
        maximum_tokens: the length limit, in the unit of `count_tokens(text)`.

    Raises:
        UserError: a pattern is no regular expression.
    """

    def __init__(self, artists=None, patterns=(), product_type=None, maximum_tokens=None, count_tokens=None):
        self._remove_artists = None if artists is None else ArtistRemover(artists)
        self._patterns = [_compiled(pattern) for pattern in patterns]
        self._product_type = product_type
        self._maximum_tokens, self._count_tokens = maximum_tokens, count_tokens

    def __call__(self, caption, keywords=()):
        """Return the caption as `Cleaned`, with those keywords that it does not contain yet."""
        artists = []
        if self._remove_artists is not None:
            caption, artists = self._remove_artists(caption)
        for pattern in self._patterns:
            without = pattern.sub(_GAP, caption)
            caption = mended(without) if without != caption else caption
        if not caption:
            return Cleaned("", tuple(artists))
        product = self._product_type
        head = [product] if product and not _says(caption, product) else []
        tail = [word for word in dict.fromkeys(keywords) if not _says(f"{product or ''} {caption}", word)]
        text, cut = ", ".join([*head, caption, *tail]), 0
        if self._maximum_tokens is not None and self._count_tokens(text) > self._maximum_tokens:
            text, cut = self._shortened(head, [phrase.strip() for phrase in caption.split(",")], tail)
        return Cleaned(text, tuple(artists), cut)

    def _shortened(self, head, phrases, tail):
        before = len(phrases) + len(tail)

        def text():
            return ", ".join([*head, *phrases, *tail])

        while self._count_tokens(text()) > self._maximum_tokens and (len(phrases) > 1 or tail):
            (phrases if len(phrases) > 1 else tail).pop()
        cut = before - len(phrases) - len(tail)
        words = phrases[0].split()
        while len(words) > 1 and self._count_tokens(text()) > self._maximum_tokens:
            words.pop()
            phrases[0] = " ".join(words)
        return text(), cut


def _compiled(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern {pattern!r}: no regular expression ({error}); correct it") from error


def _says(caption, words):
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE) is not None
