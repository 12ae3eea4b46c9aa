"""The prompt language of AUTOMATIC1111's web interface: weights, BREAK, prompts of any length.

`(word)` has weight 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3. Nested brackets multiply, and a backslash before
a bracket makes it a letter. A prompt longer than the text encoder's sequence is encoded in chunks, and
`BREAK` begins a new chunk. Nothing is dropped silently: unsupported syntax is named in a warning.

Prompts of different lengths are extended by repeating their chunks to the least common multiple: 2 and 3
chunks give 6. Repetition does not change the result of attention, as the softmax divides the same weight
among the copies. The web interface appends empty chunks instead, which take a part of the attention, so that
an image depends on the other prompts of its batch.

As in the web interface, the mean of a chunk's encoding is restored after weighting. If the mean is tiny
beside the values (0.2 % in the bundled `emoji` model), the quotient of two means is not meaningful, and the
norm is restored instead.

Three faults of the web interface are avoided: a lone backslash is kept, a BREAK inside brackets works, and a
weight that is no number (`(a:1.2.3)`) is text.
"""

import math
import re
import warnings
from typing import NamedTuple

import numpy as np

from keras_sd.arguments import shown, whole_number
from keras_sd.errors import UserError
from keras_sd.models.token_chunks import chunk_bounds, comma_of

BRACKET_WEIGHT = 1.1

# With larger weights the other words have no effect, and single precision is soon exceeded.
LARGEST_WEIGHT = 1000.0

# The smallest mean of an encoding, as a fraction of its root mean square, that is restored. It is about 0.1
# in Stable Diffusion's text encoders, and at most 0.005 in `emoji`'s.
SMALLEST_MEAN = 0.02

# The largest number of chunks that prompts of different lengths are repeated to.
MOST_CHUNKS = 240

# The longest quotation in a warning, in characters.
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
    """A piece of a prompt with one weight; a text of None is a BREAK, whose weight is ignored."""

    text: str | None
    weight: float


class Chunks(NamedTuple):
    """Tokens of prompts: `ids` int32 and `weights` float32, both `(n, chunks, max_length)`."""

    ids: np.ndarray
    weights: np.ndarray


def parse_prompt(text):
    """Split a prompt into a list of `Fragment` tuples; neighbours of the same weight are joined.

    A bracket that is never closed extends to the end; one that was never opened is a letter. Round and square
    brackets are matched independently, so they may overlap.
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
    """Multiply weights by the factors of all spans `(start, end, factor)` around them; spans are nested.

    In one pass, as a prompt may consist of nested brackets only.
    """
    spans = sorted(spans, key=lambda span: (-span[0], span[1]))  # the next one is the last
    around = [(len(weights), 1.0)]  # ends of the current spans, and the products of their factors
    for index in range(len(weights)):
        while around[-1][0] <= index:
            around.pop()
        while spans and spans[-1][0] == index:
            _, end, factor = spans.pop()
            if end > index:
                around.append((end, around[-1][1] * factor))
        weights[index] *= around[-1][1]


def _merged(fragments):
    """Join neighbours of the same weight, so that unused syntax does not split words."""
    merged = []
    for fragment in fragments:
        if merged and None not in (merged[-1].text, fragment.text) and merged[-1].weight == fragment.weight:
            fragment = Fragment(merged.pop().text + fragment.text, fragment.weight)
        merged.append(fragment)
    return merged


def take_loras(prompt, is_known):
    """Remove the tags `<lora:name:weight>` from a prompt; a tag without a weight means 1.

    Args:
        prompt: a text.
        is_known: returns whether there is a LoRA of a name. Other tags are kept, for a later warning.

    Returns:
        The prompt without these tags, and name -> weight.

    Raises:
        UserError: a weight is not a number.
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
    """Tokenize prompts into chunks, with a weight for each token.

    Args:
        tokenizer: `keras_sd.models.tokenizer.Tokenizer`; a chunk has the length of its sequences.
        prompts: a list of texts.
        chunks: number of chunks for each prompt, a multiple of what each needs; by default the least common
            multiple. The chunks of shorter prompts are repeated.

    Returns:
        `Chunks`.

    Raises:
        UserError: a prompt is no text, `chunks` is no multiple of what it needs, or the least common multiple
            is larger than `MOST_CHUNKS` and than the longest prompt.
    """
    rows = []
    for prompt in prompts:  # no comprehension, whose frame `stacklevel` counts before Python 3.12
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
    """Return a text, or several, as a list.

    Args:
        name: name of the argument, for the message.

    Raises:
        UserError: it is neither a text nor a list of at least one text.
    """
    given = [texts] if isinstance(texts, str) else texts
    try:
        given = list(given)
    except TypeError:  # such as an array without dimensions, which has __iter__
        given = [given]
    if not all(isinstance(text, str) for text in given):
        raise UserError(f"{name} {shown(texts)}: no text; give a text, or a list of texts")
    if not given:
        raise UserError(f"{name}: the list is empty; give at least one text")
    return given


