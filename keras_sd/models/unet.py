"""The denoising UNet (Rombach et al., 2022): one class for latent text-to-image and pixel DDIM.

The attribute tree is that of diffusers' ``UNet2DConditionModel``. A level has attention to the text if its
block type has it. Models differ in their config only.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.config import UNetConfig
from keras_sd.errors import UserError
from keras_sd.models.attention import SpatialTransformer
from keras_sd.models.gradient_checkpointing import RecomputingLayer
from keras_sd.models.initializers import normal
from keras_sd.models.layers import (
    Downsample,
    GroupNormalization,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    convolution,
    embedding,
    sinusoidal_features,
)
from keras_sd.models.precision import ConfiguredModel


def _resnet(config, inputs, outputs):
    return ResnetBlock(
        inputs,
        outputs,
        time_features=4 * config.block_out_channels[0],
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
    )


def _transformer(config, level, channels, *, may_skip_self_attention=True):
    only_cross_attention = config.only_cross_attention
    if isinstance(only_cross_attention, tuple):
        only_cross_attention = only_cross_attention[level]
    return SpatialTransformer(
        channels,
        config.cross_attention_dim,
        config.heads_per_level[level],
        groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
        only_cross_attention=may_skip_self_attention and only_cross_attention,
        upcast=config.upcast_attention,
    )


class DownBlock(RecomputingLayer):
    """Residual blocks of the down path, each followed by attention to the text if the block type has it.

    A call returns the last feature map and the list of all feature maps, for the up path.
    """

    def __init__(self, config, level, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels
        inputs, outputs = channels[max(level - 1, 0)], channels[level]
        layers = range(config.layers_per_block)
        self.resnets = [_resnet(config, outputs if index else inputs, outputs) for index in layers]
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = [_transformer(config, level, outputs) for _ in layers] if attends else []
        is_last = level == len(channels) - 1
        self.downsamplers = [] if is_last else [Downsample(outputs)]

    def call(self, hidden, time_embedding, context=None):
        skips = []
        for index, resnet in enumerate(self.resnets):
            hidden = self._recomputed(resnet)(hidden, time_embedding)
            if self.attentions:
                hidden = self._recomputed(self.attentions[index])(hidden, context)
            skips.append(hidden)
        for downsample in self.downsamplers:
            hidden = downsample(hidden)
            skips.append(hidden)
        return hidden, skips


class MidBlock(RecomputingLayer):
    """Two residual blocks with attention between them at the coarsest level; without text, one block."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels[-1]
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = [_resnet(config, channels, channels) for _ in range(2 if attends else 1)]
        level = len(config.block_out_channels) - 1
        self.attentions = (
            [_transformer(config, level, channels, may_skip_self_attention=False)] if attends else []
        )

    def call(self, hidden, time_embedding, context=None):
        hidden = self._recomputed(self.resnets[0])(hidden, time_embedding)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = self._recomputed(attention)(hidden, context)
            hidden = self._recomputed(resnet)(hidden, time_embedding)
        return hidden


