"""CLIP's text tower: turns token ids into the sequence of vectors that conditions the UNet.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
Stable Diffusion 1.x uses the tower of ViT-L/14, 2.x that of OpenCLIP ViT-H/14. The attribute tree is
that of transformers' ``CLIPTextModel``.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_sd import backend
from keras_sd.arguments import Tensor
from keras_sd.config import LEGACY_END_TOKEN_ID, TextEncoderConfig
from keras_sd.errors import UserError
from keras_sd.models.clip_transformer import Transformer
from keras_sd.models.initializers import normal
from keras_sd.models.layers import Layer, LayerNormalization, embedding
from keras_sd.models.precision import ConfiguredModel, dtype_policy


class TextEmbeddings(Layer):
    """The sum of a learned vector for each token and one for each position.

    Token ids beyond the table `token_embedding` belong to `learned_embedding`, if there is one.
    """

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.token_embedding = embedding(config.vocab_size, config.hidden_size, normal(0.02))
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size, normal(0.01))
        self.learned_embedding = None

    def call(self, ids):
        return self.token_vectors(ids) + self.position_embedding(np.arange(ids.shape[1]))

    def token_vectors(self, ids):
        """Return the vectors `(..., width)` of token ids, without those of positions."""
        if self.learned_embedding is None:
            return self.token_embedding(ids)
        last = self.token_embedding.input_dim - 1
        return ops.where(
            (ids > last)[..., None],
            self.learned_embedding(ops.maximum(ids - last - 1, 0)),
            self.token_embedding(ops.minimum(ids, last)),
        )

    def add_tokens(self, vectors):
        """Add the vectors, float32 `(k, width)`, of the next token ids."""
        if self.learned_embedding is not None:
            earlier = ops.convert_to_numpy(self.learned_embedding.embeddings)
            vectors = np.concatenate([earlier, vectors])
            backend.forget(self, self.learned_embedding)
        with dtype_policy(self.token_embedding.dtype_policy), backend.unlocked(self):
            self.learned_embedding = embedding(*vectors.shape, keras.initializers.Constant(vectors))


@keras.saving.register_keras_serializable("keras_sd")
class TextEncoder(ConfiguredModel):
    """A causal transformer over token ids.

    Call it on int32 `(n, tokens)`. It returns the last hidden state after the final layer normalisation,
    float32 `(n, tokens, hidden_size)`. Sequences of two or three times `max_position_embeddings` (or more)
    are chunks, which are encoded one by one. All weights exist after construction.

    Attributes:
        clip_skip: number of the last blocks that a call leaves out, 0 by default. Set it before anything is
            compiled with the encoder.

    Args:
        config: a `TextEncoderConfig`.
        learned_tokens: number of the last tokens of the vocabulary that `add_tokens` has added.

    Raises:
        UserError: there are more tokens than positions and no multiple of them, or (outside of compiled
            functions) an id is not in the vocabulary.
    """

    config_class = TextEncoderConfig

    def __init__(self, config: TextEncoderConfig, learned_tokens: int = 0, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        config = dataclasses.replace(config, vocab_size=config.vocab_size - learned_tokens)
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config, causal=True)
        self.final_layer_norm = LayerNormalization(config.hidden_size, config.layer_norm_eps)
        self.clip_skip = 0
        self.built = True
        if learned_tokens:
            self.add_tokens(np.zeros((learned_tokens, config.hidden_size)))

    def get_config(self) -> dict[str, Any]:
        learned = self.embeddings.learned_embedding
        return super().get_config() | {"learned_tokens": 0 if learned is None else learned.input_dim}

    def __call__(self, ids: Tensor, **kwargs: Any) -> Tensor:
        # Keras adds lines to the message of an error that is raised inside `call`.
        self._check(ids)
        return super().__call__(ids, **kwargs)

    def call(self, ids: Tensor) -> Tensor:
        return self._hidden_states(ids, self.depth(self.clip_skip))

    def depth(self, clip_skip: int) -> int:
        """Return how many blocks are left if the last `clip_skip` ones are left out.

        Raises:
            UserError: none would be left.
        """
        blocks = self.config.num_hidden_layers
        if not 0 <= clip_skip < blocks:
            raise UserError(
                f"text encoder: {clip_skip} of {blocks} layers cannot be skipped; skip 0 to {blocks - 1}"
            )
        return blocks - clip_skip

    def add_tokens(self, vectors: npt.ArrayLike) -> None:
        """Add tokens with these vectors; their ids continue from `config.vocab_size`.

        The vectors are a separate variable, `embeddings.learned_embedding`, so they can be trained while the
        table of the other tokens is frozen. Add tokens before anything is compiled with the encoder.

        Args:
            vectors: `(k, hidden_size)`.

        Raises:
            UserError: the vectors have another width, or are not finite.
        """
        vectors, width = np.asarray(vectors, "float32"), self.config.hidden_size
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise UserError(
                f"text encoder: vectors of shape {vectors.shape} for new tokens; give (count, {width}), "
                "made for this kind of model"
            )
        if not np.isfinite(vectors).all():
            raise UserError("text encoder: vectors for new tokens hold NaN or infinity; give finite ones")
        self.embeddings.add_tokens(vectors)
        self.config = dataclasses.replace(self.config, vocab_size=self.config.vocab_size + len(vectors))

    def hidden_states(self, ids: Tensor, layer: int = -1) -> Tensor:
        """Return the output of one block, with the final layer normalisation applied.

        Args:
            ids: token ids, int32 `(n, tokens)`.
            layer: counted from the end: -1 is the last block (Stable Diffusion 1.x), -2 the one
                before it (2.x with all of OpenCLIP's 24 blocks).

        Returns:
            float32 `(n, tokens, hidden_size)`.

        Raises:
            UserError: there is no such layer; or as in a call.
        """
        blocks = self.config.num_hidden_layers
        if not -blocks <= layer <= -1:
            raise UserError(
                f"text encoder: there is no layer {layer} among {blocks}; give one from -{blocks} to -1"
            )
        self._check(ids)
        return self._hidden_states(ids, depth=blocks + 1 + layer)

    def pooled(self, ids: Tensor) -> Tensor:
        """Return the vector of each text, `(n, hidden_size)`: the last hidden state at its end token.

        It is that of all blocks, whatever `clip_skip` is.
        """
        return self.pool(self.hidden_states(ids) if self.clip_skip else self(ids), ids)

    def pool(self, hidden_states: Tensor, ids: Tensor) -> Tensor:
        """Return the vector at the first end token of each text, from `(n, tokens, hidden_size)`.

        For a text without an end token it is the vector of the first position, as in transformers.
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
        tokens, positions = ids.shape[1], self.config.max_position_embeddings
        if tokens > positions:
            hidden = self._hidden_states(ops.reshape(ids, (-1, positions)), depth)
            return ops.reshape(hidden, (-1, tokens, self.config.hidden_size))
        hidden = self.encoder(self.embeddings(ops.cast(ids, "int32")), depth=depth)
        return ops.cast(self.final_layer_norm(hidden), "float32")

    def _check(self, ids):
        tokens, positions = ids.shape[1], self.config.max_position_embeddings
        if tokens > positions and tokens % positions:
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
    """Return the values of a tensor as a NumPy array, or None while a function is being traced."""
    try:
        return np.asarray(tensor)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # each backend has its own
        return None
