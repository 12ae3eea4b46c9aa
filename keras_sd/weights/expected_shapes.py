"""The names and shapes of the tensors that a config describes, computed before a model is built.

Configs come from untrusted files. Building a model with a width of 10^12 would take all memory; listing its
names and shapes costs nothing, as long as the list ends soon after the file's own. The generators follow the
models of `keras_sd.models` layer by layer, and a test compares both.
"""

import itertools
import math
import warnings

from keras_sd.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.errors import UserError

_NAMED_AT_MOST = 5
_VAE_ENCODER = ("encoder.", "quant_conv.")
REMEDY = "use the config.json that belongs to these weights"
# A file with less than a tenth of a model's numbers probably belongs to another model, unless both are small.
_MOST_MISSING = 10
_SMALL = 10_000_000


def check_config(config, shapes, source, partial=False):
    """Raise a UserError unless a config describes the tensors of a file; does not build the model.

    Args:
        config: as in `expected_shapes`.
        shapes: dictionary of the shapes in the file by canonical name.
        source: the file's name in messages.
        partial: only warn of tensors that are missing, misshapen or left over, unless the model is much
            larger than the file.
    """
    most = 2 * len(shapes) + 1000
    walk = expected_shapes(config)
    if isinstance(config, VAEConfig) and is_decoder_alone(shapes):
        walk = (entry for entry in walk if not entry[0].startswith(_VAE_ENCODER))
    wanted = dict(itertools.islice(walk, most))
    kind = type(config).__name__.removesuffix("Config")
    if next(walk, None) is not None:
        raise UserError(
            f"{source}: holds {len(shapes)} tensors, its config describes a {kind} of more than {most}; "
            f"{REMEDY}"
        )
    held, described = values_count(shapes.values()), values_count(wanted.values())
    if partial and described > max(_MOST_MISSING * held, _SMALL):
        raise UserError(
            f"{source}: holds {held} numbers, its config describes a {kind} of {described}; {REMEDY}"
        )
    account(kind, wanted, shapes, source, partial)


def is_decoder_alone(names):
    """Return whether a VAE's tensors are those of a decoder without an encoder, by their names."""
    return any(name.startswith("decoder.") for name in names) and not any(
        name.startswith(_VAE_ENCODER) for name in names
    )


def account(model_name, wanted, shapes, source, partial=False, remedy=REMEDY):
    """Compare two sets of shapes; raise a UserError, or warn, with the number of faults and the first ones.

    Args:
        model_name: the model's name in messages.
        wanted, shapes: dictionaries of the shapes of the model and of the file, by canonical name.
        source, partial: as in `check_config`.
        remedy: for the message.
    """
    missing = [
        f"{name} is missing, the model has {shape}" for name, shape in wanted.items() if name not in shapes
    ]
    misshapen = [
        f"{name} is {shapes[name]}, the model has {shape}"
        for name, shape in wanted.items()
        if name in shapes and not same_shape(shapes[name], shape)
    ]
    extra = [f"{name} {shape} has no place" for name, shape in shapes.items() if name not in wanted]
    faults = missing + misshapen + extra
    if faults:
        named = "; ".join(faults[:_NAMED_AT_MOST]) + ("; ..." if len(faults) > _NAMED_AT_MOST else "")
        line = (
            f"{source}: {len(missing)} tensors missing, {len(misshapen)} misshapen, {len(extra)} left over "
            f"for {model_name}{_lost_parts(wanted, shapes)}: {named}"
        )
        if not partial:
            raise UserError(f"{line}. {remedy[:1].upper()}{remedy[1:]}")
        warnings.warn(f"{line}. The rest is loaded", stacklevel=5)


def _lost_parts(wanted, shapes):
    """Return a note for a message on the top modules of a model that have no tensor at all."""
    there = {name.partition(".")[0] for name in shapes}
    lost = dict.fromkeys(part for name in wanted if (part := name.partition(".")[0]) not in there)
    return f" (all of {', '.join(lost)} is missing)" if lost and shapes else ""