class UpBlock(RecomputingLayer):
    """Residual blocks of the up path; each takes a feature map of the down path as well.

    All levels but the last then upsample to `size` `(height, width)`, that of the next such feature map.
    """

    def __init__(self, config, index, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels
        level = len(channels) - 1 - index
        outputs = channels[level]
        same = [outputs] * config.layers_per_block
        inputs = [channels[min(level + 1, len(channels) - 1)], *same]
        skips = [*same, channels[max(level - 1, 0)]]
        self.resnets = [_resnet(config, sum(both), outputs) for both in zip(inputs, skips, strict=True)]
        attends = config.up_block_types[index] == "CrossAttnUpBlock2D"
        self.attentions = [_transformer(config, level, outputs) for _ in inputs] if attends else []
        self.upsamplers = [Upsample(outputs)] if level else []

    def call(self, hidden, skips, time_embedding, context=None, size=(None, None)):
        for index, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            hidden = self._recomputed(resnet, _joined)(hidden, skip, time_embedding)
            if self.attentions:
                hidden = self._recomputed(self.attentions[index])(hidden, context)
        for upsample in self.upsamplers:
            hidden = upsample(hidden, size=size)
        return hidden


def _joined(resnet, hidden, skip, time_embedding):
    return resnet(ops.concatenate([hidden, skip], axis=-1), time_embedding)


@keras.saving.register_keras_serializable("keras_sd")
class UNet(ConfiguredModel):
    """The network that predicts the noise, the velocity or the image in noisy latents.

    Call it on `[latents (n, h, w, c), timesteps (n,), context (n, tokens, features)]`, or on the first two
    for an unconditional model. It returns float32 `(n, h, w, out_channels)`. The sinusoidal features
    `(n, k)` of the timesteps are accepted in their place. A model with `num_class_embeds` also takes
    `class_labels (n,)` (the noise level, in the x4 upscaler).

    The output of the levels below the outermost one changes little from one sampling step to the next
    (DeepCache, Ma et al., 2024). With `returns_deep`, a call also returns this output: the feature map
    `(n, h, w, features)` that enters the outermost block of the up path. With that feature map as `deep`,
    only the outermost level is computed.

    With `returns_bottleneck`, a call also returns the output of the middle block, or of the last block of the
    down path in a model without one: `(n, rows, columns, features)` in the computation's precision.

    Raises:
        UserError: the bottleneck is asked for along with `deep`, which leaves it out.

    Example:
        ```python
        unet = keras_sd.UNet(keras_sd.UNetConfig(sample_size=64))
        noise = unet([np.zeros((1, 64, 64, 4)), np.array([500]), np.zeros((1, 77, 768))])
        ```
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig, **kwargs: Any) -> None:
        # Without autocast, which would round timesteps in half precision; `call` casts the other inputs.
        super().__init__(config, autocast=False, **kwargs)
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        time_features = 4 * channels[0]
        self.conv_in = convolution(config.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], time_features)
        if config.num_class_embeds:
            self.class_embedding = embedding(config.num_class_embeds, time_features, normal(0.02))
        self.down_blocks = [DownBlock(config, level) for level in levels]
        self.mid_block = MidBlock(config) if config.mid_block_type else None
        self.up_blocks = [UpBlock(config, index) for index in levels]
        self.conv_norm_out = GroupNormalization(
            channels[0], config.norm_num_groups, config.norm_eps, silu=True
        )
        self.conv_out = convolution(channels[0], config.out_channels, kernel_initializer="zeros")
        self.built = True

    def _embed_time(self, timesteps, class_labels):
        features = timesteps
        if len(timesteps.shape) == 1:
            features = sinusoidal_features(
                timesteps,
                self.config.block_out_channels[0],
                flip_sin_to_cos=self.config.flip_sin_to_cos,
                frequency_shift=self.config.freq_shift,
            )
        embedded = self.time_embedding(ops.cast(features, self.compute_dtype))
        if self.config.num_class_embeds:
            embedded = embedded + self.class_embedding(class_labels)
        return ops.silu(embedded)

    def bottleneck_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return rows, columns and features of the bottleneck for latents of that size."""
        factor = 2 ** (len(self.down_blocks) - 1)  # a convolution of stride 2 rounds up
        return -(-height // factor), -(-width // factor), self.config.block_out_channels[-1]

    def call(
        self,
        inputs: Sequence[Tensor],
        class_labels: Tensor = None,
        deep: Tensor = None,
        returns_deep: bool = False,
        returns_bottleneck: bool = False,
    ) -> Tensor:
        if returns_bottleneck and deep is not None:
            raise UserError("returns_bottleneck True: `deep` leaves the bottleneck out; leave one out")
        latents, timesteps, context = inputs if len(inputs) == 3 else (*inputs, None)
        time_embedding = self._embed_time(timesteps, class_labels)
        if context is not None:
            context = ops.cast(context, self.compute_dtype)
        hidden = self.conv_in(ops.cast(latents, self.compute_dtype))
        skips = [hidden]
        for block in self.down_blocks if deep is None else self.down_blocks[:1]:
            hidden, block_skips = block(hidden, time_embedding, context)
            skips.extend(block_skips)
        *inner_blocks, outermost = self.up_blocks
        if deep is None:
            bottleneck = self.mid_block(hidden, time_embedding, context) if self.mid_block else hidden
            deep = bottleneck
            for block in inner_blocks:
                count = len(block.resnets)
                skips, block_skips = skips[:-count], skips[-count:]
                size = tuple(skips[-1].shape[1:3])
                deep = block(deep, block_skips, time_embedding, context, size=size)
        hidden = outermost(deep, skips[: len(outermost.resnets)], time_embedding, context)
        outputs = ops.cast(self.conv_out(self.conv_norm_out(hidden)), "float32")
        further = ([deep] if returns_deep else []) + ([bottleneck] if returns_bottleneck else [])
        return (outputs, *further) if further else outputs
