"""Architecture configs: dataclasses that read and write the public ``config.json`` files.

Field names are those of diffusers (``unet``, ``vae``, ``scheduler``) and transformers
(``text_encoder``, ``image_encoder``), so a config file found beside any public checkpoint is
read as it is, and one written here is read by those libraries.
"""

import dataclasses
import sys
from typing import ClassVar

from keras_sd.errors import UserError
from keras_sd.files import write_json
from keras_sd.json_files import read_json, shown
from keras_sd.scheduler_options import OPTIONS

_LARGEST = sys.float_info.max
# No dimension of a model comes near these: vocabularies have 50,000 tokens, sides 1,024 pixels.
_LARGEST_SIZE = 2**20
_LARGEST_SIDE = 4096
_MOST_LEVELS = 16
_LARGEST_SCALING = 1000  # published autoencoders have 0.08 to 1.5

# Early public configs of CLIP say that the end token is 2, which it is not in CLIP's vocabulary. They are
# read as their models were trained: the end token is the largest id.
LEGACY_END_TOKEN_ID = 2


class ConfigError(UserError):
    """A config file or value that cannot describe a model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configs: conversion to and from the JSON dictionary of one model part.

    Raises:
        ConfigError: a value has another type than its field, or describes what is not computed here.
    """

    # Written so that other libraries recognise the part; its keys tell their files from bare dictionaries.
    json_header: ClassVar[dict] = {}
    # Values that a public file means by leaving a key out, where they differ from the fields' defaults.
    public_defaults: ClassVar[dict] = {}
    # Keys of public files that change the computation without being a field, with the values computed here.
    computed: ClassVar[dict] = {}
    # Fields for which null means something of its own, and not the default.
    nullable: ClassVar[tuple] = ()
    # Fields that hold a whole number of at least 1, or a tuple of them.
    sizes: ClassVar[tuple] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            accepted = int | float if field.type is float else field.type
            if not isinstance(value, accepted) or (type(value) is bool and field.type in (int, float)):
                kind = getattr(accepted, "__name__", accepted)
                raise self._error(f"{field.name} {shown(value)} is no {kind}")
            # Integers that no float holds are refused with those that are no number.
            if field.type is float and not abs(value) <= _LARGEST:
                raise self._error(f"{field.name} {shown(value)} is no finite number")
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
                    raise self._error(f"{name} {shown(value)} is no size")
                if size > self._largest(name):
                    raise self._error(f"{name} {shown(value)} is more than {self._largest(name)}")

    @staticmethod
    def _largest(name):
        return _LARGEST_SIDE if name in ("sample_size", "image_size") else _LARGEST_SIZE

    @classmethod
    def from_dict(cls, values):
        """Builds the config from the dictionary of a `config.json`.

        A key that is missing has the value that the library which published the file gives it. Keys that
        are no field are ignored where they do not change what is computed.

        Raises:
            ConfigError: the file describes a model that is not computed here.
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
    def _check_dictionary(cls, values):
        if not isinstance(values, dict):
            raise cls._error(f"{shown(values)} is no JSON dictionary")

    @classmethod
    def _error(cls, fault, remedy="use the config.json that belongs to the weights"):
        return ConfigError(f"{cls.__name__.removesuffix('Config')} config: {fault}; {remedy}")

    def to_dict(self):
        """Returns the JSON dictionary, headed by what other libraries look for."""
        return {**self.json_header, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path):
        """Reads the config from a JSON file."""
        absent = "a diffusers folder has one per part"
        return cls.from_dict(read_json(path, absent=absent, error=ConfigError))

    def save(self, path):
        """Writes the config as a JSON file."""
        write_json(path, self.to_dict())


def _tower_values(values, tower):
    """The values of one tower ("text" or "vision") of a config that may be that of a whole CLIP."""
    if not isinstance(values, dict) or f"{tower}_config" not in values:
        return values
    shared = {name: values[name] for name in ("projection_dim",) if name in values}
    # Early releases wrote the values that count into a second dictionary.
    parts = [values[f"{tower}_config"], values.get(f"{tower}_config_dict") or {}]
    for part in parts:
        if not isinstance(part, dict):
            raise ConfigError(f"{tower}_config {shown(part)}: no JSON dictionary; fetch the file again")
    nested = parts[0] | parts[1]
    return nested | shared | {"model_type": f"clip_{tower}_model"}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(Config):
    """CLIP's text transformer (``transformers.CLIPTextModel``). Defaults: SD 1.x (CLIP ViT-L/14)."""

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

    @classmethod
    def from_dict(cls, values):
        """As of every config; takes the dictionary of a whole CLIP (``CLIPModel``) too."""
        return super().from_dict(_tower_values(values, "text"))


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig(Config):
    """CLIP's vision transformer (``transformers.CLIPVisionModelWithProjection``)."""

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

    @classmethod
    def from_dict(cls, values):
        """As of every config; takes the dictionary of a whole CLIP (``CLIPModel``) too."""
        return super().from_dict(_tower_values(values, "vision"))


