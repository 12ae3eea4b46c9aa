"""The prompt language of AUTOMATIC1111's web interface: weights, BREAK, texts of any length.

`(word)` counts 1.1 times, `[word]` 1.1 times less, `(word:1.3)` 1.3 times; brackets nest and multiply, and
a backslash before one makes it a letter. A text longer than the text encoder takes is encoded in chunks,
and `BREAK` begins a new one. Nothing is dropped: what a model cannot take is named in a warning.

Texts of several lengths are made equally long by repeating their chunks to the least common multiple: 2 and
3 give 6. Attention to two equal things is what it was to one, since a softmax shares it out among all that
there is. Empty chunks, which the web interface fills up with, would take a share of it, and so make an image
depend on the other prompts of its batch.

As the web interface does, weighing restores the mean of a chunk's encoding. Where that mean is next to
nothing beside the numbers themselves (the bundled `emoji` model: 0.2 %), a quotient of two of them says
nothing, and the norm is restored instead.

Where the web interface errs, this does not: a lone backslash stays, a BREAK within brackets is one, and a
weight that is no number (`(a:1.2.3)`) is text.
"""

import math
import re
import warnings
from typing import NamedTuple

import numpy as np

from keras_sd.arguments import shown, whole_number
from keras_sd.errors import UserError

BRACKET_WEIGHT = 1.1

# Beyond it nothing is left of the other words, and of single precision soon neither.
LARGEST_WEIGHT = 1000.0

# The least mean of an encoding, as a share of its norm (root mean square), that is worth restoring. That of
# Stable Diffusion's text encoders is about a tenth, of `emoji`'s at most 0.005.
SMALLEST_MEAN = 0.02

# What prompts of several lengths are repeated to, at most.
MOST_CHUNKS = 240

# A phrase is not cut if the comma before it is among so many last tokens of a full chunk.
COMMA_REACH = 20

