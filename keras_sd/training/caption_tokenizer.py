"""Tokenizes captions for training: in one sequence or in several chunks, and counts those that are cut."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_sd.errors import UserError
from keras_sd.models.token_chunks import chunk_bounds, comma_of
from keras_sd.models.tokenizer import Tokenizer

LENGTHS = {75: 1, 150: 2, 225: 3}
"""The chunks of each `max_token_length`, which counts CLIP's tokens as kohya's scripts do."""


class CaptionTokenizer:
    """Turns captions into token ids of one length: begin token, text, end token, padding, in each chunk.

    The text encoder encodes the chunks one by one. A caption of fewer chunks is repeated if its chunks fill
    the length, which does not change the result of attention; otherwise empty chunks follow, as in
    AUTOMATIC1111's web UI. Longer captions lose their end; they are counted.

    Args:
        tokenizer: of the model.
        max_token_length: 75, 150 or 225: one, two or three chunks of the model's length.

    Attributes:
        cut: number of captions that lost their end, so far.
        longest: tokens of the longest caption, so far.

    Raises:
        UserError: the length is another.
    """

    def __init__(self, tokenizer: Tokenizer, max_token_length: int = 75) -> None:
        if max_token_length not in LENGTHS:
            raise UserError(f"max_token_length {max_token_length}: unknown; use 75, 150 or 225")
        self.tokenizer = tokenizer
        self.chunks = LENGTHS[max_token_length]
        self.room = tokenizer.max_length - 2
        self.max_length = self.chunks * tokenizer.max_length
        self.vocab_size = tokenizer.vocab_size
        self.cut = self.longest = 0
        self._comma = comma_of(tokenizer)

    def __call__(self, texts: str | Iterable[str]) -> npt.NDArray[np.int32]:
        """Return int32 `(n, max_length)`."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        shape = (len(texts), self.chunks, self.tokenizer.max_length)
        ids = np.full(shape, self.tokenizer.pad_token_id, "int32")
        ids[:, :, 0] = self.tokenizer.begin_token_id
        for row, tokens in zip(ids, self.tokenizer.encode(texts), strict=True):
            for chunk, part in zip(row, self._parts(tokens), strict=True):
                chunk[1 : len(part) + 1] = part
                chunk[len(part) + 1] = self.tokenizer.end_token_id
        return ids.reshape(len(texts), -1)

    def _parts(self, tokens: list[int]) -> list[list[int]]:
        """Return the tokens of each chunk."""
        bounds = [(0, min(len(tokens), self.room))]
        if self.chunks > 1:
            bounds = chunk_bounds(tokens, self._comma, self.room)
        self.longest = max(self.longest, len(tokens))
        bounds = bounds[: self.chunks]
        self.cut += bounds[-1][1] < len(tokens)
        parts = [tokens[start:end] for start, end in bounds]
        if self.chunks % len(parts) == 0:
            return parts * (self.chunks // len(parts))
        return parts + [[]] * (self.chunks - len(parts))

    def cut_line(self) -> str | None:
        """Return the line that tells how many captions were cut; None if none was."""
        if not self.cut:
            return None
        most = self.chunks * self.room
        enough = [length for length, chunks in LENGTHS.items() if chunks * self.room >= self.longest]
        longer = enough[0] if enough else max(LENGTHS)
        remedy = "shorten them" if self.chunks == 3 else f"give `max_token_length={longer}`, or shorten them"
        return (
            f"captions: {self.cut} different ones are longer than {most} tokens and lose their end, the "
            f"longest has {self.longest}; {remedy}"
        )


class DrawnCaptions:
    """An encoded source whose captions are drawn anew, and tokenized, each time that an example is.

    Args:
        source: examples with the token ids of captions (`training.encodings`).
        captions: the captions of each example.
        rules: `data.captions.Captions`, or one for each example.
        tokenizer: `CaptionTokenizer`.
    """

    def __init__(self, source: Any, captions: Any, rules: Any, tokenizer: CaptionTokenizer) -> None:
        self._source, self._captions, self._rules, self._tokenizer = source, captions, rules, tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example with its captions as they are."""
        return self._source[index]

    def draw_example(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return an example with one caption, the drawn one, as its contexts."""
        draw = getattr(self._source, "draw_example", lambda index, _: self._source[index])
        example = draw(index, generator)
        rules = self._rules[index] if isinstance(self._rules, list) else self._rules
        caption = rules.draw(self._captions[index], generator)
        return example | {"contexts": self._tokenizer([caption])}