def _check_levels(config, names, allowed):
    """Raises a ConfigError unless each of the block types in the fields `names` has a level and is known."""
    levels = len(config.block_out_channels)
    for name, types in zip(names, allowed, strict=True):
        blocks = getattr(config, name)
        if len(blocks) != levels:
            raise config._error(
                f"{levels} block_out_channels, {len(blocks)} {name}", "give one each per level"
            )
        unknown = [block for block in blocks if block not in types]
        if unknown:
            raise config._error(f"{name} {shown(unknown[0])} is not supported", f"use {' or '.join(types)}")


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """The denoising UNet (``diffusers.UNet2DConditionModel``). Defaults: SD 1.x.

    ``attention_head_dim`` carries diffusers' historical meaning: the *number* of heads of each
    level for the cross-attention blocks, as in every published SD config.
    ``cross_attention_dim`` of 0 makes an unconditional UNet out of attention-free blocks.
    ``mid_block_type`` of None leaves out the block in the middle, as the distilled BK-SDM does.
    ``upcast_attention`` compares queries and keys in float32, where half precision would overflow.
    """

    json_header: ClassVar[dict] = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}
    public_defaults: ClassVar[dict] = {"cross_attention_dim": 1280}
    computed: ClassVar[dict] = {
        "_class_name": ("UNet2DConditionModel",),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "center_input_sample": (False, None),
        "transformer_layers_per_block": (1,),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False, None),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False, None),
        "addition_embed_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False, None),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
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
        _check_levels(
            self,
            ("down_block_types", "up_block_types"),
            (("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")),
        )
        for name in ("attention_head_dim", "only_cross_attention"):
            value, levels = getattr(self, name), len(self.block_out_channels)
            if isinstance(value, tuple) and len(value) != levels:
                raise self._error(
                    f"{levels} block_out_channels, {len(value)} {name}", "give one each per level"
                )

    @property
    def heads_per_level(self):
        """Number of attention heads at each level, from the finest resolution to the coarsest."""
        if isinstance(self.attention_head_dim, tuple):
            return self.attention_head_dim
        return (self.attention_head_dim,) * len(self.block_out_channels)


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """The KL autoencoder (``diffusers.AutoencoderKL``). Defaults: SD 1.x.

    ``force_upcast`` says that float16 has too small a range for the model, which then computes in float32.
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
        types = (("DownEncoderBlock2D",), ("UpDecoderBlock2D",))
        _check_levels(self, ("down_block_types", "up_block_types"), types)

    @property
    def downsampling(self):
        """Pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


