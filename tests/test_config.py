"""Configs: public files are read as they are meant, and what is written is read back."""

import json

import pytest

from keras_sd.config import ConfigError, ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.data.emoji import architecture
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.training import architectures
from tests.models import published
from tests.reference import run_reference

EVERY = [
    value
    for module in (architecture, architectures)
    for name, value in vars(module).items()
    if name.isupper() and hasattr(value, "save")
]
# diffusers makes no DPMSolverSDEScheduler where torchsde is not installed.
SCHEDULERS = [name for name in SchedulerConfig.computed["_class_name"] if name != "DPMSolverSDEScheduler"]

# What the published files describe, with the defaults of diffusers and transformers filled in by them.
SCRIPT = """
    import json
    import diffusers, transformers

    files = json.loads((folder / "files.json").read_text())
    filled = {}
    for title, values in files.items():
        if title.startswith("clip"):
            filled[title] = transformers.CLIPConfig(**values).to_dict()
        elif "_class_name" in values:
            filled[title] = dict(getattr(diffusers, values["_class_name"]).from_config(values).config)
        else:
            filled[title] = getattr(transformers, title.split()[0])(**values).to_dict()
    (folder / "filled.json").write_text(json.dumps(filled, default=str))
"""
TINY = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 2}
FILES = {name: {"_class_name": name} for name in SCHEDULERS} | {
    "SD 1": published.SD1_SCHEDULER,
    "SD 2": published.SD2_SCHEDULER,
    "low resolution": published.UPSCALER_LOW_RES_SCHEDULER,
    "UNet": {"_class_name": "UNet2DConditionModel", **TINY},
    "VAE": {"_class_name": "AutoencoderKL"},
    "CLIPTextConfig bare": {"model_type": "clip_text_model"},
    "CLIPTextConfig SD 1": published.SD1_TEXT_ENCODER,
    "CLIPTextConfig SD 2": published.SD2_TEXT_ENCODER,
    "CLIPVisionConfig bare": {"model_type": "clip_vision_model"},
    "clip": {
        "model_type": "clip",
        "projection_dim": 320,
        "text_config": {"hidden_size": 96, "num_attention_heads": 4, "hidden_act": "gelu"},
        "vision_config": {"patch_size": 16},
    },
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "files.json").write_text(json.dumps(FILES))
    run_reference(SCRIPT, {}, folder)
    return json.loads((folder / "filled.json").read_text())


