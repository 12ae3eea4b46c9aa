"""The KL autoencoder (Rombach et al., 2022): images to latents and back.

The attribute tree is that of diffusers' ``AutoencoderKL``.
"""

from typing import Any

import keras
from keras import ops

from keras_sd.arguments import Tensor
from keras_sd.config import VAEConfig
from keras_sd.errors import UserError
from keras_sd.models.attention import AttentionBlock
from keras_sd.models.layers import Downsample, GroupNormalization, Layer, ResnetBlock, Upsample, convolution
from keras_sd.models.precision import ConfiguredModel, dtype_policy, in_float32

EPSILON = 1e-6


class DiagonalGaussian:
    """The encoder's posterior over latents: a mean and a log variance `(n, h, w, c)` each."""

    def __init__(self, moments):
        self.mean, log_variance = ops.split(moments, 2, axis=-1)
        self.log_variance = ops.clip(log_variance, -30.0, 20.0)

    def sample(self, noise):
        """Draws latents from standard-normal `noise` of the mean's shape."""
        return self.mean + ops.exp(0.5 * self.log_variance) * noise

    def mode(self):
        """The most likely latents."""
        return self.mean

    def kl_divergence(self):
        """Divergence from the standard normal in nats, summed over each latent: `(n,)`."""
        terms = ops.square(self.mean) + ops.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * ops.sum(terms, axis=(1, 2, 3))


class DownEncoderBlock(Layer):
    """Residual blocks at one resolution, then half of it unless this is the last level."""

    def __init__(self, inputs, outputs, *, layers, groups, downsample, **kwargs):
        super().__init__(**kwargs)
        self.resnets = [
            ResnetBlock(outputs if index else inputs, outputs, groups=groups, epsilon=EPSILON)
            for index in range(layers)
        ]
        self.downsamplers = [Downsample(outputs, padding=((0, 1), (0, 1)))] if downsample else []

    def call(self, hidden):
        for layer in [*self.resnets, *self.downsamplers]:
            hidden = layer(hidden)
        return hidden


class UpDecoderBlock(Layer):
    """Residual blocks at one resolution, then twice of it unless this is the last level."""

    def __init__(self, inputs, outputs, *, layers, groups, upsample, **kwargs):
        super().__init__(**kwargs)
        self.resnets = [
            ResnetBlock(outputs if index else inputs, outputs, groups=groups, epsilon=EPSILON)
            for index in range(layers)
        ]
        self.upsamplers = [Upsample(outputs)] if upsample else []

    def call(self, hidden):
        for layer in [*self.resnets, *self.upsamplers]:
            hidden = layer(hidden)
        return hidden


class MidBlock(Layer):
    """Two residual blocks around self-attention at the coarsest resolution."""

    def __init__(self, channels, *, groups, add_attention=True, **kwargs):
        super().__init__(**kwargs)
        self.resnets = [ResnetBlock(channels, channels, groups=groups, epsilon=EPSILON) for _ in range(2)]
        self.attentions = [AttentionBlock(channels, groups=groups, epsilon=EPSILON)] if add_attention else []

    def call(self, hidden):
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            hidden = layer(hidden)
        return hidden


class Encoder(Layer):
    """Images `(n, h, w, 3)` to the posterior's moments at the latent resolution."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = convolution(config.in_channels, channels[0])
        self.down_blocks = [
            DownEncoderBlock(
                channels[max(level - 1, 0)],
                channels[level],
                layers=config.layers_per_block,
                groups=groups,
                downsample=level < len(channels) - 1,
            )
            for level in range(len(channels))
        ]
        self.mid_block = MidBlock(channels[-1], groups=groups, add_attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNormalization(channels[-1], groups, EPSILON, silu=True)
        self.conv_out = convolution(channels[-1], 2 * config.latent_channels)

    def call(self, images):
        hidden = self.conv_in(images)
        for block in [*self.down_blocks, self.mid_block]:
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(hidden))


class Decoder(Layer):
    """Latents to images."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = convolution(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups=groups, add_attention=config.mid_block_add_attention)
        self.up_blocks = [
            UpDecoderBlock(
                channels[max(level - 1, 0)],
                channels[level],
                layers=config.layers_per_block + 1,
                groups=groups,
                upsample=level < len(channels) - 1,
            )
            for level in range(len(channels))
        ]
        self.conv_norm_out = GroupNormalization(channels[-1], groups, EPSILON, silu=True)
        self.conv_out = convolution(channels[-1], config.out_channels)

    def call(self, latents):
        hidden = self.conv_in(latents)
        for block in [self.mid_block, *self.up_blocks]:
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(hidden))


class AutoencoderKL(ConfiguredModel):
    """Encoder and decoder between images in [-1, 1] and latents.

    Latents are unscaled: whoever feeds them to a UNet multiplies by `config.scaling_factor`. Where
    `config.force_upcast` stands, float16 weights are computed with in float32.

    Args:
        config: a `VAEConfig`.
        has_encoder: False for published files that hold the decoder alone, which make images of latents.
    """

    config_class = VAEConfig

    def __init__(self, config: VAEConfig, has_encoder: bool = True, **kwargs: Any) -> None:
        policy = keras.config.dtype_policy()
        if config.force_upcast and policy.compute_dtype == "float16":
            policy = in_float32(policy)
        super().__init__(dtype=policy, **kwargs)
        self.config = config
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
        """Encodes `(n, h, w, 3)` images in [-1, 1] to a `DiagonalGaussian` over latents.

        Raises:
            UserError: as `check_encoder`.
        """
        self.check_encoder()
        moments = self.encoder(ops.cast(images, self.compute_dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussian(ops.cast(moments, "float32"))

    def check_encoder(self) -> None:
        """Raises a UserError where there is a decoder alone."""
        if self.encoder is None:
            raise UserError(
                "the VAE has a decoder only, which takes no images in; use a model or a VAE with an encoder"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes unscaled latents `(n, h, w, c)` to images, float32, about [-1, 1]."""
        latents = ops.cast(latents, self.compute_dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return ops.cast(self.decoder(latents), "float32")

    def call(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images).mode())
