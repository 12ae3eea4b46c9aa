"""Derives the config of a model from the names and shapes of its tensors, for files without a config.

Widths, depths and the places of attention follow from the tensors directly. Other values are inferred by
rules that give the published values for SD 1.x, SD 2.x and the x4 upscaler.
"""

import functools
import math

from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.weights.ldm_names import index_count

_HEAD_WIDTH = 64
_SD1_HEADS = 8
_MOST_GROUPS = 32
_OPEN_CLIP_H_WIDTH = 1024

# Widths of the text encodings that the UNets of SD 1.x and 2.x take.
_SD1_TEXT_WIDTH, _SD2_TEXT_WIDTH = 768, 1024

_PROJECTION = "attentions.0.proj_in.weight"
_SELF_KEY = "attentions.0.transformer_blocks.0.attn1.to_k.weight"
_TEXT_KEY = "attentions.0.transformer_blocks.0.attn2.to_k.weight"


def unet_config(tensors, sample_size):
    """Return the `config.json` of a UNet.

    SD 2.x (`is_sd2`) has heads of width 64 and computes attention scores in float32; other models (SD 1.x,
    the x4 upscaler) have 8 heads. A model without a middle block is a distilled one (BK-SDM). Normalisation
    has 32 groups, or as many as divide all widths.

    Args:
        tensors: dictionary of arrays by diffusers' names.
        sample_size: side of the latents that it was trained on.

    Raises:
        KeyError: a tensor that determines the shape is missing, or has too few axes.
    """
    size = functools.partial(_size, tensors)
    levels = range(max(1, index_count(tensors, "down_blocks.")))
    channels = tuple(size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in levels)
    attends = [f"down_blocks.{level}.{_TEXT_KEY}" in tensors for level in levels]
    up_attends = [f"up_blocks.{level}.{_TEXT_KEY}" in tensors for level in levels]
    has_middle = any(name.startswith("mid_block.") for name in tensors)
    middle_attends = f"mid_block.{_TEXT_KEY}" in tensors
    blocks = ["mid_block", *(f"down_blocks.{level}" for level in levels)]
    attending = next((block for block in blocks if f"{block}.{_TEXT_KEY}" in tensors), None)
    text_width = size(f"{attending}.{_TEXT_KEY}", 1) if attending else 0
    is_linear = attending is not None and tensors[f"{attending}.{_PROJECTION}"].ndim == 2
    classes = size("class_embedding.weight", 0) if "class_embedding.weight" in tensors else None
    sd2 = is_sd2(
        {"cross_attention_dim": text_width, "use_linear_projection": is_linear, "num_class_embeds": classes}
    )
    middle = "UNetMidBlock2DCrossAttn" if middle_attends else "UNetMidBlock2D"
    return UNetConfig(
        sample_size=sample_size,
        in_channels=size("conv_in.weight", 1),
        out_channels=size("conv_out.weight", 0),
        block_out_channels=channels,
        layers_per_block=index_count(tensors, "down_blocks.0.resnets."),
        down_block_types=_chosen(attends, "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=middle if has_middle else None,
        up_block_types=_chosen(up_attends, "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=tuple(map(_heads, channels)) if sd2 else _SD1_HEADS,
        upcast_attention=sd2,
        use_linear_projection=is_linear,
        only_cross_attention=_only_cross_attention(tensors, channels, attends),
        num_class_embeds=classes,
        norm_num_groups=math.gcd(_MOST_GROUPS, *channels),
    ).to_dict()


def is_sd2(config):
    """Return whether a UNet is of Stable Diffusion 2.x, by the width of its text encodings.

    Both families exist with linear layers and with 1 x 1 convolutions around the attention, which compute the
    same. If the width belongs to neither family, linear layers mean SD 2.x. The upscaler, which has class
    labels, is not SD 2.x.
    """
    if config["num_class_embeds"]:
        return False
    known = {_SD1_TEXT_WIDTH: False, _SD2_TEXT_WIDTH: True}
    return known.get(config["cross_attention_dim"], config["use_linear_projection"])


def _only_cross_attention(tensors, channels, attends):
    """Return False if all levels have self-attention, otherwise a tuple of whether each level lacks it.

    A level as wide as the text is ambiguous. It counts as self-attention, like the upscaler's coarsest level.
    """
    attends_to_itself = [
        attends[level] and _size(tensors, f"down_blocks.{level}.{_SELF_KEY}", 1) == channels[level]
        for level in range(len(channels))
    ]
    return False if attends_to_itself == attends else tuple(not itself for itself in attends_to_itself)


def vae_config(tensors, sample_size, scaling_factor):
    """Return the `config.json` of an autoencoder.

    Args:
        tensors: dictionary of arrays by diffusers' names.
        sample_size: side of the images that it was trained on.
        scaling_factor: factor of the latents that the UNet works on.

    Raises:
        KeyError: a tensor that determines the shape is missing, or has too few axes.
    """
    size = functools.partial(_size, tensors)
    # There is always a decoder; its levels count from the coarsest one.
    levels = range(max(1, index_count(tensors, "decoder.up_blocks.")))
    channels = tuple(size(f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 0) for level in levels)[::-1]
    has_encoder = any(name.startswith("encoder.") for name in tensors)
    return VAEConfig(
        sample_size=sample_size,
        in_channels=size("encoder.conv_in.weight", 1) if has_encoder else size("decoder.conv_out.weight", 0),
        out_channels=size("decoder.conv_out.weight", 0),
        latent_channels=size("decoder.conv_in.weight", 1),
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        layers_per_block=index_count(tensors, "decoder.up_blocks.0.resnets.") - 1,
        norm_num_groups=math.gcd(_MOST_GROUPS, *channels),
        scaling_factor=scaling_factor,
        force_upcast=True,  # the default of the published configs
        mid_block_add_attention=index_count(tensors, "decoder.mid_block.attentions.") > 0,
    ).to_dict()


def text_encoder_config(tensors, is_open_clip):
    """Return the `config.json` of a text encoder.

    Heads are 64 wide. OpenCLIP uses the exact GELU; a width of 1024 (ViT-H) always counts as OpenCLIP.

    Args:
        tensors: dictionary of arrays by transformers' names, each beginning with `text_model.` except for
            `text_projection.weight`.
        is_open_clip: whether it comes from OpenCLIP (SD 2.x) and not from CLIP (SD 1.x).

    Raises:
        KeyError: a tensor that determines the shape is missing, or has too few axes.
    """
    size = functools.partial(_size, tensors)
    vocabulary, width = (size("text_model.embeddings.token_embedding.weight", axis) for axis in range(2))
    is_open_clip = is_open_clip or width == _OPEN_CLIP_H_WIDTH
    return TextEncoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=size("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=index_count(tensors, "text_model.encoder.layers."),
        num_attention_heads=_heads(width),
        max_position_embeddings=size("text_model.embeddings.position_embedding.weight", 0),
        hidden_act="gelu" if is_open_clip else "quick_gelu",
        projection_dim=size("text_projection.weight", 0) if "text_projection.weight" in tensors else width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    ).to_dict()


def _size(tensors, name, axis):
    shape = tensors[name].shape
    if axis >= len(shape):
        raise KeyError(name)
    return shape[axis]


def _heads(width):
    return max(1, width // _HEAD_WIDTH)


def _chosen(flags, name, other):
    return tuple(name if flag else other for flag in flags)
