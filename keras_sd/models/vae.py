"""The KL autoencoder (Rombach et al., 2022): images to latents and back.

The attribute tree is that of diffusers' ``AutoencoderKL``.
"""

import itertools
from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.config import VAEConfig
from keras_sd.errors import UserError
from keras_sd.models.attention import AttentionBlock
from keras_sd.models.layers import (
    Downsample,
    GroupNormalization,
    Layer,
    ResnetBlock,
    Upsample,
    convolution,
    sequential,
)
from keras_sd.models.precision import ComputedInFloat32, ConfiguredModel, dtype_policy

EPSILON = 1e-6


class DiagonalGaussian:
    """The encoder's posterior over latents: a mean and a log variance `(n, h, w, c)` each."""

    def __init__(self, moments):
        self.mean, log_variance = ops.split(moments, 2, axis=-1)
        self.log_variance = ops.clip(log_variance, -30.0, 20.0)

    def sample(self, noise):
        """Draw latents from standard-normal `noise` of the mean's shape."""
        return self.mean + ops.exp(0.5 * self.log_variance) * noise

    def mode(self):
        """Return the most likely latents."""
        return self.mean

    def kl_divergence(self):
        """Return the divergence from the standard normal in nats, summed over each latent: `(n,)`."""
        terms = ops.square(self.mean) + ops.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * ops.sum(terms, axis=(1, 2, 3))


def _resnets(config, widths):
    """Return residual blocks from each width to the next one."""
    return [
        ResnetBlock(inputs, outputs, groups=config.norm_num_groups, epsilon=EPSILON)
        for inputs, outputs in itertools.pairwise(widths)
    ]


class DownEncoderBlock(Layer):
    """Residual blocks at one resolution. All levels but the last then halve it."""

    def __init__(self, config, level, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels
        outputs = channels[level]
        self.resnets = _resnets(config, [channels[max(level - 1, 0)], *[outputs] * config.layers_per_block])
        is_last = level == len(channels) - 1
        self.downsamplers = [] if is_last else [Downsample(outputs, padding=((0, 1), (0, 1)))]

    def call(self, hidden):
        return sequential([*self.resnets, *self.downsamplers], hidden)


class UpDecoderBlock(Layer):
    """Residual blocks at one resolution. All levels but the last then double it."""

    def __init__(self, config, level, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels[::-1]
        outputs, count = channels[level], config.layers_per_block + 1
        self.resnets = _resnets(config, [channels[max(level - 1, 0)], *[outputs] * count])
        self.upsamplers = [] if level == len(channels) - 1 else [Upsample(outputs)]

    def call(self, hidden):
        return sequential([*self.resnets, *self.upsamplers], hidden)


class MidBlock(Layer):
    """Two residual blocks around self-attention at the coarsest resolution."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = _resnets(config, [channels] * 3)
        attends = config.mid_block_add_attention
        self.attentions = [AttentionBlock(channels, groups=groups, epsilon=EPSILON)] if attends else []

    def call(self, hidden):
        return sequential([self.resnets[0], *self.attentions, self.resnets[1]], hidden)


class Encoder(Layer):
    """The network from images `(n, h, w, 3)` to the moments of the posterior at the latent resolution."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels
        self.conv_in = convolution(config.in_channels, channels[0])
        self.down_blocks = [DownEncoderBlock(config, level) for level in range(len(channels))]
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNormalization(channels[-1], config.norm_num_groups, EPSILON, silu=True)
        self.conv_out = convolution(channels[-1], 2 * config.latent_channels)

    def call(self, images):
        layers = [self.conv_in, *self.down_blocks, self.mid_block, self.conv_norm_out, self.conv_out]
        return sequential(layers, images)


class Decoder(Layer):
    """The network from latents to images."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels = config.block_out_channels
        self.conv_in = convolution(config.latent_channels, channels[-1])
        self.mid_block = MidBlock(config)
        self.up_blocks = [UpDecoderBlock(config, level) for level in range(len(channels))]
        self.conv_norm_out = GroupNormalization(channels[0], config.norm_num_groups, EPSILON, silu=True)
        self.conv_out = convolution(channels[0], config.out_channels)

    def call(self, latents):
        return self.conv_out(self.features(latents))

    def features(self, latents):
        """Return what the last convolution takes: `(n, h, w, c)` at the images' resolution."""
        return sequential([self.conv_in, self.mid_block, *self.up_blocks, self.conv_norm_out], latents)


@keras.saving.register_keras_serializable("keras_sd")
class AutoencoderKL(ConfiguredModel):
    """Encoder and decoder between images in [-1, 1] and latents.

    Latents are unscaled; multiply them by `config.scaling_factor` for a UNet. With `config.force_upcast`,
    a model with float16 weights computes in float32.

    Args:
        config: a `VAEConfig`.
        has_encoder: False for published files that hold the decoder alone.
    """

    config_class = VAEConfig

    def __init__(self, config: VAEConfig, has_encoder: bool = True, **kwargs: Any) -> None:
        policy = keras.config.dtype_policy()
        if self.config_class.checked(config).force_upcast and policy.compute_dtype == "float16":
            policy = ComputedInFloat32(policy.name)
        super().__init__(config, dtype=policy, **kwargs)
        latents = config.latent_channels
        with dtype_policy(policy):
            self.encoder = Encoder(config) if has_encoder else None
            self.decoder = Decoder(config)
            has_quant_conv = has_encoder and config.use_quant_conv
            self.quant_conv = convolution(2 * latents, 2 * latents, 1) if has_quant_conv else None
            self.post_quant_conv = convolution(latents, latents, 1) if config.use_post_quant_conv else None
        self.built = True

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"has_encoder": self.encoder is not None}

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode `(n, h, w, 3)` images in [-1, 1] to a `DiagonalGaussian` over latents.

        Raises:
            UserError: as `check_encoder`.
        """
        self.check_encoder()
        moments = self.encoder(ops.cast(images, self.compute_dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussian(ops.cast(moments, "float32"))

    def check_encoder(self) -> None:
        """Raise a UserError if the model has a decoder only."""
        if self.encoder is None:
            raise UserError(
                "the VAE has a decoder only, which takes no images in; use a model or a VAE with an encoder"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents `(n, h, w, c)` to images, float32, roughly in [-1, 1]."""
        return ops.cast(self.decoder(self._decoder_inputs(latents)), "float32")

    def decode_features(self, latents: Tensor) -> Tensor:
        """Return what the decoder's last convolution, `decoder.conv_out`, takes of unscaled latents."""
        return self.decoder.features(self._decoder_inputs(latents))

    def _decoder_inputs(self, latents):
        latents = ops.cast(latents, self.compute_dtype)
        return latents if self.post_quant_conv is None else self.post_quant_conv(latents)

    def call(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images).mode())
