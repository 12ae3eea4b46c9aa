"""The prompt language of AUTOMATIC1111's web interface: weights, BREAK, texts of any length.

`(word)` counts 1.1 times, `[word]` 1.1 times less, `(word:1.3)` 1.3 times; brackets nest and multiply, and
a backslash before one makes it a letter. A text longer than the text encoder takes is encoded in chunks,
and `BREAK` begins a new one. Nothing is dropped: what a model cannot take is named in a warning.
"""

import re
import warnings
from typing import NamedTuple

import numpy as np

from keras_sd.errors import UserError

BRACKET_WEIGHT = 1.1

# Beyond it nothing is left of the other words, and of single precision soon neither.
LARGEST_WEIGHT = 1000.0

# A phrase is not cut if the comma before it is among so many last tokens of a full chunk.
LONGEST_CARRIED_PHRASE = 20

_SYNTAX = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<close>[)\]])
    | \b(?P<chunk>BREAK)\b
    | (?P<text>[^\\()\[\]:B]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPENING = {")": "(", "]": "["}
_FACTORS = {"(": BRACKET_WEIGHT, "[": 1 / BRACKET_WEIGHT}
_EXTRA_NETWORK = re.compile(r"<\w+:[^<>]*>")
_EDITING = re.compile(r"\[[^\[\]]*(?:\|[^\[\]]*|:[^\[\]]*:\s*[\d.]+\s*)\]")


class Fragment(NamedTuple):
    """A piece of a prompt of one weight; a text of None is a BREAK."""

    text: str | None
    weight: float


class Chunks(NamedTuple):
    """Tokens of prompts: `ids` int32 and `weights` float32, both `(n, chunks, max_length)`."""

    ids: np.ndarray
    weights: np.ndarray


def parse_prompt(text):
    """Splits a prompt into `Fragment`s.

    Brackets that are never closed weigh all that follows, ones that were never opened are letters.
    """
    fragments, opened = [], {"(": [], "[": []}

    def multiply(start, factor):
        for index in range(start, len(fragments)):
            fragments[index] = fragments[index]._replace(weight=fragments[index].weight * factor)

    for match in _SYNTAX.finditer(text):
        kind = match.lastgroup
        if kind == "open":
            opened[match["open"]].append(len(fragments))
        elif kind == "weight" and opened["("]:
            multiply(opened["("].pop(), float(match["weight"]))
        elif kind == "close" and opened[_OPENING[match["close"]]]:
            multiply(opened[_OPENING[match["close"]]].pop(), _FACTORS[_OPENING[match["close"]]])
        elif kind == "chunk":
            fragments.append(Fragment(None, 1.0))
        else:
            fragments.append(Fragment(match["escaped"] or match[0], 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            multiply(start, _FACTORS[bracket])
    return _merged(fragments)


def _merged(fragments):
    """Joins neighbours of one weight, so that words are not cut where syntax was only looked for."""
    merged = []
    for fragment in fragments:
        if merged and None not in (merged[-1].text, fragment.text) and merged[-1].weight == fragment.weight:
            fragment = Fragment(merged.pop().text + fragment.text, fragment.weight)
        merged.append(fragment)
    return merged


def chunk_prompts(tokenizer, prompts, chunks=None):
    """Turns prompts into chunks of tokens with a weight for each.

    Args:
        tokenizer: `keras_sd.models.tokenizer.Tokenizer`; a chunk is as long as its sequences.
        prompts: a list of texts.
        chunks: how many each gets; by default as many as the longest needs. Short ones are filled up with
            empty chunks.

    Returns:
        `Chunks`.

    Raises:
        UserError: a prompt is no text, or needs more than `chunks`.
    """
    rows = [_token_chunks(tokenizer, prompt) for prompt in prompts]
    needed = max(map(len, rows))
    chunks = needed if chunks is None else chunks
    if needed > chunks:
        raise UserError(f"prompt: needs {needed} chunks of tokens where {chunks} are given; shorten it")
    shape = (len(rows), chunks, tokenizer.max_length)
    ids, weights = np.full(shape, tokenizer.pad_token_id, "int32"), np.ones(shape, "float32")
    ids[:, :, 0] = tokenizer.begin_token_id
    for row in range(len(rows)):
        for index in range(chunks):
            tokens = rows[row][index] if index < len(rows[row]) else []
            for place, (token, weight) in enumerate(tokens, start=1):
                ids[row, index, place], weights[row, index, place] = token, weight
            ids[row, index, len(tokens) + 1] = tokenizer.end_token_id
    return Chunks(ids, weights)


def _token_chunks(tokenizer, prompt):
    """The (token, weight) pairs of each chunk of a prompt; at least one chunk."""
    tokenizer.encode([prompt])  # refuses what is no text
    fragments = parse_prompt(_without_unknown_syntax(prompt))
    largest = max((abs(fragment.weight) for fragment in fragments), default=0)
    if largest > LARGEST_WEIGHT:
        raise UserError(f"prompt: a weight of {largest:g}; use at most {LARGEST_WEIGHT:g}")
    room = tokenizer.max_length - 2
    (comma,) = tokenizer.encode([","])
    finished, current, phrase = [], [], 0  # phrase: where in the current chunk the last comma ends
    for text, weight in fragments:
        if text is None:
            finished, current, phrase = [*finished, current], [], 0
            continue
        for token in tokenizer.encode([text])[0]:
            if len(current) == room:
                carried = phrase if phrase and room - phrase <= LONGEST_CARRIED_PHRASE else room
                finished, current, phrase = [*finished, current[:carried]], current[carried:], 0
            current.append((token, weight))
            if [token] == comma:
                phrase = len(current)
    return [*finished, current]


def weighted_encoding(encodings, weights):
    """Weighs the vectors of tokens and brings the mean of each chunk back to what it was.

    Args:
        encodings: float32 `(n, chunks, tokens, width)`.
        weights: float32 `(n, chunks, tokens)`.

    Returns:
        float32 `(n, chunks * tokens, width)`.
    """
    weighted = encodings * weights[..., None]
    before = encodings.mean(axis=(2, 3), keepdims=True, dtype="float64")
    after = weighted.mean(axis=(2, 3), keepdims=True, dtype="float64")
    scale = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    count, chunks, tokens, width = encodings.shape
    return (weighted * scale.astype("float32")).reshape(count, chunks * tokens, width)


def _without_unknown_syntax(prompt):
    """Takes out tags that no model here can follow, and names what is read as plain text."""
    for tag in _EXTRA_NETWORK.findall(prompt):
        warnings.warn(f"prompt: {tag} is left out, as no such network is loaded", stacklevel=4)
    prompt = _EXTRA_NETWORK.sub("", prompt)
    for construct in _EDITING.findall(prompt):
        warnings.warn(f"prompt: {construct} is read as a weight; it does not change over steps", stacklevel=4)
    if re.search(r"\bAND\b", prompt):
        warnings.warn("prompt: AND is read as a word; prompts are not composed", stacklevel=4)
    return prompt
