"""Single-file checkpoints, the format of latent-diffusion (CompVis, StabilityAI) and of most user interfaces.

A single file holds tensors and no config, so the config is derived from the tensors. The same reader accepts
files of one part, under latent-diffusion's or diffusers' names.
"""

import re
import warnings

import numpy as np

from keras_sd.arguments import checked_path
from keras_sd.config import TextEncoderConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.weights import derived_config
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.ldm_names import (
    index_count,
    unet_to_diffusers,
    unet_to_ldm,
    vae_to_diffusers,
    vae_to_ldm,
)
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.open_clip import TEXT, to_open_clip, to_transformers
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors
from keras_sd.weights.stored_zip import ZIP_MAGIC
from keras_sd.weights.torch_pickle import LEGACY_MAGIC, read_torch

# Prefixes of programs that wrap a model in another module.
_WRAPPERS = ("", "module.", "model.", "state_dict.")
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

# The prefixes of each part, those of whole files first, and tensors that identify a part without a prefix.
_UNET_PREFIXES = (UNET_PREFIX, "diffusion_model.", "unet.", "")
_VAE_PREFIXES = (VAE_PREFIX, "vae.", "")
_CLIP_PREFIXES = (CLIP_PREFIX, "text_encoder.", "")
_UNET_SIGNS = ("input_blocks.0.0.weight", "time_embedding.linear_1.weight")
_VAE_SIGNS = ("decoder.conv_in.weight",)
_CLIP_SIGNS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
_OPEN_CLIP_SIGNS = ("token_embedding.weight",)

_SAFETENSORS, _TORCH = "a safetensors file", "a torch file"
_SUFFIXES = {".safetensors": _SAFETENSORS} | dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), _TORCH)
_RENAMING = {_SAFETENSORS: "rename it to end in .safetensors", _TORCH: "rename it to end in .ckpt"}
_SIGNATURES = {
    ZIP_MAGIC: _TORCH,
    LEGACY_MAGIC: _TORCH,
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"\x80": "a plain pickle",
}

_VAE_PATTERN = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")

# Other architectures that use the same prefixes.
_OTHER_MODELS = {
    "Stable Diffusion XL or unCLIP": r"conditioner\.embedders\.|.*label_emb\.0\.|add_embedding\.linear_1\.",
    "Stable Diffusion 3": r".*joint_blocks\.0\.",
    "Flux": r".*double_blocks\.0\.",
}
_IMAGE_TOWER = r"visual\.|vision_model\."
_OTHER_FILES = {
    "a LoRA": r"lora_|.*\.lora[._]|.*\.hada_|.*\.lokr_",
    "a textual inversion embedding": r"emb_params$|string_to_param|<.*>$|clip_[lg]$",
    "a ControlNet": r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.",
    "a CLIP with its image tower": _IMAGE_TOWER,
}

# CLIP's head, which compares texts with images; Stable Diffusion does not use it.
_CLIP_HEAD = ("text_projection", "logit_scale")

# Config entries that change the computation and do not follow from the tensors.
_NOT_IN_TENSORS = {
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "only_cross_attention",
    "scaling_factor",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "prediction_type",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
}

_UPSCALER_BETAS = {"beta_start": 0.0001, "beta_end": 0.02}
# The noise schedule of the upscaler's low-resolution image.
_UPSCALER_NOISE = SchedulerConfig(
    **_UPSCALER_BETAS, clip_sample=True, steps_offset=0, set_alpha_to_one=True
).to_dict("DDPMScheduler")

# SD 2.x uses the output of the last but one of OpenCLIP-H's 24 blocks, so the last one is never run.
_OPEN_CLIP_BLOCKS = 23

# The training step of the published 512-pixel base model of SD 2.0, which predicts noise.
_SD2_BASE_STEP = 875000


