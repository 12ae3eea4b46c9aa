"""CLIP's text encoder as a Keras model with KerasCV's layers and inputs."""

import keras

from keras_sd.keras_cv.models.stable_diffusion.parts import load_h5, make_part

_SD1 = ("sd-1.5", {})
_SD2 = (
    "sd-2.1-base",
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
)
_VOCABULARY = 49408


class CLIPEmbedding(keras.layers.Layer):
    """The sum of tokens' and positions' vectors; called on `[tokens, positions]`."""

    def __init__(self, token_embedding, position_embedding, **kwargs):
        super().__init__(name="clip_embedding", **kwargs)
        self.token_embedding, self.position_embedding = token_embedding, position_embedding
        self.built = True

    def call(self, inputs):
        tokens, positions = inputs
        return self.token_embedding(tokens) + self.position_embedding(positions)


class CLIPEncoderLayer(keras.layers.Layer):
    """A block of the transformer with a unique name, as Keras requires of a model's layers."""

    def __init__(self, block, index, **kwargs):
        super().__init__(name=f"clip_encoder_layer_{index}", **kwargs)
        self.block = block
        self.built = True

    def call(self, hidden):
        return self.block(hidden)


class TextEncoder(keras.Model):
    """The text encoder of Stable Diffusion 1.x.

    Called on `[tokens, positions]`, or a dictionary of these, int32 `(n, max_length)` each; returns
    `(n, max_length, width)`. Its layers are the two inputs, the embedding (`layers[2]`, with
    `token_embedding` and `position_embedding`), the blocks and the last normalisation.

    Args:
        max_length: tokens of a text.
        vocab_size: size of the vocabulary; another than the published one needs `download_weights=False`.
        name: of the model.
        download_weights: whether to load the published weights; otherwise they are random.
        model: the name of a model (preset, hub id, folder) with the text encoder. By default
            the published one.
        part: a `keras_sd.models.text_encoder.TextEncoder` whose weights are shared.
    """

    published = _SD1

    def __init__(self, max_length, vocab_size=None, name=None, download_weights=True, model=None, part=None):
        if part is None:
            changes = {} if vocab_size in (None, _VOCABULARY) else {"vocab_size": vocab_size}
            part = make_part("text_encoder", model, self.published, download_weights, **changes)
        tokens = keras.layers.Input((max_length,), dtype="int32", name="tokens")
        positions = keras.layers.Input((max_length,), dtype="int32", name="positions")
        tables = part.embeddings
        hidden = CLIPEmbedding(tables.token_embedding, tables.position_embedding)([tokens, positions])
        for index, block in enumerate(part.encoder.layers):
            hidden = CLIPEncoderLayer(block, index)(hidden)
        super().__init__([tokens, positions], part.final_layer_norm(hidden), name=name)
        # Bypasses Keras' tracking: the layers above hold these weights already.
        object.__setattr__(self, "_part", part)

    def load_weights(self, filepath, *arguments, **options):
        """Load weights as every Keras model does, and KerasCV's H5 files."""
        if not load_h5("text_encoder", self._part, filepath):
            super().load_weights(filepath, *arguments, **options)


class TextEncoderV2(TextEncoder):
    """`TextEncoder` of Stable Diffusion 2.1."""

    published = _SD2
