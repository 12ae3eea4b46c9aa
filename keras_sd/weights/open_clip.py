"""Reads and writes the files of OpenCLIP and of OpenAI's CLIP, which both use OpenAI's names.

Module names differ from transformers', and the projections of queries, keys and values are one tensor here.
The projections into the shared space are transposed, as they multiply from the right here.
"""

import functools
import math
import re
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

import numpy as np
from annotated_types import Interval
from typing_extensions import TypedDict

from keras_sd.arguments import checked_path
from keras_sd.config import LEGACY_END_TOKEN_ID, ImageEncoderConfig, TextEncoderConfig
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, shown
from keras_sd.files.writing import write_json
from keras_sd.weights import derived_config
from keras_sd.weights.checkpoint import CLIP_HEAD, Checkpoint, Part
from keras_sd.weights.ldm_names import index_count, inverted
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors
from keras_sd.weights.torch_pickle import read_torch

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


class TowerNames(NamedTuple):
    """The names of a tower: dictionaries from OpenCLIP's names to transformers', and transformers' prefix."""

    modules: dict[str, str]
    head: dict[str, str]
    prefix: str


TEXT = TowerNames(
    {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
        "transformer.resblocks": "encoder.layers",
    },
    {"text_projection": "text_projection.weight", "logit_scale": "logit_scale"},
    "text_model.",
)
VISION = TowerNames(
    {
        "class_embedding": "embeddings.class_embedding",
        "conv1": "embeddings.patch_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
    },
    {"proj": "visual_projection.weight"},
    "vision_model.",
)
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

_BLOCK_PATTERN = re.compile(r"(transformer\.resblocks|encoder\.layers)\.(\d+)\.(.+)")
_JOINT_PATTERN = re.compile(r"(.*)in_proj_(weight|bias)")
_QUERY_PATTERN = re.compile(r"(.*)q_proj\.(weight|bias)")
_JOINED = ("q_proj", "k_proj", "v_proj")

# Buffers in some files whose values follow from the config.
_NO_WEIGHTS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}

_HEAD_WIDTH, _MOST_IMAGE_HEADS = 64, 16
_EPSILON = 1e-5

# Config entries that change the computation but neither names nor shapes, and their supported values.
_COMPUTED = {
    "text_cfg": {"pool_type": ("argmax", "eos"), "no_causal_mask": (False,), "act_kwargs": (None,)},
    "vision_cfg": {"pool_type": ("tok",), "act_kwargs": (None,)},
}


def to_transformers(tensors, tower):
    """Return a tower's tensors under transformers' names; unknown tensors keep their names.

    Args:
        tensors: dictionary of arrays by OpenCLIP's names (`token_embedding.weight`, ...), without `visual.`.
        tower: `TEXT` or `VISION`.

    Returns:
        A dictionary of arrays: those of the tower under `text_model.` or `vision_model.`, and those of the
        head. Split and transposed arrays are views.
    """
    modules, head, prefix = tower
    renamed = {}
    for name, array in tensors.items():
        joint = _JOINT_PATTERN.fullmatch(name)
        if name in head:
            renamed[head[name]] = array.T
        elif joint:
            thirds = np.array_split(np.atleast_1d(array), len(_JOINED))
            for part, third in zip(_JOINED, thirds, strict=True):
                renamed[prefix + _renamed(f"{joint[1]}{part}.{joint[2]}", modules, _BLOCK)] = third
        else:
            new_name = _renamed(name, modules, _BLOCK)
            renamed[name if new_name == name else prefix + new_name] = array
    return renamed


def to_open_clip(tensors, tower):
    """Invert `to_transformers`; names may have the tower's prefix or not."""
    tensors = {canonical_name(name): array for name, array in tensors.items()}
    tensors.pop(None, None)
    modules, block, head = inverted(tower.modules), inverted(_BLOCK), inverted(tower.head)
    renamed = {}
    for name, array in tensors.items():
        query = _QUERY_PATTERN.fullmatch(name)
        if name in head:
            renamed[head[name]] = array.T
        elif query:
            thirds = [tensors[f"{query[1]}{part}.{query[2]}"] for part in _JOINED]
            renamed[_renamed(f"{query[1]}in_proj_{query[2]}", modules, block)] = np.concatenate(thirds)
        elif not any(f".{part}." in name for part in _JOINED):
            renamed[_renamed(name, modules, block)] = array
    return renamed


def _renamed(name, modules, block_modules):
    """Return the name with its modules, and those inside a block, renamed."""
    block = _BLOCK_PATTERN.fullmatch(name)
    if block:
        return f"{modules[block[1]]}.{block[2]}.{_renamed(block[3], block_modules, {})}"
    known = next((module for module in modules if name == module or name.startswith(f"{module}.")), None)
    return name if known is None else modules[known] + name[len(known) :]


def is_open_clip(path):
    """Return whether a file holds a CLIP with an image tower in OpenCLIP's names; False if unreadable."""
    try:
        return any(name.startswith("visual.") for name in _read_tensors(Path(path)))
    except UserError:
        return False


