"""Configs: public files are read as they are, and what is written is read back."""

import json

import pytest

from keras_sd import config
from keras_sd.config import ConfigError, TextEncoderConfig, UNetConfig, VAEConfig

EVERY = [value for name, value in vars(config).items() if name.startswith(("EMOJI_", "PIXEL_"))]


@pytest.mark.parametrize("value", EVERY, ids=lambda value: type(value).__name__)
def test_written_configs_are_read_back(tmp_path, value):
    value.save(tmp_path / "config.json")
    assert type(value).load(tmp_path / "config.json") == value


def test_keys_that_do_not_describe_shape_are_ignored():
    published = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [5, 10, 20, 20],
        "resnet_skip": 1,
    }
    unet = UNetConfig.from_dict({**published, "cross_attention_dim": 1024, "use_linear_projection": True})
    assert unet.heads_per_level == (5, 10, 20, 20)
    assert unet.cross_attention_dim == 1024
    assert UNetConfig().heads_per_level == (8, 8, 8, 8)


def test_written_unet_config_is_headed_by_its_class(tmp_path):
    UNetConfig().save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_vae_factor_follows_from_its_levels():
    assert VAEConfig().downsampling == 8
    assert config.EMOJI_VAE.downsampling == 8


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_files_that_are_no_json_end_in_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a JSON file") as raised:
        TextEncoderConfig.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_files_and_uneven_levels_end_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        TextEncoderConfig.load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="2 block_out_channels"):
        UNetConfig(block_out_channels=(8, 16))