def same_shape(given, wanted):
    """Return whether shapes agree; a 1x1 convolution and a linear layer count as equal."""
    return given == wanted or given == wanted + (1, 1) or given + (1, 1) == wanted


def expected_shapes(config):
    """Yield the canonical name (`names.canonical_name`) and the torch shape of each tensor of a config.

    Args:
        config: a `TextEncoderConfig`, `ImageEncoderConfig`, `UNetConfig` or `VAEConfig`.
    """
    return _WALKS[type(config)](config)


def values_count(shapes):
    """Return the number of elements of tensors with these shapes."""
    return sum(map(math.prod, shapes))


def _layer(name, *shape, bias=True):
    """Yield a layer's weight, and a bias for each of its outputs."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _linear(name, inputs, outputs, bias=True):
    return _layer(name, outputs, inputs, bias=bias)


def _convolution(name, inputs, outputs, side=3):
    return _layer(name, outputs, inputs, side, side)


def _resnet(name, inputs, outputs, time_features=None):
    yield from _layer(f"{name}.norm1", inputs)
    yield from _convolution(f"{name}.conv1", inputs, outputs)
    if time_features:
        yield from _linear(f"{name}.time_emb_proj", time_features, outputs)
    yield from _layer(f"{name}.norm2", outputs)
    yield from _convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _convolution(f"{name}.conv_shortcut", inputs, outputs, side=1)


def _clip_blocks(config):
    width, hidden = config.hidden_size, config.intermediate_size
    for index in range(config.num_hidden_layers):
        name = f"encoder.layers.{index}"
        yield from _layer(f"{name}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", width, width)
        yield from _layer(f"{name}.layer_norm2", width)
        yield from _linear(f"{name}.mlp.fc1", width, hidden)
        yield from _linear(f"{name}.mlp.fc2", hidden, width)


def _text_encoder(config):
    width = config.hidden_size
    yield "embeddings.token_embedding.weight", (config.vocab_size, width)
    yield "embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    yield from _clip_blocks(config)
    yield from _layer("final_layer_norm", width)


def _image_encoder(config):
    width, side = config.hidden_size, config.patch_size
    yield "embeddings.class_embedding", (width,)
    yield "embeddings.patch_embedding.weight", (width, config.num_channels, side, side)
    yield "embeddings.position_embedding.weight", ((config.image_size // side) ** 2 + 1, width)
    yield from _layer("pre_layrnorm", width)
    yield from _clip_blocks(config)
    yield from _layer("post_layernorm", width)
    yield from _linear("visual_projection", width, config.projection_dim, bias=False)


def _unet(config):
    channels = config.block_out_channels
    time_features, last = 4 * channels[0], len(channels) - 1
    yield from _convolution("conv_in", config.in_channels, channels[0])
    yield from _linear("time_embedding.linear_1", channels[0], time_features)
    yield from _linear("time_embedding.linear_2", time_features, time_features)
    if config.num_class_embeds:
        yield "class_embedding.weight", (config.num_class_embeds, time_features)
    for level, outputs in enumerate(channels):
        inputs = channels[max(level - 1, 0)]
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        for index in range(config.layers_per_block):
            name = f"down_blocks.{level}"
            yield from _resnet(
                f"{name}.resnets.{index}", outputs if index else inputs, outputs, time_features
            )
            if attends:
                yield from _transformer(config, f"{name}.attentions.{index}", level)
        if level != last:
            yield from _convolution(f"down_blocks.{level}.downsamplers.0.conv", outputs, outputs)
    if config.mid_block_type:
        yield from _unet_middle(config, time_features)
    for index in range(len(channels)):
        yield from _unet_up_block(config, index, time_features)
    yield from _layer("conv_norm_out", channels[0])
    yield from _convolution("conv_out", channels[0], config.out_channels)


def _unet_middle(config, time_features):
    width, level = config.block_out_channels[-1], len(config.block_out_channels) - 1
    attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
    yield from _resnet("mid_block.resnets.0", width, width, time_features)
    if attends:
        yield from _transformer(config, "mid_block.attentions.0", level, may_skip_self_attention=False)
        yield from _resnet("mid_block.resnets.1", width, width, time_features)


def _unet_up_block(config, index, time_features):
    channels = config.block_out_channels
    level, name = len(channels) - 1 - index, f"up_blocks.{index}"
    outputs, before, at_end = channels[level], channels[min(level + 1, len(channels) - 1)], max(level - 1, 0)
    attends = config.up_block_types[index] == "CrossAttnUpBlock2D"
    for position in range(config.layers_per_block + 1):
        joined = channels[at_end] if position == config.layers_per_block else outputs
        inputs = (outputs if position else before) + joined
        yield from _resnet(f"{name}.resnets.{position}", inputs, outputs, time_features)
        if attends:
            yield from _transformer(config, f"{name}.attentions.{position}", level)
    if level:
        yield from _convolution(f"{name}.upsamplers.0.conv", outputs, outputs)


def _transformer(config, name, level, may_skip_self_attention=True):
    width, context = config.block_out_channels[level], config.cross_attention_dim
    skips = config.only_cross_attention
    skips = may_skip_self_attention and (skips[level] if isinstance(skips, tuple) else skips)
    window = () if config.use_linear_projection else (1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, *window)
    block = f"{name}.transformer_blocks.0"
    for attention, norm, seen in (
        ("attn1", "norm1", context if skips else width),
        ("attn2", "norm2", context),
    ):
        yield from _layer(f"{block}.{norm}", width)
        yield from _linear(f"{block}.{attention}.to_q", width, width, bias=False)
        yield from _linear(f"{block}.{attention}.to_k", seen, width, bias=False)
        yield from _linear(f"{block}.{attention}.to_v", seen, width, bias=False)
        yield from _linear(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.norm3", width)
    yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)
    yield from _linear(f"{block}.ff.net.2", 4 * width, width)
    yield from _layer(f"{name}.proj_out", width, width, *window)


def _vae(config):
    latents, moments = config.latent_channels, 2 * config.latent_channels
    yield from _vae_half(config, "encoder", config.in_channels, moments)
    yield from _vae_half(config, "decoder", latents, config.out_channels)
    if config.use_quant_conv:
        yield from _convolution("quant_conv", moments, moments, side=1)
    if config.use_post_quant_conv:
        yield from _convolution("post_quant_conv", latents, latents, side=1)


def _vae_half(config, half, inputs, outputs):
    encodes = half == "encoder"
    channels = config.block_out_channels if encodes else config.block_out_channels[::-1]
    blocks, samplers = ("down_blocks", "downsamplers") if encodes else ("up_blocks", "upsamplers")
    layers = config.layers_per_block if encodes else config.layers_per_block + 1
    middle = config.block_out_channels[-1]
    yield from _convolution(f"{half}.conv_in", inputs, channels[0])
    for level, width in enumerate(channels):
        for index in range(layers):
            before = width if index else channels[max(level - 1, 0)]
            yield from _resnet(f"{half}.{blocks}.{level}.resnets.{index}", before, width)
        if level < len(channels) - 1:
            yield from _convolution(f"{half}.{blocks}.{level}.{samplers}.0.conv", width, width)
    yield from _resnet(f"{half}.mid_block.resnets.0", middle, middle)
    if config.mid_block_add_attention:
        name = f"{half}.mid_block.attentions.0"
        yield from _layer(f"{name}.group_norm", middle)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.{projection}", middle, middle)
    yield from _resnet(f"{half}.mid_block.resnets.1", middle, middle)
    yield from _layer(f"{half}.conv_norm_out", channels[-1])
    yield from _convolution(f"{half}.conv_out", channels[-1], outputs)


_WALKS = {
    TextEncoderConfig: _text_encoder,
    ImageEncoderConfig: _image_encoder,
    UNetConfig: _unet,
    VAEConfig: _vae,
}
