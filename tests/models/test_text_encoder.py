"""The text tower against transformers' CLIPTextModel with the same weights."""

import json

import keras
import numpy as np
import pytest

from keras_sd.config import TextEncoderConfig
from keras_sd.errors import UserError
from keras_sd.models.precision import dtype_policy
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.weights.loading import model_part
from keras_sd.weights.rules import load_weights
from tests.reference import group_of, run_reference

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "bos_token_id": 118,
}
CONFIGS = {
    # As SD 1.x: OpenAI's CLIP, whose early configs say that the end token is 2.
    "openai": TextEncoderConfig(**SMALL, hidden_act="quick_gelu", eos_token_id=2),
    # As SD 2.x: OpenCLIP.
    "openclip": TextEncoderConfig(**SMALL, hidden_act="gelu", eos_token_id=119),
}
SCRIPT = """
    import json
    from transformers import CLIPTextConfig, CLIPTextModel

    for name, values in json.loads((folder / "configs.json").read_text()).items():
        model = randomize(CLIPTextModel(CLIPTextConfig(**values)), 0.2)
        store_weights(model, name + "/weights")
        result = model(inputs["ids"], output_hidden_states=True)
        norm = getattr(model, "text_model", model).final_layer_norm
        outputs[name + "/last"] = result.last_hidden_state
        outputs[name + "/pooled"] = result.pooler_output
        outputs[name + "/before_last"] = norm(result.hidden_states[-2])
"""


def token_ids():
    ids = np.random.default_rng(0).integers(3, 118, (4, 12)).astype("int32")
    ids[:, 0] = 118
    ids[0, 4:] = 119  # padded with the end token
    ids[1, 7], ids[1, 8:] = 119, 0  # padded with another token
    ids[2, 11] = 119
    ids[3, 1:] = 119  # empty text
    return ids


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "configs.json").write_text(json.dumps({name: CONFIGS[name].to_dict() for name in CONFIGS}))
    return run_reference(SCRIPT, {"ids": token_ids()}, folder)


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, reference):
    encoder = TextEncoder(CONFIGS[request.param])
    outputs = group_of(reference, request.param)
    load_weights(encoder, group_of(outputs))
    return encoder, outputs


def assert_close(actual, expected):
    actual = keras.ops.convert_to_numpy(actual)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert np.abs(actual - expected).max() / expected.std() < 1e-5


def test_last_hidden_state(loaded):
    encoder, expected = loaded
    assert_close(encoder(token_ids()), expected["last"])
    assert_close(encoder.hidden_states(token_ids()), expected["last"])


def test_layer_before_the_last(loaded):
    encoder, expected = loaded
    assert_close(encoder.hidden_states(token_ids(), layer=-2), expected["before_last"])
    assert np.abs(expected["before_last"] - expected["last"]).max() > 0.1


def test_skipped_layers_are_left_out_of_a_call_alone(loaded):
    encoder, expected = loaded
    encoder.clip_skip = 1
    try:
        assert_close(encoder(token_ids()), expected["before_last"])
        assert_close(encoder.pooled(token_ids()), expected["pooled"])
    finally:
        encoder.clip_skip = 0
    with pytest.raises(UserError, match="3 of 3 layers cannot be skipped; skip 0 to 2"):
        encoder.depth(3)


def test_pooled_is_the_first_end_token(loaded):
    encoder, expected = loaded
    assert_close(encoder.pooled(token_ids()), expected["pooled"])
    assert_close(encoder.pool(expected["last"], token_ids()), expected["last"][np.arange(4), [4, 7, 11, 1]])


def test_shorter_sequences_see_the_same_past(loaded):
    encoder, expected = loaded
    assert_close(encoder(token_ids()[:, :5]), expected["last"][:, :5])


def test_compiled_function_agrees(loaded):
    encoder, expected = loaded

    class Pooled(keras.Model):
        def call(self, ids):
            return encoder.pooled(ids)

    model = Pooled()
    model.compile(jit_compile=True)
    assert_close(model.predict(token_ids(), batch_size=4, verbose=0), expected["pooled"])


def test_initial_weights_are_clips():
    config = TextEncoderConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    encoder = TextEncoder(config)
    block = encoder.encoder.layers[0]
    for variable, deviation in (
        (encoder.embeddings.token_embedding.embeddings, 0.02),
        (encoder.embeddings.position_embedding.embeddings, 0.01),
        (block.self_attn.q_proj.kernel, 64**-0.5),
        (block.self_attn.out_proj.kernel, 64**-0.5 / 2),
        (block.mlp.fc1.kernel, 128**-0.5),
        (block.mlp.fc2.kernel, 64**-0.5 / 2),
    ):
        assert np.std(keras.ops.convert_to_numpy(variable)) == pytest.approx(deviation, rel=0.06)