# What a warning quotes of a prompt, in characters.
_LONGEST_QUOTE = 60

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_SYNTAX = re.compile(
    rf"""
    \\(?P<escaped>[()\[\]\\])
    | (?P<open>[(\[])
    | :\s*(?P<weight>{_NUMBER})\s*\)
    | (?P<close>[)\]])
    | \b(?P<chunk>BREAK)\b
    | (?P<text>[^\\()\[\]:B]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPENING = {")": "(", "]": "["}
_FACTORS = {"(": BRACKET_WEIGHT, "[": 1 / BRACKET_WEIGHT}
_EXTRA_NETWORK = re.compile(r"<\w+:[^<>]*>")
_LORA = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>")
_SCHEDULE = re.compile(rf"\\.|(?P<open>\[)|(?P<or>\|)|(?P<when>:\s*{_NUMBER}\s*\])|(?P<close>\])", re.DOTALL)


class Fragment(NamedTuple):
    """A piece of a prompt of one weight; a text of None is a BREAK, whose weight means nothing."""

    text: str | None
    weight: float


class Chunks(NamedTuple):
    """Tokens of prompts: `ids` int32 and `weights` float32, both `(n, chunks, max_length)`."""

    ids: np.ndarray
    weights: np.ndarray


def parse_prompt(text):
    """Splits a prompt into a list of `Fragment`s, texts of one weight joined.

    Brackets that are never closed weigh all that follows, ones that were never opened are letters.
    Round and square brackets are matched each on their own, so they may overlap.
    """
    texts, opened, closed = [], {"(": [], "[": []}, {"(": [], "[": []}

    for match in _SYNTAX.finditer(text):
        kind = match.lastgroup
        if kind == "open":
            opened[match["open"]].append(len(texts))
        elif kind == "weight" and opened["("]:
            closed["("].append((opened["("].pop(), len(texts), float(match["weight"])))
        elif kind == "close" and opened[_OPENING[match["close"]]]:
            bracket = _OPENING[match["close"]]
            closed[bracket].append((opened[bracket].pop(), len(texts), _FACTORS[bracket]))
        else:
            texts.append(None if kind == "chunk" else match["escaped"] or match[0])
    weights = [1.0] * len(texts)
    for bracket, starts in opened.items():
        never_closed = [(start, len(texts), _FACTORS[bracket]) for start in starts]
        _multiply(weights, closed[bracket] + never_closed)
    return _merged(map(Fragment, texts, weights))


def _multiply(weights, spans):
    """Multiplies weights by the factor of each span `(start, end, factor)`, of which none overlap in part.

    In one pass, as a prompt may be nothing but brackets in each other.
    """
    spans = sorted(spans, key=lambda span: (-span[0], span[1]))  # the next one is the last
    around = [(len(weights), 1.0)]  # the ends of the spans at a place, and the product of their factors
    for index in range(len(weights)):
        while around[-1][0] <= index:
            around.pop()
        while spans and spans[-1][0] == index:
            _, end, factor = spans.pop()
            if end > index:
                around.append((end, around[-1][1] * factor))
        weights[index] *= around[-1][1]


def _merged(fragments):
    """Joins neighbours of one weight, so that words are not cut where syntax was only looked for."""
    merged = []
    for fragment in fragments:
        if merged and None not in (merged[-1].text, fragment.text) and merged[-1].weight == fragment.weight:
            fragment = Fragment(merged.pop().text + fragment.text, fragment.weight)
        merged.append(fragment)
    return merged


def take_loras(prompt, is_known):
    """Takes the tags `<lora:name:weight>` of LoRAs out of a prompt; a tag without a weight means 1.

    Args:
        prompt: a text.
        is_known: called with a name; whether there is such a LoRA. Other tags stay, to be warned of.

    Returns:
        The prompt without these tags, and name -> weight.

    Raises:
        UserError: a weight is no number.
    """
    weights = {}

    def take(tag):
        name, weight = tag[1], tag[2]
        if not is_known(name):
            return tag[0]
        if weight is not None and not re.fullmatch(_NUMBER, weight.strip()):
            raise UserError(f"prompt: {tag[0]} has no number as its weight; write <lora:{name}:0.8>")
        weights[name] = weights.get(name, 0.0) + (1.0 if weight is None else float(weight))
        return ""

    return _LORA.sub(take, prompt), weights


def chunk_prompts(tokenizer, prompts, chunks=None):
    """Turns prompts into chunks of tokens with a weight for each.

    Args:
        tokenizer: `keras_sd.models.tokenizer.Tokenizer`; a chunk is as long as its sequences.
        prompts: a list of texts.
        chunks: how many each gets, a multiple of what each needs; by default the least common one. The chunks
            of a prompt that needs fewer are repeated.

    Returns:
        `Chunks`.

    Raises:
        UserError: a prompt is no text, `chunks` is no multiple of what it needs, or the least common one is
            larger than `MOST_CHUNKS` and than what any of them needs.
    """
    rows = []
    for prompt in prompts:  # no comprehension: before Python 3.12 it is a frame that warnings count
        rows.append(_token_chunks(tokenizer, prompt))
    if chunks is None:
        chunks = math.lcm(*map(len, rows))
        if chunks > max([MOST_CHUNKS, *map(len, rows)]):
            raise UserError(
                f"prompts: of lengths whose least common multiple is {chunks} chunks of tokens; encode those "
                "of each length in a call of its own"
            )
    most = max([MOST_CHUNKS, *map(len, rows)])
    chunks = whole_number("chunks", chunks, 1, most)
    for row in rows:
        if chunks % len(row):
            raise UserError(
                f"prompt: needs {len(row)} chunks of tokens where {chunks} are given; give a multiple, or "
                "shorten it"
            )
    shape = (len(rows), chunks, tokenizer.max_length)
    ids, weights = np.full(shape, tokenizer.pad_token_id, "int32"), np.ones(shape, "float32")
    ids[:, :, 0] = tokenizer.begin_token_id
    for row in range(len(rows)):
        for index in range(chunks):
            tokens = rows[row][index % len(rows[row])]
            for place, (token, weight) in enumerate(tokens, start=1):
                ids[row, index, place], weights[row, index, place] = token, weight
            ids[row, index, len(tokens) + 1] = tokenizer.end_token_id
    return Chunks(ids, weights)


def as_texts(name, texts):
    """A text, or several, as a list.

    Raises:
        UserError: it is none, or one of them is none.
    """
    given = [texts] if isinstance(texts, str) else texts
    try:
        given = list(given)
    except TypeError:  # not to be gone through, as an array without dimensions, though it has __iter__
        given = [given]
    if not all(isinstance(text, str) for text in given):
        raise UserError(f"{name} {shown(texts)}: no text; give a text, or a list of texts")
    return given


def repeated(encoding, tokens):
    """A text encoding `(..., tokens, width)` repeated to a multiple of its tokens."""
    times = tokens // encoding.shape[-2]
    return encoding if times == 1 else np.concatenate([encoding] * times, axis=-2)


def equally_long(*encodings):
    """Text encodings `(n, tokens, width)` of several lengths, each repeated to their least common multiple.

    None, which stands for no encoding, stays.
    """
    tokens = math.lcm(*(encoding.shape[1] for encoding in encodings if encoding is not None))
    return tuple(encoding if encoding is None else repeated(encoding, tokens) for encoding in encodings)


def _token_chunks(tokenizer, prompt):
    """The (token, weight) pairs of each chunk of a prompt; at least one chunk."""
    tokenizer.encode([prompt])  # refuses what is no text
    fragments = parse_prompt(_without_unknown_syntax(prompt))
    for fragment in fragments:
        if not abs(fragment.weight) <= LARGEST_WEIGHT:  # so put, it is true of NaN
            raise UserError(f"prompt: a weight of {fragment.weight:g}; use at most {LARGEST_WEIGHT:g}")
    room = tokenizer.max_length - 2
    (comma,) = tokenizer.encode([","])
    finished, current, last_comma = [], [], None
    for text, weight in fragments:
        if text is None:
            finished, current, last_comma = [*finished, current], [], None
            continue
        for token in tokenizer.encode([text])[0]:
            is_comma = [token] == comma
            if len(current) == room:
                # A comma that comes next ends its phrase, so none is cut here.
                cuts = not is_comma and last_comma is not None and room - last_comma <= COMMA_REACH
                border = last_comma + 1 if cuts else room
                finished, current, last_comma = [*finished, current[:border]], current[border:], None
            if is_comma:
                last_comma = len(current)
            current.append((token, weight))
    # Nothing follows a BREAK at the end, so it begins no chunk.
    return [*finished, current] if current or not finished else finished


def weighted_encoding(encodings, weights):
    """Weighs the vectors of tokens, and brings the mean of each chunk back to what it was, or its norm.

    Args:
        encodings: float32 `(n, chunks, tokens, width)`.
        weights: float32 `(n, chunks, tokens)`.

    Returns:
        float32 `(n, chunks * tokens, width)`.
    """
    weighted = encodings * weights[..., None]
    (mean, norm), (mean_after, norm_after) = map(_mean_and_norm, (encodings, weighted))
    by_norm = np.divide(norm, norm_after, out=np.ones_like(norm), where=norm_after != 0)
    has_mean = np.abs(mean) >= SMALLEST_MEAN * norm
    has_mean &= (np.abs(mean_after) >= SMALLEST_MEAN * norm_after) & (mean_after != 0)
    scale = np.divide(mean, mean_after, out=by_norm, where=has_mean)
    # Without weights nothing is to be restored, not even what float64 rounds.
    scale = np.where((weights == 1).all(axis=-1)[..., None, None], 1.0, scale)
    count, chunks, tokens, width = encodings.shape
    return (weighted * scale.astype("float32")).reshape(count, chunks * tokens, width)


def _mean_and_norm(encodings):
    """The mean of each chunk and the root of its mean square, float64 `(n, chunks, 1, 1)`."""
    numbers = encodings.astype("float64")
    return numbers.mean(axis=(2, 3), keepdims=True), np.sqrt((numbers**2).mean(axis=(2, 3), keepdims=True))


def _without_unknown_syntax(prompt):
    """Takes out tags that no model here can follow, and names what is read as plain text."""
    lines = [
        f"{_quoted(tag)} is left out, as no such network is loaded" for tag in _EXTRA_NETWORK.findall(prompt)
    ]
    prompt = _EXTRA_NETWORK.sub("", prompt)
    lines += [
        f"{_quoted(text)} is read as a weight; it does not change over steps" for text in _schedules(prompt)
    ]
    if re.search(r"\bAND\b", prompt):
        lines.append("AND is read as a word; prompts are not composed")
    for line in lines:
        warnings.warn(f"prompt: {line}", stacklevel=4)  # at the caller of chunk_prompts
    return prompt


def _schedules(prompt):
    """Prompt editing `[from:to:when]`, `[to:when]` and alternation `[a|b]`, in the order of their ends."""
    opened = []  # where a bracket begins, and whether it holds alternatives
    for match in _SCHEDULE.finditer(prompt):
        kind = match.lastgroup
        if kind == "open":
            opened.append([match.start(), False])
        elif kind == "or" and opened:
            opened[-1][1] = True
        elif kind in ("when", "close") and opened:
            start, alternates = opened.pop()
            if alternates or kind == "when":
                yield prompt[start : match.end()]


def _quoted(text):
    """A part of a prompt on one line, its end left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
