"""Opens the parts of a model from any format, and checks that they fit together."""

import contextlib
import functools
import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from keras_sd import backend
from keras_sd.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.scheduler_options import OPTIONS, complete, unknown_keys
from keras_sd.errors import UserError
from keras_sd.files.json_files import shown
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import END_TOKEN, Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights import readers, rules
from keras_sd.weights.checkpoint import CLIP_HEAD, Checkpoint, Part
from keras_sd.weights.expected_shapes import is_decoder_alone

# OpenCLIP, the text encoder of SD 2, was trained with padding id 0, "!".
_OPEN_CLIP_PAD_TOKEN = "!"

_TOKENS, _LEARNED_TOKENS = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "learned"))

_MODELS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "image_encoder": (ImageEncoder, ImageEncoderConfig),
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
}


@contextlib.contextmanager
def _collection_paused():
    """A block, or a function, in which Python does not look for garbage.

    A model is 100,000 objects that all stay. While they are made, Python would look through these and through
    all of the backend's again and again, for 0.4 of the 0.9 seconds that opening Stable Diffusion takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collection_paused()
def open_parts(checkpoint, dtype="float32", partial=False):
    """Build the models of a `Checkpoint`, as `StableDiffusion` takes them.

    Args:
        dtype: precision of the weights and of the computation, as `rules.open_model` takes it.
        partial: accept missing or left-over weights, with a warning.

    Returns:
        A dictionary of those found among text_encoder, unet, vae, image_encoder, clip_head, tokenizer,
        scheduler_config, low_res_scheduler_config.

    Raises:
        UserError: the weights are not those of the config.
    """
    is_checked = not partial and backend.plan() is None  # which needs no values
    for name, part in checkpoint.parts.items() if is_checked else ():
        # Check all parts before the first one is built.
        rules.check_tensors(*_contents(name, part), part.source)
    parts = {name: _open_model(name, part, dtype, partial) for name, part in checkpoint.parts.items()}
    if "image_encoder" in parts:
        tensors = checkpoint.parts["image_encoder"].tensors
        head = {name: np.array(tensors[name], "float32") for name in CLIP_HEAD if name in tensors}
        parts["clip_head"] = head or None
    if checkpoint.tokenizer is not None:
        parts["tokenizer"] = Tokenizer.load(checkpoint.tokenizer)
    elif "text_encoder" in parts:
        source = checkpoint.parts["text_encoder"].source
        parts["tokenizer"] = _clip_tokenizer(parts["text_encoder"].config, source)
    if checkpoint.scheduler is not None:
        _warn_of_unknown_options(checkpoint.scheduler)
        parts["scheduler_config"] = SchedulerConfig.from_dict(
            checkpoint.scheduler, checkpoint.scheduler_repairs
        )
    if checkpoint.low_res_scheduler is not None:
        parts["low_res_scheduler_config"] = SchedulerConfig.from_dict(checkpoint.low_res_scheduler)
    return parts


def _warn_of_unknown_options(scheduler):
    names = unknown_keys(scheduler)
    if scheduler.get("_class_name") is None:  # read as the default class, which lacks some options
        usual = SchedulerConfig.json_header["_class_name"]
        complete(usual, scheduler)
        names += [key for key in scheduler if key[:1] != "_" and key not in {*OPTIONS[usual], *names}]
    if names:
        more = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
        warnings.warn(
            f"scheduler_config.json: {shown(names[0])} is unknown and has no effect{more}", stacklevel=3
        )


def _open_model(name, part, dtype="float32", partial=False):
    config, tensors = _contents(name, part)
    model_class, _ = _MODELS[name]
    if name == "vae" and is_decoder_alone(tensors):
        model_class = functools.partial(model_class, has_encoder=False)
    return rules.open_model(model_class, config, tensors, source=part.source, dtype=dtype, partial=partial)


def _contents(name, part):
    """Return the config of a `Part`, and its tensors without those that belong to no model."""
    _, config_class = _MODELS[name]
    tensors = {key: tensor for key, tensor in part.tensors.items() if key not in CLIP_HEAD}
    return config_class.from_dict(part.config), tensors


def _clip_tokenizer(config, source):
    """Return CLIP's tokenizer, which single files do not include; `source` is what was opened."""
    tokenizer = Tokenizer.clip(_OPEN_CLIP_PAD_TOKEN if config.hidden_act == "gelu" else END_TOKEN)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{source}: has no tokenizer, and CLIP's has {tokenizer.vocab_size} tokens where the text "
            f"encoder has {config.vocab_size}; open the diffusers folder of this model, which has one"
        )
    return tokenizer


@_collection_paused()
def load_part(path: str | Path, part: str, dtype: str = "float32") -> Any:
    """Opens one part of a model.

    Args:
        path: a folder in diffusers' layout, or a file that holds the part.
        part: "text_encoder", "image_encoder", "unet" or "vae".

    Raises:
        UserError: a file is missing or damaged, or the weights do not match the config.
    """
    return _open_model(part, readers.read_part(path, part), dtype)


def load_clip(path):
    """Open the CLIP of a folder or a file, as `StableDiffusion` takes it.

    Returns:
        A dictionary of tokenizer and text_encoder, and of image_encoder and clip_head if present.
    """
    checkpoint = readers.read_checkpoint(path)
    towers = {
        name: checkpoint.parts[name] for name in ("text_encoder", "image_encoder") if name in checkpoint.parts
    }
    if "text_encoder" not in towers:
        raise UserError(f"{path}: holds no text encoder; give a Stable Diffusion model or a CLIP")
    return open_parts(Checkpoint(towers, tokenizer=checkpoint.tokenizer))


def model_part(name, model, clip_head=None):
    """Return the `Part` as which a model is written."""
    tensors = rules.torch_state(model)
    if name == "image_encoder":
        tensors |= clip_head or {}
    if _LEARNED_TOKENS in tensors:
        # Other readers know only one embedding table.
        tensors[_TOKENS] = np.concatenate([tensors[_TOKENS], tensors.pop(_LEARNED_TOKENS)])
    return Part(model.config.to_dict(), tensors, Path(name))


def check_fit(tokenizer, text_encoder, unet, vae):
    """Raise a UserError if one part's output does not fit the next one's input."""
    text, image = text_encoder.config, vae.config
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder {text.vocab_size}; "
            "use parts of one model"
        )
    if tokenizer.max_length > text.max_position_embeddings:
        raise UserError(
            f"the tokenizer gives {tokenizer.max_length} tokens, the text encoder takes "
            f"{text.max_position_embeddings}; use parts of one model"
        )
    if unet.config.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"text encodings are {text.hidden_size} wide, the UNet takes {unet.config.cross_attention_dim}; "
            "use parts of one model"
        )
    latents = image.latent_channels
    # Latents alone; with a mask and a masked image's latents; with a low-resolution image.
    accepted = (latents, 2 * latents + 1, latents + image.in_channels)
    if unet.config.out_channels != latents or unet.config.in_channels not in accepted:
        raise UserError(
            f"the UNet has {unet.config.in_channels} channels in and {unet.config.out_channels} out, "
            f"the VAE's latents {latents}; use parts of one model"
        )
