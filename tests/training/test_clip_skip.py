"""What training leaves out of the text encoder with clip skip."""

import keras
import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.training.clip_skip import skip_layers
from keras_sd.training.encoder import Encoder
from keras_sd.training.lora import add_lora
from tests import tiny


@pytest.fixture
def encoder():
    return tiny.randomize(TextEncoder(tiny.text_encoder_config(tiny.tokenizer())), 1, 0.5)


def test_skipped_layers_are_frozen_and_have_no_lora(encoder):
    add_lora(encoder, 2, 2)
    skip_layers(encoder, 1)
    used, skipped = encoder.encoder.layers
    assert len(used.trainable_variables) == 8 and not skipped.trainable_variables
    assert not any("lora" in variable.path for variable in skipped.weights)
    ids = tiny.tokenizer()(list(tiny.TEXTS[:2]))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(encoder(ids)), keras.ops.convert_to_numpy(encoder.hidden_states(ids, -2))
    )


def test_kept_encodings_are_those_of_a_layer(encoder):
    def identity():
        vae = tiny.pipeline().vae
        return Encoder(vae, encoder, tiny.tokenizer(), jit_compile=False).text_identity()

    before = identity()
    skip_layers(encoder, 1)
    assert identity() == f"{before}-1 skipped"
    skip_layers(encoder, 0)
    assert identity() == before


def test_more_layers_than_there_are_cannot_be_skipped(encoder):
    with pytest.raises(UserError, match="text encoder: 2 of 2 layers cannot be skipped; skip 0 to 1"):
        skip_layers(encoder, 2)