def read_single_file(path, weights="ema", prediction_type=None):
    """Read a file of Stable Diffusion 1.x, 2.x or the x4 upscaler, or of one of their parts.

    Configs are derived from the tensors (`derived_config`), and the noise schedule is the published one. The
    prediction type of SD 2.x does not follow from the tensors. The default is velocity at 768 pixels; it is
    noise at 512 pixels for inpainting, and for the base model if the file holds its training step.

    Args:
        path: a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file.
        weights: "ema" for the UNet's EMA weights, if the file has them; "raw" for the weights without EMA.
        prediction_type: "epsilon" or "v_prediction", if the default is wrong.

    Returns:
        A `Checkpoint` in diffusers' and transformers' names, with those of the parts text_encoder, unet and
        vae that the file holds, and with the schedules if it holds a UNet.

    Raises:
        UserError: the file is missing, damaged, not what its suffix says or not of Stable Diffusion.
    """
    path = checked_path("path", path)
    tensors, step = _read_tensors(path)
    _refuse_other_models(path, tensors)
    try:
        checkpoint = _checkpoint(path, tensors, step, weights, prediction_type)
    except KeyError as error:
        raise UserError(
            f"{path}: {error.args[0]} is missing or has too few axes, so the config cannot be derived; "
            "use an undamaged file, or a diffusers folder"
        ) from error
    if not checkpoint.parts:
        raise UserError(
            f"{path}: holds none of the parts of a Stable Diffusion model{_seems(tensors)}; "
            "give a file with a text encoder, a UNet or a VAE"
        )
    return checkpoint


def _read_tensors(path):
    """Return the file's tensors by name, and its training step or None."""
    found, expected = _kind(path), _SUFFIXES.get(path.suffix.lower())
    if found and expected and found != expected:
        remedy = _RENAMING.get(found, "fetch the weights themselves")
        raise UserError(f"{path}: not {expected}, as its suffix says, but {found}; {remedy}")
    kind = found or expected
    if kind == _SAFETENSORS:
        return read_safetensors(path, any_type=True), None
    if kind == _TORCH:
        return _torch_tensors(path)
    raise UserError(f"{path}: {kind or 'of no known kind'}; give a safetensors or a torch file")


def _torch_tensors(path):
    saved = read_torch(path, any_type=True)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no dictionary of weights; give a checkpoint of torch.save")
    tensors = {name: a for name, a in state.items() if isinstance(name, str) and isinstance(a, np.ndarray)}
    if not tensors:
        raise UserError(
            f"{path}: holds no tensors by name{_seems(map(str, state))}; give a model's checkpoint"
        )
    step = saved.get("global_step")
    return tensors, step if isinstance(step, int) else None


