"""The image tower against transformers' CLIPVisionModelWithProjection with the same weights."""

import json

import keras
import numpy as np
import pytest

from keras_sd.config import ImageEncoderConfig
from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.weights.loading import load_part
from keras_sd.weights.rules import load_weights
from tests.reference import group_of, run_reference

SMALL = {
    "image_size": 24,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 20,
}
CONFIGS = {act: ImageEncoderConfig(**SMALL, hidden_act=act) for act in ("quick_gelu", "gelu")}
SCRIPT = """
    import json
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = ((inputs["images"].permute(0, 3, 1, 2) + 1) / 2 - mean) / deviation
    for name, values in json.loads((folder / "configs.json").read_text()).items():
        model = randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**values)), 0.2)
        store_weights(model, name + "/weights")
        outputs[name + "/embeddings"] = model(pixels).image_embeds
        result = model.vision_model(pixels, output_hidden_states=True)
        outputs[name + "/features"] = result.pooler_output
        outputs[name + "/hidden"] = result.last_hidden_state
        outputs[name + "/states"] = torch.stack(result.hidden_states[1:])
    values = {name: values[name] for name in values if name != "image_size"}
    towers = {"text_config": values | {"vocab_size": 40}, "vision_config": values | {"image_size": 24}}
    whole = randomize(CLIPModel(CLIPConfig(**towers, projection_dim=20)), 0.2)
    whole.save_pretrained(folder / "whole")
    outputs["whole"] = whole.get_image_features(pixels).pooler_output
"""


def images():
    return np.random.default_rng(0).uniform(-1, 1, (3, 24, 24, 3)).astype("float32")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "configs.json").write_text(json.dumps({name: CONFIGS[name].to_dict() for name in CONFIGS}))
    return run_reference(SCRIPT, {"images": images()}, folder)


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, reference):
    encoder = ImageEncoder(CONFIGS[request.param])
    outputs = group_of(reference, request.param)
    load_weights(encoder, group_of(outputs))
    return encoder, outputs


def assert_close(actual, expected):
    actual = keras.ops.convert_to_numpy(actual)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert np.abs(actual - expected).max() / expected.std() < 1e-5


def test_embeddings(loaded):
    encoder, expected = loaded
    assert_close(encoder(images()), expected["embeddings"])


def test_features(loaded):
    encoder, expected = loaded
    assert_close(encoder.features(images()), expected["features"])


def test_hidden_states_are_those_of_the_patches(loaded):
    encoder, expected = loaded
    states = keras.ops.stack(encoder.hidden_states(images()))
    assert_close(states, expected["states"][:, :, 1:])


def test_towers_of_a_whole_clip_are_opened(reference, tmp_path_factory):
    """A folder of transformers' `CLIPModel`, with one `config.json` and one file of weights."""
    folder = next(tmp_path_factory.getbasetemp().glob("reference*/whole"))
    assert_close(load_part(folder, "image_encoder")(images()), reference["whole"])
    assert load_part(folder, "text_encoder").config.vocab_size == 40


def test_patch_features(loaded):
    encoder, expected = loaded
    assert_close(encoder.patch_features(images()), expected["hidden"][:, 1:].reshape(3, 3, 3, 32))


def test_compiled_batches_of_any_size_agree(loaded):
    encoder, expected = loaded
    encoder.compile(jit_compile=True)
    assert_close(encoder.predict(images(), batch_size=2, verbose=0), expected["embeddings"])


def test_patches_are_a_strided_convolution():
    encoder = ImageEncoder(CONFIGS["gelu"])
    layer = encoder.embeddings.patch_embedding
    expected = keras.ops.conv(images(), layer.kernel, strides=8, data_format="channels_last")
    expected = keras.ops.convert_to_numpy(expected).reshape(3, 9, 32)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(images())), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 24, 23, 3), (1, 24, 24, 4), (24, 24, 3)])
def test_wrong_image_shape(shape):
    with pytest.raises(UserError, match=r"^image encoder: images are .* not \(24, 24, 3\)"):
        ImageEncoder(CONFIGS["gelu"])(np.zeros(shape, "float32"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("patch_size", 7, "does not divide into patches of 7"), ("num_channels", 1, "num_channels is 1")],
)
def test_impossible_config(field, value, message):
    with pytest.raises(UserError, match=message):
        ImageEncoder(ImageEncoderConfig(**{**SMALL, field: value}))
