"""Models describe themselves by the config of their part, and Keras makes them again from it."""

import json

import pytest

from keras_sd import AutoencoderKL, ImageEncoder, TextEncoder, UNet
from keras_sd.models.precision import dtype_policy
from tests import tiny


@pytest.mark.parametrize("policy", ["float32", "float16"])
@pytest.mark.parametrize(
    "model, config, options",
    [
        (UNet, tiny.SD1_UNET, {}),
        (AutoencoderKL, tiny.VAE, {"has_encoder": False}),
        (TextEncoder, tiny.text_encoder_config(tiny.tokenizer()), {}),
        (ImageEncoder, tiny.IMAGE_ENCODER, {}),
    ],
)
def test_model_is_made_again_from_its_config(model, config, options, policy):
    with dtype_policy(policy):
        made = model(config, **options)
    again = model.from_config(json.loads(json.dumps(made.get_config())))
    assert again.config == config and again.name == made.name
    assert again.get_config() == made.get_config()
    described = [[(v.path, v.shape, v.dtype) for v in one.variables] for one in (made, again)]
    assert described[0] == described[1]