def _kind(path):
    """Return the file's format by its first bytes, or None."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: no such file; give a .safetensors or .ckpt file") from error
    if head[8:9] == b"{":
        return _SAFETENSORS
    if head.lstrip().startswith(b"<"):
        return "a web page"
    return next((kind for magic, kind in _SIGNATURES.items() if head.startswith(magic)), None)


def _refuse_other_models(path, tensors):
    found = _matching(_OTHER_MODELS, tensors)
    if found:
        raise UserError(
            f"{path}: this is {found}, another architecture; give Stable Diffusion 1.x, 2.x or x4"
        )


def _seems(names):
    found = _matching(_OTHER_FILES, list(names))
    return f", it seems to be {found}" if found else ""


def _matching(patterns, names):
    return next((kind for kind, p in patterns.items() if any(re.match(p, name) for name in names)), None)


def _checkpoint(path, tensors, step, weights, prediction_type):
    unet, vae = _unet_tensors(tensors, weights), _vae_tensors(tensors)
    text, is_open_clip = _text_tensors(tensors)
    is_upscaler = "class_embedding.weight" in unet if unet else _is_upscaler_vae(vae)
    parts, scheduler, side = {}, None, 256 if is_upscaler else 512
    if text:
        config = derived_config.text_encoder_config(text, is_open_clip)
        # Without the text projection, which only CLIP's comparison with images needs.
        own = {name: array for name, array in text.items() if name.startswith("text_model.")}
        parts["text_encoder"] = Part(config, own, path)
    if unet:
        config = derived_config.unet_config(unet, sample_size=128 if is_upscaler else 64)
        scheduler = _scheduler(config, step, prediction_type)
        if _is_sd2_text_to_image(config) and scheduler["prediction_type"] == "v_prediction":
            side, config["sample_size"] = 768, 96
        parts["unet"] = Part(config, unet, path)
    if vae:
        config = derived_config.vae_config(vae, side, 0.08333 if is_upscaler else 0.18215)
        parts["vae"] = Part(config, vae, path)
    return Checkpoint(parts, scheduler, _UPSCALER_NOISE if unet and is_upscaler else None)


def _prefix(tensors, prefixes, signs):
    """Return the prefix of a part's names, or None if the file does not hold the part.

    The prefix of whole files is sufficient, so that a damaged whole file gets a fitting message.
    """
    if any(name.startswith(prefixes[0]) for name in tensors):
        return prefixes[0]
    found = (f"{wrapper}{prefix}" for prefix in prefixes for wrapper in _WRAPPERS)
    return next((prefix for prefix in found if any(prefix + sign in tensors for sign in signs)), None)


def _below(tensors, prefix):
    """Return the tensors under a prefix, without it."""
    if prefix is None:
        return {}
    return {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}


def _unet_tensors(tensors, weights):
    prefix = _prefix(tensors, _UNET_PREFIXES, _UNET_SIGNS)
    unet = _below(tensors, prefix)
    if "time_embedding.linear_1.weight" in unet:
        return unet
    if weights == "ema" and prefix is not None:
        # The EMA weights are buffers, whose names have no dots.
        outer = f"{prefix.removesuffix(UNET_PREFIX)}model_ema.diffusion_model"
        averages = {name: f"{outer}{name.replace('.', '')}" for name in unet}
        unet = {name: tensors.get(averages[name], array) for name, array in unet.items()}
    return unet_to_diffusers(unet)


def _vae_tensors(tensors):
    below = _below(tensors, _prefix(tensors, _VAE_PREFIXES, _VAE_SIGNS))
    vae = {name: array for name, array in below.items() if _VAE_PATTERN.match(name)}
    if any(name.startswith("decoder.up_blocks.") for name in vae):
        return {canonical_name(name): array for name, array in vae.items()}
    return vae_to_diffusers(vae)


def _is_upscaler_vae(vae):
    """Return whether a VAE has three levels, like that of the x4 upscaler."""
    return index_count(vae, "decoder.up_blocks.") == 3


def _text_tensors(tensors):
    """Return the text encoder's tensors under transformers' names, and whether it is OpenCLIP's."""
    if any(re.match(_IMAGE_TOWER, name) for name in tensors):
        return {}, False  # not a part of Stable Diffusion
    open_clip = _below(tensors, _prefix(tensors, (OPEN_CLIP_PREFIX, ""), _OPEN_CLIP_SIGNS))
    if open_clip:
        return to_transformers({n: a for n, a in open_clip.items() if not _is_unused(n)}, TEXT), True
    clip = _below(tensors, _prefix(tensors, _CLIP_PREFIXES, _CLIP_SIGNS))
    if any(name.startswith("text_model.") for name in clip):  # the others do not belong to the text encoder
        clip = {name: array for name, array in clip.items() if name.startswith("text_model.")}
    names = {name: canonical_name(name) for name in clip}
    return {
        f"text_model.{names[name]}": array
        for name, array in clip.items()
        if names[name] and not names[name].startswith(_CLIP_HEAD)
    }, False


def _is_unused(name):
    """Return whether a tensor belongs to a block that is never run, or is a constant."""
    match = re.match(r"transformer\.resblocks\.(\d{1,4})\.", name)
    return name == "attn_mask" or (match is not None and int(match[1]) >= _OPEN_CLIP_BLOCKS)


def _is_sd2_text_to_image(unet_config):
    is_sd2 = derived_config.is_sd2(unet_config)
    return is_sd2 and unet_config["in_channels"] == unet_config["out_channels"]


