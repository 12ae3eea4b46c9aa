"""Architecture configs: dataclasses that read and write the public ``config.json`` files.

Field names are those of diffusers (``unet``, ``vae``, ``scheduler``) and transformers
(``text_encoder``, ``image_encoder``), so a public checkpoint's config file can be read
unchanged, and those libraries read the files written here.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar, Self

from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, shown
from keras_sd.files.writing import write_json

_LARGEST = sys.float_info.max
# Far above any dimension of a model: vocabularies have 50,000 tokens, images 1,024 pixels.
_LARGEST_SIZE = 2**20
_LARGEST_SIDE = 4096
_MOST_LEVELS = 16
_LARGEST_SCALING = 1000  # published autoencoders have 0.08 to 1.5

# Early public configs of CLIP give the end token as 2, which is wrong for CLIP's vocabulary. They are read as
# their models were trained: the end token is the largest id.
LEGACY_END_TOKEN_ID = 2


class ConfigError(UserError):
    """A config file or value that does not describe a supported model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configs: conversion to and from the JSON dictionary of one model part.

    Raises:
        ConfigError: a value has the wrong type or is not supported.
    """

    # Keys by which other libraries recognise the part; they also distinguish their files from bare
    # dictionaries.
    json_header: ClassVar[dict] = {}
    # The meaning of keys that a public file leaves out, where it differs from the fields' defaults.
    public_defaults: ClassVar[dict] = {}
    # Keys of public files that change the computation but are not fields -> their supported values.
    computed: ClassVar[dict] = {}
    # Fields for which null is a value of its own and does not mean the default.
    nullable: ClassVar[tuple] = ()
    # Fields that hold a whole number of at least 1, or a tuple of them.
    sizes: ClassVar[tuple] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            accepted = int | float if field.type is float else field.type
            if not isinstance(value, accepted) or (type(value) is bool and field.type in (int, float)):
                kind = getattr(accepted, "__name__", accepted)
                raise self._error(f"{field.name} {shown(value)} is not of type {kind}")
            # Integers too large for a float are refused together with NaN.
            if field.type is float and not abs(value) <= _LARGEST:
                raise self._error(f"{field.name} {shown(value)} is not a finite number")
            if field.name.endswith("_eps") and not 0 < value < 1:
                raise self._error(f"{field.name} {shown(value)} is not between 0 and 1")
            if isinstance(value, tuple) and len(value) > _MOST_LEVELS:
                raise self._error(f"{field.name} has {len(value)} values, more than {_MOST_LEVELS}")
            if isinstance(value, int) and field.type is not float and value > self._largest(field.name):
                raise self._error(f"{field.name} {shown(value)} is more than {self._largest(field.name)}")
        for name in self.sizes:
            value = getattr(self, name)
            for size in value if isinstance(value, tuple) else [value]:
                if type(size) is not int or size < 1:
                    raise self._error(f"{name} {shown(value)} is not a size")
                if size > self._largest(name):
                    raise self._error(f"{name} {shown(value)} is more than {self._largest(name)}")

    @staticmethod
    def _largest(name):
        return _LARGEST_SIDE if name in ("sample_size", "image_size") else _LARGEST_SIZE

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build the config from the dictionary of a `config.json`.

        A missing key has the default of the library that published the file. Unknown keys are ignored if they
        do not change the computation.

        Raises:
            ConfigError: the file describes an unsupported model.
        """
        cls._check_dictionary(values)
        for name, accepted in cls.computed.items():
            given = values.get(name, accepted[0])
            is_per_level = isinstance(given, list) and name not in ("_class_name", "model_type")
            if any(value not in accepted for value in (given if is_per_level else [given])):
                known = " or ".join(repr(value) for value in accepted if value is not None)
                raise cls._error(
                    f"{name} {shown(given)} is not supported", f"use a model with {known or 'none'}"
                )
        if cls.json_header.keys() & values.keys():
            values = cls.public_defaults | values
        names = {field.name for field in dataclasses.fields(cls)}
        known = {
            name: value
            for name, value in values.items()
            if name in names and (value is not None or name in cls.nullable)
        }
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        )

    @classmethod
    def checked(cls, config: Any) -> Self:
        """Return a config that was given to a model, or raise a `ConfigError` if it is of another class."""
        if not isinstance(config, cls):
            raise ConfigError(f"config {shown(config)}: of another type; give a keras_sd.{cls.__name__}")
        return config

    @classmethod
    def _check_dictionary(cls, values):
        if not isinstance(values, dict):
            raise cls._error(f"{shown(values)} is not a JSON dictionary")

    @classmethod
    def _error(cls, fault, remedy="use the config.json that belongs to the weights"):
        return ConfigError(f"{cls.__name__.removesuffix('Config')} config: {fault}; {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON dictionary, headed by what other libraries look for."""
        return {**self.json_header, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the config from a JSON file."""
        absent = "a diffusers folder has one per part"
        return cls.from_dict(read_json(path, absent=absent, error=ConfigError))

    def save(self, path: str | Path) -> None:
        """Write the config as a JSON file."""
        write_json(path, self.to_dict())


class _TowerConfig(Config):
    """Base of the configs of CLIP's two towers."""

    tower: ClassVar[str]

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build the config from the dictionary of the tower, or of a whole CLIP (``CLIPModel``).

        Raises:
            ConfigError: as `Config.from_dict`.
        """
        key = f"{cls.tower}_config"
        if isinstance(values, dict) and key in values:
            # Early releases wrote the effective values into a second dictionary.
            parts = [values[key], values.get(f"{key}_dict") or {}]
            for part in parts:
                if not isinstance(part, dict):
                    raise ConfigError(f"{key} {shown(part)}: not a JSON dictionary; fetch the file again")
            shared = {name: values[name] for name in ("projection_dim",) if name in values}
            values = parts[0] | parts[1] | shared | {"model_type": f"clip_{cls.tower}_model"}
        return super().from_dict(values)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(_TowerConfig):
    """CLIP's text transformer (``transformers.CLIPTextModel``). Defaults: SD 1.x (CLIP ViT-L/14)."""

    tower: ClassVar[str] = "text"
    json_header: ClassVar[dict] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    public_defaults: ClassVar[dict] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "projection_dim": 512,
    }
    computed: ClassVar[dict] = {"model_type": ("clip_text_model",)}
    sizes: ClassVar[tuple] = (
        *("vocab_size", "hidden_size", "intermediate_size", "projection_dim"),
        *("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    )

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
class ImageEncoderConfig(_TowerConfig):
    """CLIP's vision transformer (``transformers.CLIPVisionModelWithProjection``)."""

    tower: ClassVar[str] = "vision"
    json_header: ClassVar[dict] = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
    }
    public_defaults: ClassVar[dict] = {
        "patch_size": 32,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    }
    computed: ClassVar[dict] = {"model_type": ("clip_vision_model",)}
    sizes: ClassVar[tuple] = (
        *("image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "projection_dim"),
    )

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


class _LeveledConfig(Config):
    """Base of the configs of models with several resolutions (levels)."""

    def _check_levels(self, *names):
        """Raise a ConfigError unless each field has one value for each level; single values are accepted."""
        levels = len(self.block_out_channels)
        for name in names:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                fault = f"{levels} block_out_channels, {len(value)} {name}"
                raise self._error(fault, "give one each per level")

    def _check_blocks(self, name, *types):
        """Raise a ConfigError unless a field has one of these block types for each level."""
        self._check_levels(name)
        for block in getattr(self, name):
            if block not in types:
                raise self._error(f"{name} {shown(block)} is not supported", f"use {' or '.join(types)}")


@dataclasses.dataclass(frozen=True)
class UNetConfig(_LeveledConfig):
    """The denoising UNet (``diffusers.UNet2DConditionModel``). Defaults: SD 1.x.

    ``attention_head_dim`` is the *number* of attention heads at each level, for historical reasons, as in
    diffusers and in every published SD config.
    ``cross_attention_dim`` 0 means an unconditional UNet without cross-attention.
    ``mid_block_type`` None leaves out the middle block, as in the distilled BK-SDM.
    ``upcast_attention`` computes attention scores in float32, where half precision would overflow.
    """

    json_header: ClassVar[dict] = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}
    public_defaults: ClassVar[dict] = {"cross_attention_dim": 1280}
    computed: ClassVar[dict] = {
        "_class_name": ("UNet2DConditionModel",),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "act_fn": ("silu", "swish"),
        "time_embedding_type": ("positional",),
        "resnet_time_scale_shift": ("default",),
        "attention_type": ("default",),
        **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"), (1,)),
        "transformer_layers_per_block": (1,),
        **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
        **dict.fromkeys(
            [
                *("reverse_transformer_layers_per_block", "num_attention_heads", "cross_attention_norm"),
                *("encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "addition_embed_type"),
                *("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim"),
            ],
            (None,),
        ),
        **dict.fromkeys(("center_input_sample", "dual_cross_attention"), (False, None)),
        **dict.fromkeys(("class_embeddings_concat", "resnet_skip_time_act"), (False, None)),
    }
    nullable: ClassVar[tuple] = ("mid_block_type",)
    sizes: ClassVar[tuple] = (
        *("sample_size", "in_channels", "out_channels", "block_out_channels"),
        *("layers_per_block", "attention_head_dim", "norm_num_groups"),
    )

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    only_cross_attention: bool | tuple = False
    upcast_attention: bool = False
    num_class_embeds: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_blocks("down_block_types", "DownBlock2D", "CrossAttnDownBlock2D")
        self._check_blocks("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D")
        self._check_levels("attention_head_dim", "only_cross_attention")

    @property
    def heads_per_level(self) -> tuple[int, ...]:
        """Number of attention heads at each level, from the finest resolution to the coarsest."""
        if isinstance(self.attention_head_dim, tuple):
            return self.attention_head_dim
        return (self.attention_head_dim,) * len(self.block_out_channels)


@dataclasses.dataclass(frozen=True)
class VAEConfig(_LeveledConfig):
    """The KL autoencoder (``diffusers.AutoencoderKL``). Defaults: SD 1.x.

    ``force_upcast`` computes in float32 where float16 would overflow.
    """

    json_header: ClassVar[dict] = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.35.0"}
    public_defaults: ClassVar[dict] = {
        "sample_size": 32,
        "block_out_channels": [64],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "layers_per_block": 1,
        "force_upcast": True,
    }
    computed: ClassVar[dict] = {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    sizes: ClassVar[tuple] = (
        *("sample_size", "in_channels", "out_channels", "latent_channels"),
        *("block_out_channels", "layers_per_block", "norm_num_groups"),
    )

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    down_block_types: tuple = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scaling_factor <= _LARGEST_SCALING:
            raise self._error(
                f"scaling_factor {shown(self.scaling_factor)} is not above 0 and up to {_LARGEST_SCALING}"
            )
        self._check_blocks("down_block_types", "DownEncoderBlock2D")
        self._check_blocks("up_block_types", "UpDecoderBlock2D")

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)