def repeated(encoding, tokens):
    """Return a text encoding `(..., tokens, width)` repeated to a multiple of its tokens."""
    times = tokens // encoding.shape[-2]
    return encoding if times == 1 else np.concatenate([encoding] * times, axis=-2)


def equally_long(*encodings):
    """Return text encodings `(n, tokens, width)` repeated to the least common multiple of their lengths.

    None means no encoding and is kept.
    """
    tokens = math.lcm(*(encoding.shape[1] for encoding in encodings if encoding is not None))
    return tuple(encoding if encoding is None else repeated(encoding, tokens) for encoding in encodings)


def _token_chunks(tokenizer, prompt):
    """Return the (token, weight) pairs of each chunk of a prompt; at least one chunk."""
    tokenizer.encode([prompt])  # raises UserError for what is no text
    fragments = parse_prompt(_without_unknown_syntax(prompt))
    for fragment in fragments:
        if not abs(fragment.weight) <= LARGEST_WEIGHT:  # true for NaN
            raise UserError(f"prompt: a weight of {fragment.weight:g}; use at most {LARGEST_WEIGHT:g}")
    segments = [[]]
    for text, weight in fragments:
        if text is None:
            segments.append([])
        else:
            segments[-1] += [(token, weight) for token in tokenizer.encode([text])[0]]
    if len(segments) > 1 and not segments[-1]:
        segments.pop()  # a BREAK at the end begins no chunk
    comma, room = comma_of(tokenizer), tokenizer.max_length - 2
    return [
        segment[start:end]
        for segment in segments
        for start, end in chunk_bounds([token for token, _ in segment], comma, room)
    ]


def weighted_encoding(encodings, weights):
    """Multiply the vectors of tokens by their weights, and restore the mean, or the norm, of each chunk.

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
    # Without weights the encoding stays exactly the same.
    scale = np.where((weights == 1).all(axis=-1)[..., None, None], 1.0, scale)
    count, chunks, tokens, width = encodings.shape
    return (weighted * scale.astype("float32")).reshape(count, chunks * tokens, width)


def _mean_and_norm(encodings):
    """Return the mean and the root mean square of each chunk, float64 `(n, chunks, 1, 1)`."""
    numbers = encodings.astype("float64")
    return numbers.mean(axis=(2, 3), keepdims=True), np.sqrt((numbers**2).mean(axis=(2, 3), keepdims=True))


def _without_unknown_syntax(prompt):
    """Remove unsupported tags, and warn of them and of syntax that is read as plain text."""
    lines = []
    for tag in _EXTRA_NETWORK.findall(prompt):
        is_lora = tag.startswith("<lora:")
        fault = "no LoRA of that name is loaded; set `lora_folder`" if is_lora else "only LoRAs are supported"
        lines.append(f"{_quoted(tag)} is left out, as {fault}")
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
    """Yield prompt editing `[from:to:when]`, `[to:when]` and alternation `[a|b]`, ordered by their ends."""
    opened = []  # start of a bracket, and whether it contains alternatives
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
    """Return a part of a prompt on one line, truncated if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
