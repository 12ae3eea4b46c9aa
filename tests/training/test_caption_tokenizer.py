"""Captions of any length as token ids."""

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.pipeline.prompts import chunk_prompts
from keras_sd.training.caption_tokenizer import CaptionTokenizer
from tests import tiny

SHORT, LONG = "red heart", "red, blue, heart, a, b, c"


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def test_one_chunk_is_the_models_own_sequence(words):
    tokens = CaptionTokenizer(words)
    np.testing.assert_array_equal(tokens([SHORT, ""]), words([SHORT, ""]))
    assert tokens.cut == 0 and tokens.cut_line() is None and tokens.max_length == 12
    with pytest.warns(UserWarning, match="dropped its end"):
        expected = words([LONG])
    np.testing.assert_array_equal(tokens([LONG]), expected)
    assert tokens.cut_line() == (
        "captions: 1 different ones are longer than 10 tokens and lose their end, the longest has 14; "
        "give `max_token_length=150`, or shorten them"
    )


@pytest.mark.parametrize("length, chunks", [(150, 2), (225, 3)])
def test_chunks_are_those_of_generation(words, length, chunks):
    tokens = CaptionTokenizer(words, length)
    for text in (SHORT, LONG, ""):
        expected = chunk_prompts(words, [text]).ids[0]
        ids = tokens([text])[0].reshape(chunks, 12)
        np.testing.assert_array_equal(ids[: len(expected)], expected)
        # A short text is repeated; what does not fill the length is followed by empty chunks.
        rest = expected if chunks % len(expected) == 0 else words([""])
        np.testing.assert_array_equal(ids[len(expected) :], np.resize(rest, ids[len(expected) :].shape))
    assert tokens.cut == 0
    assert tokens([LONG * 5]).shape == (1, chunks * 12) and tokens.cut == 1
    assert tokens.cut_line().endswith("shorten them")


def test_the_text_encoder_encodes_chunks_one_by_one(words):
    encoder = tiny.randomize(TextEncoder(tiny.text_encoder_config(words)), 1, 0.5)
    ids = CaptionTokenizer(words, 225)([SHORT, LONG])
    whole = np.asarray(encoder(ids))
    assert whole.shape == (2, 36, 16)
    for index in range(3):
        part = slice(12 * index, 12 * index + 12)
        np.testing.assert_allclose(whole[:, part], encoder(ids[:, part]), atol=1e-6)
    with pytest.raises(UserError, match="13 tokens for 12 positions"):
        encoder(np.zeros((1, 13), "int32"))


def test_bad_length(words):
    with pytest.raises(UserError, match="max_token_length 100: unknown"):
        CaptionTokenizer(words, 100)
