"""Architecture configs: dataclasses that read and write the public ``config.json`` files.

Field names are those of diffusers (``unet``, ``vae``, ``scheduler``) and transformers
(``text_encoder``, ``image_encoder``), so a config file found beside any public checkpoint is
read as it is, and one written here is read by those libraries.
"""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

from keras_sd.errors import UserError


class ConfigError(UserError):
    """A config file or value that cannot describe a model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configs: conversion to and from the JSON dictionary of one model part."""

    # Written to the file so that other libraries recognise the part; never read back.
    json_header: ClassVar[dict] = {}

    @classmethod
    def from_dict(cls, values):
        """Builds the config from a JSON dictionary; keys that do not describe shape are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        for name, value in known.items():
            if isinstance(value, list):
                known[name] = tuple(value)
        try:
            return cls(**known)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    def to_dict(self):
        """Returns the JSON dictionary, headed by what other libraries look for."""
        return {**self.json_header, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path):
        """Reads the config from a JSON file."""
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: not found; a diffusers folder has one per part") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: not a JSON file ({error})") from error

    def save(self, path):
        """Writes the config as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(Config):
    """CLIP's text transformer (``transformers.CLIPTextModel``). Defaults: SD 1.x (CLIP ViT-L/14)."""

    json_header: ClassVar[dict] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig(Config):
    """CLIP's vision transformer (``transformers.CLIPVisionModelWithProjection``)."""

    json_header: ClassVar[dict] = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
    }

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """The denoising UNet (``diffusers.UNet2DConditionModel``). Defaults: SD 1.x.

    ``attention_head_dim`` carries diffusers' historical meaning: the *number* of heads of each
    level for the cross-attention blocks, as in every published SD config.
    ``cross_attention_dim`` of 0 makes an unconditional UNet out of attention-free blocks.
    """

    json_header: ClassVar[dict] = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    only_cross_attention: bool | tuple = False
    num_class_embeds: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    act_fn: str = "silu"
    downsample_padding: int = 1
    center_input_sample: bool = False
    mid_block_scale_factor: float = 1.0

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ConfigError(
                f"UNet config: {levels} block_out_channels, {len(self.down_block_types)} "
                f"down_block_types and {len(self.up_block_types)} up_block_types; give one each per level"
            )

    @property
    def heads_per_level(self):
        """Number of attention heads at each level, from the finest resolution to the coarsest."""
        if isinstance(self.attention_head_dim, tuple):
            return self.attention_head_dim
        return (self.attention_head_dim,) * len(self.block_out_channels)


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """The KL autoencoder (``diffusers.AutoencoderKL``). Defaults: SD 1.x."""

    json_header: ClassVar[dict] = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.35.0"}

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    down_block_types: tuple = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    @property
    def downsampling(self):
        """Pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(Config):
    """The noise schedule (diffusers' ``scheduler_config.json``). Defaults: SD 1.x."""

    json_header: ClassVar[dict] = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.35.0"}

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip_sample: bool = False

    def __post_init__(self):
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"prediction_type {self.prediction_type!r}: unknown; use epsilon, v_prediction or sample"
            )


# The bundled `emoji` model: Stable Diffusion's recipe at 64 x 64 pixels and 8 x 8 x 16 latents.
EMOJI_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=32,
    projection_dim=128,
    bos_token_id=2046,
    eos_token_id=2047,
    pad_token_id=2047,
)
EMOJI_IMAGE_ENCODER = ImageEncoderConfig(
    image_size=64,
    patch_size=16,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    projection_dim=128,
)
EMOJI_VAE = VAEConfig(
    sample_size=64,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,
)
EMOJI_UNET = UNetConfig(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(128, 176),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,
    norm_num_groups=16,
)
EMOJI_SCHEDULER = SchedulerConfig(
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)

# Unconditional pictures of 64 x 64 pixels: no attention, the cosine schedule, as in the Keras DDIM example.
PIXEL_UNET = UNetConfig(
    sample_size=64,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64, 96, 128),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 4,
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",) * 4,
    norm_num_groups=8,
)
PIXEL_SCHEDULER = SchedulerConfig(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    clip_sample=True,
)
