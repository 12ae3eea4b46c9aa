"""Models describe themselves by the config of their part, and Keras makes them again from it."""

import copy
import dataclasses
import json
import pickle

import keras
import numpy as np
import pytest

from keras_sd import AutoencoderKL, ImageEncoder, NoiseSchedule, TextEncoder, UNet
from keras_sd.errors import UserError
from keras_sd.models.precision import dtype_policy
from tests import tiny

MODELS = pytest.mark.parametrize(
    "model, config, options",
    [
        (UNet, tiny.SD1_UNET, {}),
        (AutoencoderKL, tiny.VAE, {"has_encoder": False}),
        (AutoencoderKL, dataclasses.replace(tiny.VAE, force_upcast=True), {}),
        (TextEncoder, tiny.text_encoder_config(tiny.tokenizer()), {"learned_tokens": 3}),
        (ImageEncoder, tiny.IMAGE_ENCODER, {}),
    ],
)


@pytest.mark.parametrize("policy", ["float32", "float16"])
@MODELS
def test_model_is_made_again_from_its_config(model, config, options, policy):
    with dtype_policy(policy):
        made = model(config, **options)
    again = model.from_config(json.loads(json.dumps(made.get_config())))
    assert again.config == config and again.name == made.name
    assert again.get_config() == made.get_config()
    described = [[(v.path, v.shape, v.dtype) for v in one.variables] for one in (made, again)]
    assert described[0] == described[1]


@MODELS
def test_copies_are_the_same(model, config, options, tmp_path):
    with dtype_policy("float16"):
        made = tiny.randomize(model(config, **options))
    made.save(tmp_path / "model.keras")
    for again in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        assert again.get_config() == made.get_config() and again.compute_dtype == made.compute_dtype
        for ours, theirs in zip(made.weights, again.weights, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))


@pytest.mark.parametrize("model", [UNet, AutoencoderKL, TextEncoder, ImageEncoder, NoiseSchedule])
def test_no_config_is_one_line(model):
    for config in (None, {}, tiny.tokenizer()):
        with pytest.raises(UserError, match="^config .*: of another type; give a keras_sd.*Config$"):
            model(config)
    for config in (None, {}, {"config": {}}) if model is not NoiseSchedule else ():
        with pytest.raises(UserError, match="no config in it; give that of `get_config`"):
            model.from_config(config)
