"""Unconditional DDIM training on pixels (Song et al., 2021), as in the Keras example of that name."""

import numpy as np

from keras_sd.arguments import Images
from keras_sd.data.sources import framing_identity
from keras_sd.diffusion.denoiser import Denoiser, NoiseStreams
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.batches import equal_batches
from keras_sd.models.pixels import images_from_unit
from keras_sd.models.unet import UNet
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.text_to_image import diffusion_identity
from keras_sd.training.trainer import Trainer
from keras_sd.training.validation import validation_maker
from keras_sd.weights.diffusers_folder import SCHEDULER, write_part, write_scheduler
from keras_sd.weights.rules import torch_state


def sample_images(
    denoiser: Denoiser, count: int, *, num_inference_steps: int = 20, seed: int = 0, batch_size: int = 50
) -> Images:
    """Generate `count` uint8 images with an unconditional pixel-space model; image i has seed + i."""
    config = denoiser.unet.config
    shape = (config.sample_size, config.sample_size, config.in_channels)
    images = []
    for batch in equal_batches(count, batch_size):
        noise = NoiseStreams(seed + index for index in batch.tolist()).draw(shape)
        for denoised in denoiser.steps(noise, num_inference_steps=num_inference_steps):
            samples = denoised.latents
        images.append(images_from_unit(samples))
    return np.concatenate(images)[:count]


def train_pixel_ddim(
    settings,
    config,
    scheduler_config,
    source,
    *,
    repeats=None,
    diffusion=None,
    make_evaluation=None,
    validation=None,
):
    """Train an unconditional UNet on images and write it under `output_dir/model`.

    Args:
        settings: `trainer.Settings`.
        config: `UNetConfig` of attention-free blocks, with 3 channels in and out.
        scheduler_config: `SchedulerConfig`; the cosine schedule of signal and noise rates is
            `beta_schedule="squaredcos_cap_v2"`.
        source: examples with an `image`, of `config.sample_size` or of several sizes in buckets. A
            `data.framing.FramedSource` crops and flips them at random.
        repeats: how often an epoch shows each example.
        diffusion: `DiffusionSettings`; None for their defaults.
        make_evaluation: `make_evaluation(denoiser)` returns what `Trainer.run` takes.
        validation: `validation.Validation`: examples of the validation loss, or None for none.

    Returns:
        Whether training reached its end.
    """
    settings.use_precision()
    unet = UNet(config)
    schedule, diffusion = NoiseSchedule(scheduler_config), diffusion or DiffusionSettings()
    trainer = Trainer(
        DiffusionObjective(unet, schedule, diffusion),
        settings,
        diffusion_identity(
            "ddim",
            unet,
            scheduler_config,
            source,
            repeats,
            diffusion,
            flip=framing_identity(source).get("framing", {}).get("random_flip", False),
        ),
    )

    noise = NoiseDrawing(diffusion, schedule)

    def draw(example, generator):
        return {"samples": example["image"], **noise.draw(generator, example["image"].shape)}

    denoiser = Denoiser(unet, schedule, settings.jit_compile)
    return trainer.run(
        source,
        draw,
        repeats=repeats,
        make_evaluation=make_evaluation and make_evaluation(denoiser),
        make_validation=validation_maker(validation, draw, noise),
        export=lambda folder: save_model(folder, unet, scheduler_config),
    )


def save_model(folder, unet, scheduler_config):
    """Write an unconditional model into a folder."""
    write_part(folder, "unet", unet.config.to_dict(), torch_state(unet))
    write_scheduler(folder / SCHEDULER, scheduler_config.to_dict())
