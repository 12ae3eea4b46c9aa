"""Stable Diffusion 1.5 with few channels and one layer a block: its four levels, blocks, eight heads and VAE.

Images have 128 pixels. A second layer of a block would only take longer to compile.
"""

import numpy as np

from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests.tiny import without_initial_values

SIZE = 128

UNET = UNetConfig(
    sample_size=SIZE // 8,
    block_out_channels=(32, 32, 64, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_num_groups=8,
)
VAE = VAEConfig(sample_size=SIZE, block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
TEXT_ENCODER = TextEncoderConfig(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2
)


def make_model(folder):
    """Writes it, with random weights, as a diffusers folder."""
    with without_initial_values():
        text_encoder, unet, vae = TextEncoder(TEXT_ENCODER), UNet(UNET), AutoencoderKL(VAE)
    for seed, part in enumerate((text_encoder, unet, vae)):
        draw_weights(part, seed)
    StableDiffusion(Tokenizer.clip(), text_encoder, unet, vae, SchedulerConfig(), jit_compile=False).save(
        folder
    )


def draw_weights(model, seed):
    """Gives every weight a random value of the size that keeps signals as large as they are.

    Nothing is left at zero, as training would begin: it would hide what it multiplies.
    """
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        values = generator.standard_normal(variable.shape, dtype="float32")
        if len(variable.shape) > 1:
            # An embedding's rows are its outputs; a kernel's inputs come before its last axis.
            inputs = variable.shape[-1] if "embedding" in variable.path else np.prod(variable.shape[:-1])
            values *= np.float32(inputs) ** -0.5
        else:
            values = 0.1 * values + (variable.name == "gamma")
        variable.assign(values)
    return model