def read_open_clip(path, activation=None):
    """Read a CLIP model of OpenCLIP or OpenAI.

    An `open_clip_config.json` beside the weights takes precedence; OpenCLIP's models on the hub have one.
    Otherwise the config is derived from the shapes. Heads are 64 wide, but an image tower has at most 16,
    like all published ones (those of ViT-H/14 are 80 wide).

    Args:
        path: a `.safetensors` file, or a torch file (`.bin`, `.pt`) of OpenCLIP's training or of OpenAI.
        activation: "gelu" or "quick_gelu", which does not follow from the weights. None takes it from the
            config beside them. Without a config it is quick_gelu for OpenAI's own files, which hold an
            `input_resolution`, and for file names with "quickgelu" or "openai"; otherwise gelu.

    Returns:
        A `Checkpoint` with the parts text_encoder and image_encoder. The latter holds
        `text_projection.weight` `(projection, width)` and `logit_scale` too.

    Raises:
        UserError: the file is missing or damaged, or holds another model than a CLIP with a vision
            transformer and its own text transformer.
    """
    path = checked_path("path", path)
    if activation not in (None, "gelu", "quick_gelu"):
        raise UserError(f"activation {activation!r}: unknown; use gelu or quick_gelu")
    tensors = _read_tensors(path)
    config = _config_beside(path)
    if activation is None:
        activation = "quick_gelu" if _is_quick(config, path, tensors) else "gelu"
    text, vision = _towers(tensors, path)
    try:
        text_config = _text_config(text, config and config["text_cfg"], activation)
        image_config = _image_config(vision, config and config["vision_cfg"], activation)
    except KeyError as error:
        raise UserError(
            f"{path}: {error} is missing or has no shape of a CLIP's; give a whole CLIP"
        ) from error
    vision |= {name: text.pop(name) for name in CLIP_HEAD if name in text}
    parts = {"text_encoder": Part(text_config, text, path), "image_encoder": Part(image_config, vision, path)}
    return Checkpoint(parts)


def _read_tensors(path):
    saved = read_safetensors(path, True) if path.suffix == ".safetensors" else read_torch(path, True)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no dictionary of weights; give a checkpoint of OpenCLIP")
    # Distributed training adds "module.", OpenCLIP's class for other text towers adds "text.".
    return {name.removeprefix("module.").removeprefix("text."): array for name, array in _flattened(state)}


def _flattened(values, path=""):
    """Yield (dotted name, tensor) for nested dictionaries, which OpenAI's own files hold."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{path}{name}.")
        elif isinstance(value, np.ndarray):
            yield f"{path}{name}", value


Count = Annotated[int, Interval(ge=1, le=2**20)]


class _Tower(TypedDict):
    norm_kwargs: NotRequired[dict | None]


class _TextTower(_Tower):
    heads: NotRequired[Count]
    eos_id: NotRequired[int]


class _VisionTower(_Tower):
    head_width: NotRequired[Count]


class _Towers(TypedDict):
    text_cfg: _TextTower
    vision_cfg: _VisionTower


class OpenClipConfig(TypedDict):
    """The schema of `open_clip_config.json`."""

    model_cfg: _Towers


def _config_beside(path):
    """Return the `model_cfg` of the config beside the weights, or None."""
    path = path.with_name(CONFIG_NAME)
    if not path.is_file():
        return None
    config = read_json(path, OpenClipConfig, remedy="use OpenCLIP's own file")["model_cfg"]
    for tower, computed in _COMPUTED.items():
        for name, accepted in computed.items():
            value = config[tower].get(name, accepted[0])
            if value not in accepted:
                fault = f"{tower} {name} {shown(value)} is not supported"
                raise UserError(f"{path}: {fault}; use a model without it")
    return config


def _is_quick(config, path, tensors):
    if config is not None:
        return config.get("quick_gelu", False)
    name = path.name.lower()
    return "input_resolution" in tensors or "quickgelu" in name or "openai" in name


def _towers(tensors, path):
    """Return the tensors of the text tower and of the vision tower under transformers' names."""
    vision = {n.removeprefix("visual."): array for n, array in tensors.items() if n.startswith("visual.")}
    text = {n: a for n, a in tensors.items() if not n.startswith("visual.") and n not in _NO_WEIGHTS}
    text, vision = to_transformers(text, TEXT), to_transformers(vision, VISION)
    unknown = [name for name in text if not name.startswith((TEXT.prefix, *CLIP_HEAD))]
    known = (VISION.prefix, *VISION.head.values())
    unknown += [f"visual.{name}" for name in vision if not name.startswith(known)]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of its tensors have no place in a CLIP with a vision transformer and "
            f"its own text transformer, the first is {unknown[0]}; give such a one"
        )
    return text, vision


def _text_config(tensors, open_clip, activation):
    config = derived_config.text_encoder_config(tensors, is_open_clip=True) | {"hidden_act": activation}
    if open_clip:
        config["num_attention_heads"] = open_clip.get("heads", 8)
        config["layer_norm_eps"] = _epsilon(open_clip)
        if open_clip.get("pool_type") == "eos":
            config["eos_token_id"] = open_clip.get("eos_id", 2)
    return config


