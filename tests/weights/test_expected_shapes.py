"""Configs are compared with a file's tensors before a model is built of them."""

import dataclasses
import json
import shutil
import time
import tracemalloc
from pathlib import Path

import keras
import pytest

import keras_sd
from keras_sd.config import UNetConfig, VAEConfig
from keras_sd.data.emoji import architecture
from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.training import architectures
from keras_sd.weights.expected_shapes import check_config, expected_shapes
from keras_sd.weights.loading import open_parts
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.readers import read_checkpoint
from keras_sd.weights.rules import torch_shape, torch_state
from tests import tiny

EMOJI = Path(keras_sd.__file__).parent / "bundled" / "emoji"
SD1_UNET = UNetConfig(block_out_channels=(32, 64, 96, 96), cross_attention_dim=48)
SD2_UNET = dataclasses.replace(SD1_UNET, attention_head_dim=(1, 2, 4, 4), use_linear_projection=True)
X4_UNET = dataclasses.replace(
    SD1_UNET,
    in_channels=7,
    block_out_channels=(32, 64, 64, 96),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    only_cross_attention=(True, True, True, False),
    num_class_embeds=50,
    use_linear_projection=True,
)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (UNet, SD1_UNET),
        (UNet, SD2_UNET),
        (UNet, X4_UNET),
        (UNet, dataclasses.replace(X4_UNET, only_cross_attention=True)),
        (UNet, tiny.SD2_UNET),
        (UNet, tiny.ONE_BLOCK_UNET),
        (UNet, tiny.PIXEL_UNET),
        (UNet, architecture.EMOJI_UNET),
        (UNet, architectures.UPSCALER_UNET),
        (AutoencoderKL, VAEConfig(block_out_channels=(32, 32, 64, 64))),
        (AutoencoderKL, tiny.VAE),
        (
            AutoencoderKL,
            dataclasses.replace(
                tiny.VAE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False
            ),
        ),
        (TextEncoder, architecture.EMOJI_TEXT_ENCODER),
        (ImageEncoder, tiny.IMAGE_ENCODER),
    ],
)
def test_they_are_those_of_the_built_model(model_class, config):
    with tiny.without_initial_values():
        model = model_class(config)
    built = {canonical_name(parameter.name): torch_shape(parameter) for parameter in parameter_paths(model)}
    assert dict(expected_shapes(config)) == built


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(EMOJI, tmp_path / "model"))


ABSURD = [
    ("unet", {"cross_attention_dim": 10**12}),
    ("unet", {"block_out_channels": [10**6, 10**6]}),
    ("unet", {"layers_per_block": 10**6}),
    ("unet", {"num_class_embeds": 10**12}),
    ("vae", {"latent_channels": 10**6}),
    ("vae", {"layers_per_block": 2**20}),
    ("text_encoder", {"vocab_size": 10**6}),
    ("text_encoder", {"num_hidden_layers": 2**20}),
    ("image_encoder", {"image_size": 4096, "patch_size": 1}),
]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("part", "changes"), ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_sizes_are_one_line_at_once(folder, part, changes, partial):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    began = time.process_time()
    if not partial:
        tracemalloc.start()
    try:
        with pytest.raises(UserError) as raised:
            open_parts(read_checkpoint(folder), partial=partial)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(raised.value)
    if not partial:  # then nothing has been built
        assert time.process_time() - began < 1 and peak < 50 * 2**20


def test_modules_that_are_missing_are_named():
    shapes = {
        name: shape
        for name, shape in expected_shapes(tiny.VAE)
        if not name.startswith(("decoder", "post_quant"))
    }
    with pytest.raises(
        UserError, match=r"all of decoder, post_quant_conv is missing.*belongs to these weights"
    ):
        check_config(tiny.VAE, shapes, "vae.safetensors")


def test_every_part_is_checked_before_the_first_is_built(folder, monkeypatch):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 15}))
    monkeypatch.setattr(keras.layers.Layer, "add_weight", lambda *_, **__: pytest.fail("builds"))
    with pytest.raises(UserError, match="for VAE: "):
        open_parts(read_checkpoint(folder))


def test_one_shape_stands_for_a_linear_layer_and_a_convolution():
    state = torch_state(UNet(tiny.SD2_UNET))
    shapes = {
        name: (*array.shape, 1, 1) if ".proj_in.weight" in name else array.shape
        for name, array in state.items()
    }
    check_config(tiny.SD2_UNET, shapes, "unet.safetensors")
