"""Cuts texts that are longer than the text encoder's sequence into chunks, as AUTOMATIC1111's web UI does."""

from collections.abc import Sequence

from keras_sd.models.tokenizer import Tokenizer

COMMA_REACH = 20
"""A phrase is moved to the next chunk if the comma before it is among this many last tokens of a full one."""


def comma_of(tokenizer: Tokenizer) -> int:
    """Return the token id of a comma; -1, which no token has, if it takes several tokens."""
    (comma,) = tokenizer.encode([","])
    return comma[0] if len(comma) == 1 else -1


def chunk_bounds(ids: Sequence[int], comma: int, room: int) -> list[tuple[int, int]]:
    """Return the bounds (start, end) of the chunks of a text; at least one.

    Args:
        ids: all token ids of the text, without begin, end and padding.
        comma: the id of a comma, as `comma_of` returns it.
        room: the most tokens of a chunk.
    """
    bounds, start, last_comma = [], 0, None
    for index, token in enumerate(ids):
        if index - start == room:
            # If the next token is a comma, the phrase is complete.
            cuts = token != comma and last_comma is not None and index - last_comma <= COMMA_REACH
            border = last_comma + 1 if cuts and last_comma is not None else index
            bounds.append((start, border))
            start, last_comma = border, None
        if token == comma:
            last_comma = index
    return [*bounds, (start, len(ids))]