# What holds for schedulers of diffusers that do not have the option.
_WITHOUT_OPTION = {
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
_MOST_TIMESTEPS = 100_000
_KEPT = ("published", "repairs")  # fields of `SchedulerConfig` that are no keys of a file


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(Config):
    """The noise schedule (diffusers' ``scheduler_config.json``). Defaults: SD 1.x.

    ``published`` is the file's dictionary as it was read, which is written again; None for a config that was
    made here. ``repairs`` are values that hold in place of the file's (`weights.old_models`).
    """

    json_header: ClassVar[dict] = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.35.0"}
    computed: ClassVar[dict] = {
        "_class_name": tuple(OPTIONS),
        "use_flow_sigmas": (False, None),
    }
    sizes: ClassVar[tuple] = ("num_train_timesteps",)

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
    published: dict | None = dataclasses.field(default=None, compare=False, repr=False)
    repairs: dict | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_dict(cls, values, repairs=None):
        """As of every config: a missing key has the default of the diffusers class in `_class_name`.

        Args:
            values: the dictionary of a `scheduler_config.json`.
            repairs: values that hold in place of those.
        """
        cls._check_dictionary(values)
        for name in ("beta_start", "beta_end"):
            if values.get(name, 0) is None:
                raise cls._error(f"{name} None is no number")
        name = values.get("_class_name")
        defaults = OPTIONS.get(name if isinstance(name, str) else None)
        filled = values if defaults is None else _WITHOUT_OPTION | defaults | values
        filled = {key: value for key, value in (filled | (repairs or {})).items() if key not in _KEPT}
        config = super().from_dict(filled)
        betas = values.get("trained_betas")
        if betas is not None and not _are_betas(betas, config.num_train_timesteps):
            raise cls._error(f"trained_betas are no {config.num_train_timesteps} numbers from 0 to 1")
        if name is None:  # no file of diffusers, which would take other values for what it leaves out
            published = None if betas is None else config.noise_schedule() | {"trained_betas": betas}
            return dataclasses.replace(config, published=published)
        return dataclasses.replace(config, published=dict(values), repairs=repairs)

    def to_dict(self, class_name="DDIMScheduler"):
        """The dictionary of a file: the one that was read, with what has been changed since.

        Args:
            class_name: of a schedule that no file describes.
        """
        if self.published is None:
            return self.noise_schedule() | {"_class_name": class_name}
        read = self.from_dict(self.published, self.repairs)
        changed = {name: value for name, value in self._values().items() if value != getattr(read, name)}
        return self.published | changed

    def noise_schedule(self):
        """A dictionary of all values, whatever file they came from: what a checkpoint keeps."""
        betas = {} if self.trained_betas is None else {"trained_betas": self.trained_betas}
        return self.json_header | self._values() | betas

    @property
    def trained_betas(self):
        """The noise that each timestep adds, where no rule gives it: a list of numbers, or None."""
        return (self.published or {}).get("trained_betas")

    @property
    def class_name(self):
        """The class of diffusers that the file is for."""
        return (self.published or {}).get("_class_name") or self.json_header["_class_name"]

    def options(self):
        """What a scheduler of diffusers is made of: the file's dictionary, set right."""
        return self.to_dict() | (self.repairs or {})

    def _values(self):
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _KEPT
        }

    def __post_init__(self):
        super().__post_init__()
        if self.num_train_timesteps > _MOST_TIMESTEPS:
            raise self._error(
                f"num_train_timesteps {shown(self.num_train_timesteps)} is more than {_MOST_TIMESTEPS}"
            )
        if not 0 <= self.beta_start <= self.beta_end <= 1 or not self.beta_end:
            raise self._error(
                f"beta_start {self.beta_start!r} and beta_end {self.beta_end!r} do not rise from 0 to 1"
            )
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"prediction_type {shown(self.prediction_type)}: unknown; use epsilon, v_prediction or sample"
            )


def _are_betas(values, count):
    """Whether they are the noise of that many timesteps."""
    is_list = isinstance(values, list | tuple) and len(values) == count
    return is_list and all(type(value) in (int, float) and 0 <= value < 1 for value in values)


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

# The bundled upscaler of pictures to twice the side. It predicts the picture itself, whose errors then
# count alike at all levels of noise, as what is seen beside the noise says nearly all.
UPSCALER_UNET = UNetConfig(
    sample_size=128,
    in_channels=6,
    out_channels=3,
    block_out_channels=(32, 48, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 3,
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",) * 3,
    num_class_embeds=101,
    norm_num_groups=8,
)
UPSCALER_SCHEDULER = dataclasses.replace(PIXEL_SCHEDULER, prediction_type="sample")
# The noise on the small picture: that of SD's x4 upscaler.
LOW_RES_SCHEDULER = SchedulerConfig(beta_start=0.0001, beta_end=0.02)