@pytest.mark.parametrize(
    ("policy", "stored", "tolerance"),
    [("float16", "float16", 0.01), ("bfloat16", "bfloat16", 0.08), ("mixed_bfloat16", "float32", 0.08)],
)
def test_half_precision_is_near(reference, policy, stored, tolerance):
    with dtype_policy(policy):
        encoder = TextEncoder(CONFIGS["openclip"])
    outputs = group_of(reference, "openclip")
    load_weights(encoder, group_of(outputs))
    assert {variable.dtype for variable in encoder.weights} == {stored}
    hidden = encoder(token_ids())
    assert keras.backend.standardize_dtype(hidden.dtype) == "float32"
    difference = np.abs(keras.ops.convert_to_numpy(hidden) - outputs["last"]).max()
    assert tolerance / 100 < difference / outputs["last"].std() < tolerance


@pytest.mark.parametrize("wrong", [120, -1])
def test_unknown_id(wrong):
    ids = token_ids()
    ids[2, 3] = wrong
    encoder = TextEncoder(CONFIGS["openclip"])
    for function in (encoder, encoder.pooled, encoder.hidden_states):
        with pytest.raises(
            UserError, match=rf"^text encoder: token id {wrong} is outside of the vocabulary \(0 to 119\)"
        ):
            function(ids)


def test_too_many_tokens():
    with pytest.raises(UserError, match="^text encoder: 13 tokens for 12 positions"):
        TextEncoder(CONFIGS["openclip"])(np.zeros((1, 13), "int32"))


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_unknown_layer(layer):
    with pytest.raises(UserError, match=f"no layer {layer} among 3"):
        TextEncoder(CONFIGS["openclip"]).hidden_states(token_ids(), layer=layer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_attention_heads", 5, "does not divide into 5 heads"), ("hidden_act", "step", "'step' is unknown")],
)
def test_impossible_config(field, value, message):
    with pytest.raises(UserError, match=message):
        TextEncoder(TextEncoderConfig(**{**SMALL, field: value}))


def test_added_tokens_have_vectors_of_their_own():
    encoder = TextEncoder(CONFIGS["openclip"])
    table = np.array(encoder.embeddings.token_embedding.embeddings)
    before = np.array(encoder(token_ids()))
    new = np.random.default_rng(1).standard_normal((5, 32)).astype("float32")
    encoder.add_tokens(new[:2])
    encoder.add_tokens(new[2:])
    assert encoder.config.vocab_size == 125
    np.testing.assert_array_equal(encoder(token_ids()), before)
    ids = np.array([[0, 119, 120, 121, 124]])
    np.testing.assert_array_equal(
        encoder.embeddings.token_vectors(ids)[0], np.concatenate([table[[0, 119]], new[[0, 1, 4]]])
    )
    learned = encoder.embeddings.learned_embedding.embeddings
    assert learned.shape == (5, 32)
    # The variable of the first addition is gone.
    assert len(encoder.weights) == len(TextEncoder(CONFIGS["openclip"]).weights) + 1
    np.testing.assert_array_equal(encoder.embeddings.token_embedding.embeddings, table)
    with pytest.raises(UserError, match=r"token id 125 is outside of the vocabulary \(0 to 124\)"):
        encoder(np.array([[125]]))

    larger = TextEncoder(
        TextEncoderConfig(**{**SMALL, "vocab_size": 125}, hidden_act="gelu", eos_token_id=119)
    )
    part = model_part("text_encoder", encoder)
    assert part.config == larger.config.to_dict()
    load_weights(larger, part.tensors)
    np.testing.assert_array_equal(larger(ids), encoder(ids))


def test_added_tokens_keep_the_precision_of_the_table():
    with dtype_policy("bfloat16"):
        encoder = TextEncoder(CONFIGS["openclip"])
    encoder.add_tokens(np.ones((1, 32)))
    encoder.add_tokens(np.zeros((1, 32)))
    assert {variable.dtype for variable in encoder.weights} == {"bfloat16"}
    np.testing.assert_array_equal(
        np.array(encoder.embeddings.token_vectors(np.array([120]))), np.ones((1, 32))
    )


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 31)), r"shape \(2, 31\) for new tokens; give \(count, 32\)"),
        (np.ones(32), r"shape \(32,\)"),
        (np.full((1, 32), np.inf), "NaN or infinity"),
    ],
)
def test_vectors_that_fit_no_table(vectors, message):
    encoder = TextEncoder(CONFIGS["openclip"])
    with pytest.raises(UserError, match=message):
        encoder.add_tokens(vectors)
    assert encoder.embeddings.learned_embedding is None