def _scheduler(unet_config, step, prediction_type):
    if unet_config["num_class_embeds"]:
        return SchedulerConfig(**_UPSCALER_BETAS, prediction_type=prediction_type or "v_prediction").to_dict()
    predicts_velocity = _is_sd2_text_to_image(unet_config) and step != _SD2_BASE_STEP
    published = "v_prediction" if predicts_velocity else "epsilon"
    return SchedulerConfig(prediction_type=prediction_type or published).to_dict()


def write_single_file(path, checkpoint, dtype=None, tokenizer=None):
    """Write a model atomically as a `.safetensors` file in latent-diffusion's names.

    The format holds the text encoder, the UNet and the VAE, but no config: a warning names the values that a
    reader would derive wrongly. The image encoder and the tokenizer are left out.

    Args:
        path: the file, a `.safetensors`.
        checkpoint: a `Checkpoint`.
        dtype: as in `write_safetensors`.
        tokenizer: the model's own; the warning names it where it is not CLIP's, which a reader takes.

    Raises:
        UserError: there is nothing to write, `dtype` cannot hold a value, or the file cannot be written.
    """
    path = checked_path("path", path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: single files are written as safetensors; let the name end in .safetensors")
    tensors = {}
    for name, part in checkpoint.parts.items():
        tensors |= _ldm_tensors(name, part)
    if not tensors:
        raise UserError(f"{path}: no text encoder, UNet or VAE to write; give a Stable Diffusion model")
    lost = _lost_values(checkpoint, _checkpoint(path, tensors, None, "raw", None))
    if tokenizer is not None and tokenizer.vocab_size != TextEncoderConfig.vocab_size:
        lost.append(f"the tokenizer of {tokenizer.vocab_size} tokens, without which it cannot be opened")
    if lost:
        warnings.warn(f"{path}: cannot hold {'; '.join(lost)}: keep the model as a folder, too", stacklevel=2)
    write_safetensors(path, tensors, dtype)


def _ldm_tensors(name, part):
    """Return the tensors of a part under their names in a single file."""
    if name == "unet":
        return _under(UNET_PREFIX, unet_to_ldm(part.tensors, part.config))
    names = {given: canonical_name(given) for given in part.tensors}
    tensors = {names[given]: array for given, array in part.tensors.items() if names[given]}
    if name == "vae":
        return _under(VAE_PREFIX, vae_to_ldm(tensors, part.config))
    if name == "text_encoder":
        text = _under("text_model.", {n: a for n, a in tensors.items() if not n.startswith(_CLIP_HEAD)})
        if part.config["hidden_act"] == "gelu":
            return _under(OPEN_CLIP_PREFIX, to_open_clip(text, TEXT))
        return _under(CLIP_PREFIX, text)
    return {}


def _under(prefix, tensors):
    return {prefix + name: array for name, array in tensors.items()}


def _lost_values(checkpoint, derived):
    """Return descriptions of the values that a reader would derive wrongly."""
    pairs = [
        (name, part.config, derived.parts[name].config)
        for name, part in checkpoint.parts.items()
        if name in derived.parts
    ]
    if checkpoint.scheduler and derived.scheduler:
        kept = SchedulerConfig.from_dict(checkpoint.scheduler).noise_schedule()
        pairs.append(("scheduler", kept | checkpoint.scheduler, derived.scheduler))
    lost = [
        f"{name} {key} {given[key]} (read as {value})"
        for name, given, read in pairs
        for key, value in read.items()
        if key in _NOT_IN_TENSORS and key in given and not _same(given[key], value)
    ]
    sampler = (checkpoint.scheduler or {}).get("_class_name", "DDIMScheduler")
    if sampler != "DDIMScheduler":
        lost.append(f"the sampler {sampler} and its options (read as DDIM)")
    return lost


def _same(value, other):
    """Return whether two config values are equal; a single value stands for the same value at each level."""
    lists = [list(v) for v in (value, other) if isinstance(v, list | tuple)]
    if len(lists) == 1:
        return all(item == (other if isinstance(value, list | tuple) else value) for item in lists[0])
    return lists[0] == lists[1] if lists else value == other
