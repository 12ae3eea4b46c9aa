"""Writes Stable Diffusion with random weights: `python -m benchmark.random_models sd15 FOLDER [float16]`."""

import sys

import keras
import numpy as np

from keras_sd import (
    AutoencoderKL,
    SchedulerConfig,
    StableDiffusion,
    TextEncoder,
    TextEncoderConfig,
    Tokenizer,
    UNet,
    UNetConfig,
    VAEConfig,
)

CONFIGS = {
    "sd15": (TextEncoderConfig(), UNetConfig()),
    "sd21": (
        TextEncoderConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=23,
            hidden_act="gelu",
        ),
        UNetConfig(
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
        ),
    ),
}


def randomize(model):
    """Give values to kernels that training would begin from zero, as they would hide a wrong result."""
    generator = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) > 1 and not np.any(variable):
            deviation = np.prod(variable.shape[:-1]) ** -0.5
            values = generator.standard_normal(variable.shape, dtype="float32")
            variable.assign(values * np.float32(deviation))
    return model


def main(name, folder, dtype=None):
    keras.utils.set_random_seed(0)
    text_encoder, unet = CONFIGS[name]
    StableDiffusion(
        Tokenizer.clip(),
        TextEncoder(text_encoder),
        randomize(UNet(unet)),
        randomize(AutoencoderKL(VAEConfig())),
        SchedulerConfig(),
    ).save(folder, dtype=dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
