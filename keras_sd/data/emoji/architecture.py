"""The architecture of the bundled `emoji` model: Stable Diffusion's recipe at 64 pixels."""

from keras_sd.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig

# Of both transformers.
_SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}

# Images have 64 x 64 x 3 pixels, latents 8 x 8 x 16.
EMOJI_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=2048,
    num_hidden_layers=4,
    max_position_embeddings=32,
    bos_token_id=2046,
    eos_token_id=2047,
    pad_token_id=2047,
    **_SIZES,
)


EMOJI_IMAGE_ENCODER = ImageEncoderConfig(image_size=64, patch_size=16, num_hidden_layers=3, **_SIZES)


EMOJI_VAE = VAEConfig(
    sample_size=64,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,
)


EMOJI_UNET = UNetConfig(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(128, 176),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,
    norm_num_groups=16,
)


EMOJI_SCHEDULER = SchedulerConfig(
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)