def assert_agrees(ours, theirs):
    """Compares the fields that they have too; a null of theirs is what we choose ourselves."""
    values = ours.noise_schedule() if isinstance(ours, SchedulerConfig) else ours.to_dict()
    fields = json.loads(json.dumps(values))
    shared = {name for name in fields.keys() & theirs.keys() - ours.json_header.keys()}
    assert len(shared) > 4
    shared = {name for name in shared if theirs[name] is not None}
    assert {name: fields[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("title", [*SCHEDULERS, "SD 1", "SD 2", "low resolution"])
def test_missing_scheduler_keys_have_the_defaults_of_their_class(filled, title):
    assert_agrees(SchedulerConfig.from_dict(FILES[title]), filled[title])


@pytest.mark.parametrize(
    ("config_class", "title"),
    [
        (UNetConfig, "UNet"),
        (VAEConfig, "VAE"),
        *((TextEncoderConfig, f"CLIPTextConfig {name}") for name in ("bare", "SD 1", "SD 2")),
        (ImageEncoderConfig, "CLIPVisionConfig bare"),
    ],
)
def test_missing_model_keys_have_the_defaults_of_the_publisher(filled, config_class, title):
    assert_agrees(config_class.from_dict(FILES[title]), filled[title])


def test_towers_of_a_whole_clip(filled):
    text, image = TextEncoderConfig.from_dict(FILES["clip"]), ImageEncoderConfig.from_dict(FILES["clip"])
    assert_agrees(text, filled["clip"]["text_config"] | {"projection_dim": 320})
    assert_agrees(image, filled["clip"]["vision_config"] | {"projection_dim": 320})


def test_the_second_dictionary_of_early_clip_files_counts():
    values = {"text_config": {"hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
    assert TextEncoderConfig.from_dict(values).hidden_size == 768


def test_bare_dictionaries_have_the_defaults_of_stable_diffusion():
    assert SchedulerConfig.from_dict({"steps_offset": 0}) == SchedulerConfig(steps_offset=0)
    assert UNetConfig.from_dict({"in_channels": 9}) == UNetConfig(in_channels=9)


def test_published_configs_are_those_of_the_defaults():
    assert UNetConfig.from_dict(published.SD1_UNET) == UNetConfig()
    assert VAEConfig.from_dict(published.SD1_VAE) == VAEConfig(force_upcast=True)
    sd2 = UNetConfig.from_dict(published.SD2_UNET)
    assert sd2.heads_per_level == (5, 10, 20, 20) and sd2.upcast_attention and sd2.use_linear_projection
    assert UNetConfig().heads_per_level == (8, 8, 8, 8) and not UNetConfig().upcast_attention
    upscaler = UNetConfig.from_dict(published.UPSCALER_UNET)
    assert upscaler.only_cross_attention == (True, True, True, False) and upscaler.num_class_embeds == 1000
    assert VAEConfig.from_dict(published.UPSCALER_VAE).scaling_factor == 0.08333


@pytest.mark.parametrize("value", EVERY, ids=lambda value: type(value).__name__)
def test_written_configs_are_read_back(tmp_path, value):
    value.save(tmp_path / "config.json")
    assert type(value).load(tmp_path / "config.json") == value


def test_written_unet_config_is_headed_by_its_class(tmp_path):
    UNetConfig().save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_vae_factor_follows_from_its_levels():
    assert VAEConfig().downsampling == 8
    assert architecture.EMOJI_VAE.downsampling == 8


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        (UNetConfig, {"_class_name": "UNet2DModel"}, "_class_name 'UNet2DModel' is not supported"),
        (UNetConfig, {"resnet_time_scale_shift": "scale_shift"}, "use a model with 'default'"),
        (UNetConfig, {"dual_cross_attention": True}, "dual_cross_attention True"),
        (UNetConfig, {"num_attention_heads": 8}, "num_attention_heads 8 .* use a model with none"),
        (UNetConfig, {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        (UNetConfig, {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        (UNetConfig, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (UNetConfig, {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        (UNetConfig, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type .*Simple"),
        (UNetConfig, {"act_fn": "gelu"}, "use a model with 'silu' or 'swish'"),
        (UNetConfig, {"layers_per_block": [2, 2, 1, 1]}, r"\(2, 2, 1, 1\) is not of type int"),
        (UNetConfig, {"cross_attention_dim": "768"}, "cross_attention_dim '768' is not of type int"),
        (UNetConfig, {"norm_num_groups": 0}, "norm_num_groups 0 is not a size"),
        (
            UNetConfig,
            {"attention_head_dim": [5, 0, 10, 10]},
            r"attention_head_dim \(5, 0, 10, 10\) is not a size",
        ),
        (UNetConfig, {"block_out_channels": ["8", 8, 8, 8]}, "block_out_channels .* is not a size"),
        (UNetConfig, {"in_channels": 10**12}, "in_channels 1000000000000 is more than 1048576"),
        (UNetConfig, {"block_out_channels": [8] * 100}, "block_out_channels has 100 values, more than 16"),
        (
            TextEncoderConfig,
            {"vocab_size": 10**100},
            "vocab_size 1000+... is more than|vocab_size 1000+ is more",
        ),
        (UNetConfig, {"attention_head_dim": [5, 10]}, "4 block_out_channels, 2 attention_head_dim"),
        (UNetConfig, {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 4}, "use UpBlock2D or Cross"),
        (UNetConfig, {"block_out_channels": [8, 16]}, "2 block_out_channels, 4 down_block_types"),
        (VAEConfig, {"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' is not supported"),
        (VAEConfig, {"latents_mean": [0.5, 0.5, 0.5, 0.5]}, "latents_mean"),
        (VAEConfig, {"shift_factor": 0.1159}, "shift_factor 0.1159"),
        (VAEConfig, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "use DownEncoderBlock2D"),
        (VAEConfig, {"up_block_types": ["UpDecoderBlock2D"] * 3}, "3 up_block_types"),
        (TextEncoderConfig, {"model_type": "t5"}, "model_type 't5'"),
        (TextEncoderConfig, {"hidden_size": 76.8}, "hidden_size 76.8 is not of type int"),
        (ImageEncoderConfig, {"image_size": [224, 224]}, "image_size"),
        (SchedulerConfig, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "use a model with 'DDIM"),
        (SchedulerConfig, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (SchedulerConfig, {"trained_betas": [2.0] * 1000}, "no 1000 numbers from 0 to 1"),
        (SchedulerConfig, {"prediction_type": "flow"}, "prediction_type 'flow'"),
        (SchedulerConfig, {"_class_name": ["DDIMScheduler"]}, "_class_name .* is not supported"),
        (SchedulerConfig, {"_class_name": {}}, "_class_name {} is not supported"),
        (SchedulerConfig, {"beta_start": float("nan")}, "beta_start nan is not a finite number"),
        (SchedulerConfig, {"beta_end": 10**4000}, "beta_end 1000+... is not a finite number"),
        (SchedulerConfig, {"beta_end": None}, "beta_end None is no number"),
        (SchedulerConfig, {"beta_start": -0.1}, "beta_start -0.1 and beta_end 0.012 do not rise from 0 to 1"),
        (SchedulerConfig, {"beta_start": 0.02}, "do not rise"),
        (SchedulerConfig, {"beta_end": 1.5}, "do not rise"),
        (SchedulerConfig, {"beta_start": 0, "beta_end": 0}, "do not rise"),
        (SchedulerConfig, {"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000 is more than"),
        (VAEConfig, {"scaling_factor": 1e308}, "scaling_factor 1e.308"),
        (VAEConfig, {"scaling_factor": 0}, "scaling_factor 0"),
        (UNetConfig, {"norm_eps": 1e300}, "norm_eps 1e.300 is not between"),
        (SchedulerConfig, {"steps_offset": True}, "steps_offset True is not of type int"),
        (UNetConfig, {"norm_eps": float("inf")}, "norm_eps inf is not a finite number"),
        (UNetConfig, {"_class_name": ["UNet2DConditionModel"]}, "_class_name .* is not supported"),
        (TextEncoderConfig, {"text_config": 3}, "text_config 3: not a JSON dictionary"),
    ],
)
def test_what_is_not_computed_here_is_refused_in_one_line(config_class, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        config_class.from_dict(config_class().to_dict() | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json_end_in_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a JSON file") as raised:
        TextEncoderConfig.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
@pytest.mark.parametrize("config_class", [TextEncoderConfig, UNetConfig, SchedulerConfig])
def test_files_that_are_no_dictionary_end_in_one_line(tmp_path, config_class, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="not a JSON dictionary"):
        config_class.load(path)
    with pytest.raises(ConfigError, match="not a JSON dictionary"):
        config_class.from_dict(json.loads(content))


def test_folders_in_place_of_files_end_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TextEncoderConfig.load(tmp_path)


def test_missing_files_end_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        TextEncoderConfig.load(tmp_path / "config.json")
