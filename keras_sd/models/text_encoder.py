"""CLIP's text tower: token ids to the sequence of vectors that conditions the UNet.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
Stable Diffusion 1.x uses the tower of ViT-L/14, 2.x that of OpenCLIP ViT-H/14. The attribute tree is
that of transformers' ``CLIPTextModel``.
"""

import keras
import numpy as np
from keras import ops

from keras_sd.errors import UserError
from keras_sd.models.initial_values import normal
from keras_sd.models.layers import Layer, embedding, layer_normalization
from keras_sd.models.transformer import Transformer

# Early public configs say that the end token is 2, which it is not in CLIP's vocabulary. They are read
# as their models were trained: the end token is the largest id.
LEGACY_END_TOKEN_ID = 2


class TextEmbeddings(Layer):
    """Sum of a learned vector for each token and one for each position."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.token_embedding = embedding(config.vocab_size, config.hidden_size, normal(0.02))
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size, normal(0.01))

    def call(self, ids):
        return self.token_embedding(ids) + self.position_embedding(np.arange(ids.shape[1]))


class TextEncoder(keras.Model):
    """A causal transformer over token ids.

    Called on int32 `(n, tokens)`; returns the last hidden state after the final layer normalisation,
    float32 `(n, tokens, hidden_size)`. All weights exist after construction.

    Raises:
        UserError: a call has more tokens than there are positions, or (where the values are at hand,
            as they are outside a compiled function) an id outside of the vocabulary.
    """

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config, causal=True)
        self.final_layer_norm = layer_normalization(config.hidden_size, config.layer_norm_eps)
        self.built = True

    def __call__(self, ids, **kwargs):
        # Keras adds lines to the message of an error that is raised inside `call`.
        self._check(ids)
        return super().__call__(ids, **kwargs)

    def call(self, ids):
        return self._hidden_states(ids, depth=None)

    def hidden_states(self, ids, layer=-1):
        """Returns the output of one block, with the final layer normalisation applied.

        Args:
            ids: token ids, int32 `(n, tokens)`.
            layer: counted from the end: -1 is the last block (Stable Diffusion 1.x), -2 the one
                before it (2.x with all of OpenCLIP's 24 blocks).

        Returns:
            float32 `(n, tokens, hidden_size)`.

        Raises:
            UserError: there is no such layer, or as in a call.
        """
        blocks = self.config.num_hidden_layers
        if not -blocks <= layer <= -1:
            raise UserError(
                f"text encoder: there is no layer {layer} among {blocks}; give one from -{blocks} to -1"
            )
        self._check(ids)
        return self._hidden_states(ids, depth=blocks + 1 + layer)

    def pooled(self, ids):
        """Returns the vector of each text, `(n, hidden_size)`: the last hidden state at its end token."""
        return self.pool(self(ids), ids)

    def pool(self, hidden_states, ids):
        """Picks from `(n, tokens, hidden_size)` the vector at the first end token of each text.

        A text without an end token gets the vector of its first position, as in transformers.
        """
        tokens = ids.shape[1]
        ids = ops.cast(ids, "int32")
        if self.config.eos_token_id == LEGACY_END_TOKEN_ID:
            rank = ids
        else:
            rank = ops.cast(ops.equal(ids, self.config.eos_token_id), "int32")
        # Backends differ in which of several equal values argmax takes: make the first the largest.
        position = ops.argmax(rank * tokens - np.arange(tokens, dtype="int32"), axis=1)
        mask = ops.one_hot(position, tokens, dtype=hidden_states.dtype)
        return ops.sum(hidden_states * mask[:, :, None], axis=1)

    def _hidden_states(self, ids, depth):
        hidden = self.encoder(self.embeddings(ops.cast(ids, "int32")), depth=depth)
        return ops.cast(self.final_layer_norm(hidden), "float32")

    def _check(self, ids):
        tokens, positions = ids.shape[1], self.config.max_position_embeddings
        if tokens > positions:
            raise UserError(f"text encoder: {tokens} tokens for {positions} positions; shorten the sequence")
        values = _concrete(ids)
        limit = self.config.vocab_size
        if values is not None and ((values < 0) | (values >= limit)).any():
            unknown = values[(values < 0) | (values >= limit)][0]
            raise UserError(
                f"text encoder: token id {unknown} is outside of the vocabulary (0 to {limit - 1}); "
                "use the tokenizer that belongs to this model"
            )


def _concrete(tensor):
    """The tensor's values as a NumPy array, or None while a function is being traced."""
    try:
        return np.asarray(tensor)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # each backend has its own
        return None
