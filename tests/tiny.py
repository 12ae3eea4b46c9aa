"""The smallest models that have every kind of layer, with random weights in place of initial ones."""

import contextlib
import dataclasses

import keras
import numpy as np
from PIL import Image

from keras_sd.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.initializers import deferring
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL

TEXTS = ["red heart", "blue heart", "a grinning face", "flag of Japan", "dark skin tone", "woman running"]

# SD 1: convolutions around the transformers and one number of heads.
SD1_UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)

# One block with attention, and none in the middle: gradients of more only take longer to compile.
ONE_BLOCK_UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None,
    up_block_types=("UpBlock2D",),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)

# SD 2: linear layers around the transformers and a number of heads for each level.
SD2_UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=(1, 2, 4),
    use_linear_projection=True,
    norm_num_groups=4,
)

# Pixel-space DDIM: no attention, no text.
PIXEL_UNET = UNetConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D", "UpBlock2D"),
    cross_attention_dim=0,
    norm_num_groups=4,
)

# Of one level, for tests of training: nearly all of their time is tracing and compiling the network.
ONE_LEVEL_PIXEL_UNET = UNetConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",),
    cross_attention_dim=0,
    norm_num_groups=4,
)

VAE = VAEConfig(
    sample_size=16,
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=4,
)

# Eight pixels a latent position, as in Stable Diffusion.
EIGHTFOLD_VAE = VAEConfig(
    sample_size=32,
    block_out_channels=(8, 8, 8, 16),
    layers_per_block=1,
    norm_num_groups=4,
)

IMAGE_ENCODER = ImageEncoderConfig(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=12,
)


def tokenizer(max_length=12):
    """A vocabulary of the bytes and a few merges."""
    return Tokenizer.train(TEXTS, vocab_size=530, max_length=max_length)


def text_encoder_config(tokenizer):
    return TextEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.max_length,
        projection_dim=12,
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=tokenizer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextlib.contextmanager
def without_initial_values():
    """Start the models made inside from zeros, where random values would only cost time.

    They have their values after the block only.
    """
    with keras.StatelessScope(), deferring() as initializers:
        yield
        for initializer in initializers.values():
            initializer.initializer = keras.initializers.Zeros()


def randomize(model, seed=0, scale=0.1):
    """Draws all weights anew, so that no zero or small initial value hides a fault."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        values = scale * generator.standard_normal(variable.shape) + (variable.name == "gamma")
        variable.assign(values.astype("float32"))
    return model


def pipeline(scheduler=None, unet=SD1_UNET, vae=VAE, **options):
    """A whole `StableDiffusion` of the tiny parts; 16 x 16 pixels."""
    from keras_sd.pipeline.stable_diffusion import StableDiffusion

    words = tokenizer()
    return StableDiffusion(
        words,
        randomize(TextEncoder(text_encoder_config(words)), 1, 0.5),
        randomize(UNet(unet), 2, 0.2),
        randomize(AutoencoderKL(vae), 3, 0.2),
        scheduler or SchedulerConfig(prediction_type="v_prediction"),
        randomize(ImageEncoder(IMAGE_ENCODER), 4),
        {"text_projection.weight": np.ones((12, 16), "float32"), "logit_scale": np.array(2.5, "float32")},
        **options,
    )


def pixel_folder(folder, images):
    """Write images of noise, 16 pixels high and wide, and `unet.json` of a tiny UNet on pixels."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(images):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    dataclasses.replace(ONE_LEVEL_PIXEL_UNET, sample_size=16).save(folder / "unet.json")
