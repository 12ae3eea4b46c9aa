"""Default architectures and noise schedules of the methods `ddim` and `super-resolution`."""

import dataclasses

from keras_sd.config import UNetConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig

# Unconditional images of 64 x 64 pixels: no attention, the cosine schedule, as in the Keras DDIM example.
PIXEL_UNET = UNetConfig(
    sample_size=64,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64, 96, 128),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 4,
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",) * 4,
    norm_num_groups=8,
)


PIXEL_SCHEDULER = SchedulerConfig(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    clip_sample=True,
)


# The bundled upscaler to twice the side. It predicts the image itself, so that errors count equally at all
# noise levels: the low-resolution input determines most of the image.
UPSCALER_UNET = UNetConfig(
    sample_size=128,
    in_channels=6,
    out_channels=3,
    block_out_channels=(32, 48, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 3,
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",) * 3,
    num_class_embeds=101,
    norm_num_groups=8,
)


UPSCALER_SCHEDULER = dataclasses.replace(PIXEL_SCHEDULER, prediction_type="sample")


# The noise on the low-resolution image, as in SD's x4 upscaler.
LOW_RES_SCHEDULER = SchedulerConfig(beta_start=0.0001, beta_end=0.02)