def _image_config(tensors, open_clip, activation):
    shape = functools.partial(_shape, tensors)
    width, channels, _, patch_size = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    heads = min(max(1, width // _HEAD_WIDTH), _MOST_IMAGE_HEADS)
    return ImageEncoderConfig(
        image_size=math.isqrt(positions - 1) * patch_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=width,
        intermediate_size=shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=index_count(tensors, "vision_model.encoder.layers."),
        num_attention_heads=width // open_clip.get("head_width", _HEAD_WIDTH) if open_clip else heads,
        hidden_act=activation,
        layer_norm_eps=_epsilon(open_clip or {}),
        projection_dim=shape("visual_projection.weight", 2)[0],
    ).to_dict()


def _shape(tensors, name, rank):
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise KeyError(name)
    return shape


def _epsilon(open_clip):
    return (open_clip.get("norm_kwargs") or {}).get("eps", _EPSILON)


def write_open_clip(path, checkpoint, dtype=None, save_tokenizer=None):
    """Write a CLIP for OpenCLIP: the weights, and beside them an `open_clip_config.json` and the tokenizer.

    OpenCLIP opens their folder as `local-dir:folder` if the weights have the name `WEIGHTS_NAME`.

    Args:
        path: the weights' file, a `.safetensors`.
        checkpoint: a `Checkpoint` with the parts text_encoder and image_encoder, the latter with
            `text_projection.weight` and `logit_scale` among its tensors.
        dtype: as in `write_safetensors`.
        save_tokenizer: function that writes transformers' tokenizer files into a folder. None if the
            vocabulary is CLIP's own, which OpenCLIP has.

    Raises:
        UserError: a part of a CLIP model is missing, or the file cannot be written.
    """
    # Imported here, as it loads a backend, which reading does not need.
    from keras_sd.models.image_encoder import PIXEL_DEVIATION, PIXEL_MEAN

    path = checked_path("path", path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a CLIP is written as safetensors; let the name end in .safetensors")
    missing = [part for part in ("text_encoder", "image_encoder") if part not in checkpoint.parts]
    if not missing:
        missing = [name for name in CLIP_HEAD if name not in checkpoint.parts["image_encoder"].tensors]
    if missing:
        raise UserError(f"{path}: the model has no {' and no '.join(missing)}; give a whole CLIP")
    text, image = checkpoint.parts["text_encoder"], checkpoint.parts["image_encoder"]
    config = open_clip_config(text.config, image.config)
    if save_tokenizer is not None:
        save_tokenizer(path.parent)
        # With any name here, OpenCLIP looks for the tokenizer beside the config.
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
    write_safetensors(path, open_clip_tensors(text, image), dtype)
    pixels = {"mean": PIXEL_MEAN.tolist(), "std": PIXEL_DEVIATION.tolist()}
    write_json(path.with_name(CONFIG_NAME), {"model_cfg": config, "preprocess_cfg": pixels})


def open_clip_tensors(text, image):
    """Return the tensors of both towers of a CLIP by OpenCLIP's names.

    Args:
        text, image: the `Part` of each, the latter with `text_projection.weight` and `logit_scale`.
    """
    head = {name: image.tensors[name] for name in CLIP_HEAD}
    vision = {name: array for name, array in image.tensors.items() if name not in head}
    tensors = to_open_clip({**text.tensors, **head}, TEXT)
    return tensors | {f"visual.{name}": array for name, array in to_open_clip(vision, VISION).items()}


def open_clip_config(text_config, image_config):
    """Return the entry of OpenCLIP's `model_configs` for a CLIP.

    Args:
        text_config, image_config: dictionaries of the two `config.json`.

    Raises:
        UserError: the towers have different activations or projections, which OpenCLIP does not support.
    """
    text, image = TextEncoderConfig.from_dict(text_config), ImageEncoderConfig.from_dict(image_config)
    for name in ("hidden_act", "projection_dim"):
        values = getattr(text, name), getattr(image, name)
        if values[0] != values[1]:
            raise UserError(
                f"{name} is {values[0]} in the text tower, {values[1]} in the image tower; OpenCLIP has one"
            )
    config = {"embed_dim": image.projection_dim}
    if image.hidden_act == "quick_gelu":
        config["quick_gelu"] = True
    vision_cfg = {"image_size": image.image_size, "patch_size": image.patch_size} | _tower_config(image)
    vision_cfg["head_width"] = image.hidden_size // image.num_attention_heads
    text_cfg = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    text_cfg |= _tower_config(text) | {"heads": text.num_attention_heads}
    if text.eos_token_id not in (text.vocab_size - 1, LEGACY_END_TOKEN_ID):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return config | {"vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _tower_config(config):
    ratio = config.intermediate_size / config.hidden_size
    # OpenCLIP rounds width * ratio down, so the ratio is rounded up, as in its own configs.
    tower = {"layers": config.num_hidden_layers, "width": config.hidden_size}
    tower["mlp_ratio"] = math.ceil(ratio * 1e4) / 1e4
    if config.layer_norm_eps != _EPSILON:
        tower["norm_kwargs"] = {"eps": config.layer_norm_eps}
    return tower
