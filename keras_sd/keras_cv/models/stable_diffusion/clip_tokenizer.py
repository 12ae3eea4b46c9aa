"""CLIP's tokenizer with the methods of KerasCV's tokenizer."""

import html

from tokenizers import decoders

from keras_sd.errors import UserError
from keras_sd.models.tokenizer import BEGIN_TOKEN, END_TOKEN, SPACE_SYMBOL, WORD_END, Tokenizer


class SimpleTokenizer:
    """A tokenizer from one text to a flat list of token ids, begin and end included.

    Args:
        bpe_path: not supported; CLIP's own vocabulary comes with the package.
        tokenizer: a `keras_sd.models.tokenizer.Tokenizer` to use instead of CLIP's.

    Attributes:
        inner: the `Tokenizer`, with the tokens of `add_tokens`.
    """

    def __init__(self, bpe_path=None, tokenizer=None):
        if bpe_path is not None:
            raise UserError("bpe_path: not supported; leave it out, CLIP's merges come with the package")
        self.inner = tokenizer or Tokenizer.clip()

    @property
    def encoder(self):
        """The dictionary from token to id."""
        return self.inner.vocabulary | self.inner.added_tokens

    @property
    def decoder(self):
        """The dictionary from id to token."""
        return {token_id: token for token, token_id in self.encoder.items()}

    @property
    def vocab(self):
        """The tokens in the order of their ids."""
        return sorted(self.encoder, key=self.encoder.get)

    @property
    def start_of_text(self):
        """The id that every text begins with."""
        return self.encoder[BEGIN_TOKEN]

    @property
    def end_of_text(self):
        """The id that ends every text, and fills up short ones."""
        return self.encoder[END_TOKEN]

    def add_tokens(self, tokens):
        """Give each new token the next id; return how many are new.

        Args:
            tokens: a token or a list of them, such as `<my-cat>`.

        Raises:
            UserError: a prompt cannot hold such a token.
        """
        tokens = [tokens] if isinstance(tokens, str) else tokens
        new = [token for token in dict.fromkeys(tokens) if token not in self.encoder]
        if new:
            self.inner = self.inner.add_tokens(new)
        return len(new)

    def encode(self, text):
        """Return the ids of a text, at any length; HTML entities stand for their characters."""
        (ids,) = self.inner.encode([html.unescape(html.unescape(text)).strip()])
        return [self.start_of_text, *ids, self.end_of_text]

    def decode(self, tokens):
        """Return the text of ids, special tokens included; a space follows each word."""
        known = self.decoder
        unknown = next((token for token in tokens if int(token) not in known), None)
        if unknown is not None:
            raise UserError(f"tokenizer: token id {unknown} is outside of the vocabulary")
        text = "".join(known[int(token)] for token in tokens)
        return decoders.ByteLevel().decode([text.replace(WORD_END, SPACE_SYMBOL)])
