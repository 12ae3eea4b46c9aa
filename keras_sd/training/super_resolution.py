"""Training of the pixel-space diffusion upscaler, which is conditioned on a degraded image.

The method is that of Saharia et al., "Image Super-Resolution via Iterative Refinement" (SR3), 2022. The noise
on the degraded image, with its level as a label, follows Ho et al., "Cascaded Diffusion Models", 2022.
"""

import functools

import numpy as np
from PIL import Image

from keras_sd.diffusion.prediction import add_noise
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.metrics.reconstruction import edge_error, peak_signal_to_noise_ratio
from keras_sd.models.pixels import images_to_unit, resized
from keras_sd.training.degradation import shrunk
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.text_to_image import diffusion_identity
from keras_sd.training.trainer import Trainer
from keras_sd.training.validation import validation_maker


def degraded(image, factor, generator):
    """Return a uint8 image, sometimes blurred, shrunk by a random filter and enlarged again (bicubic)."""
    return resized(shrunk(image, factor, generator), image.shape[:2])


def upscaling_example(example, generator, *, noise, low_res_schedule, noise_levels, factor, crop):
    """Draw the arrays of one training example: a random crop, its degraded version, noise and timestep.

    Args:
        example: with an `image`.
        noise: `NoiseDrawing` of the image.
        low_res_schedule: `NoiseSchedule` of the degraded image.
        noise_levels: number of noise levels of the degraded image; low levels are drawn more often.
        factor: the upscaling factor.
        crop: side of the square crop in pixels.
    """
    height, width = example["image"].shape[:2]
    top, left = generator.integers((height - crop + 1, width - crop + 1))
    image = example["image"][top : top + crop, left : left + crop]
    seen = images_to_unit(degraded(np.ascontiguousarray(image), factor, generator))
    noise_level = int(noise_levels * generator.random() ** 2)
    rates = low_res_schedule.signal_rates[noise_level], low_res_schedule.noise_rates[noise_level]

    drawn = noise.draw(generator, image.shape)
    low_res_noise = generator.standard_normal(image.shape, dtype="float32")
    return {
        "samples": image,
        **drawn,
        "channels": add_noise(seen, low_res_noise, *rates),
        "class_labels": np.int32(noise_level),
    }


def measure_upscaling(upscaler, images, *, factor=2, **options):
    """Shrink images (bicubic), upscale them again, and compare with the originals.

    Args:
        upscaler: `keras_sd.pipeline.upscaler.Upscaler`.
        images: uint8 `(n, height, width, 3)`.
        options: as `Upscaler.upscale` takes them.

    Returns:
        The upscaled images, uint8 `(n, h, w, 3)`, and a dictionary of figures: `psnr` in dB and `edge_error`
        in levels, and the same for bicubic and Lanczos upscaling.
    """
    size = images.shape[1:3]
    small = np.stack([resized(image, [side // factor for side in size]) for image in images])
    made = {
        "": upscaler.upscale(small, factor, **options),
        "bicubic_": np.stack([resized(image, size) for image in small]),
        "lanczos_": np.stack([resized(image, size, Image.Resampling.LANCZOS) for image in small]),
    }
    figures = {}
    for prefix, results in made.items():
        figures[f"{prefix}psnr"] = peak_signal_to_noise_ratio(images, results)
        figures[f"{prefix}edge_error"] = edge_error(images, results)
    return made[""], figures


def train_super_resolution(
    settings,
    upscaler,
    source,
    *,
    factor,
    crop_size,
    repeats=None,
    diffusion=None,
    make_evaluation=None,
    validation=None,
):
    """Train an upscaler and write it to `output_dir/model`.

    Args:
        settings: `trainer.Settings`.
        upscaler: `keras_sd.pipeline.upscaler.Upscaler`, whose UNet is trained.
        source: examples with an `image`. A `data.framing.FramedSource` crops and flips them at random.
        factor: the upscaling factor.
        crop_size: side in pixels of the random squares of the images to train on.
        repeats: how often an epoch shows each example.
        diffusion: `DiffusionSettings`; None for their defaults.
        make_evaluation: `make_evaluation(trainer)` returns a function of the step, called at each evaluation.
        validation: `validation.Validation`: encoded examples of the validation loss, or None for none.

    Returns:
        Whether training reached its end.

    Raises:
        UserError: the crops do not fit the images or the UNet.
    """
    unet, schedule = upscaler.unet, NoiseSchedule(upscaler.scheduler_config)
    diffusion = diffusion or DiffusionSettings()
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    framing = getattr(source, "framing", None)
    side = framing.resolution if framing else unet.config.sample_size
    if not 0 < crop_size <= side or crop_size % halvings or crop_size % factor:
        raise UserError(
            f"crop_size {crop_size}: does not fit; use a multiple of {np.lcm(halvings, factor)} up to {side}"
        )
    low_res_schedule = NoiseSchedule(upscaler.low_res_scheduler_config)
    trainer = Trainer(
        DiffusionObjective(unet, schedule, diffusion),
        settings,
        diffusion_identity(
            "super-resolution",
            unet,
            upscaler.scheduler_config,
            source,
            repeats,
            diffusion,
            low_res_schedule=upscaler.low_res_scheduler_config.noise_schedule(),
            factor=factor,
            crop=crop_size,
        ),
    )
    noise = NoiseDrawing(diffusion, schedule)
    draw = functools.partial(
        upscaling_example,
        noise=noise,
        low_res_schedule=low_res_schedule,
        noise_levels=unet.config.num_class_embeds,
        factor=factor,
        crop=crop_size,
    )
    return trainer.run(
        source,
        draw,
        repeats=repeats,
        make_evaluation=make_evaluation,
        make_validation=validation_maker(validation, draw, noise),
        export=upscaler.save,
    )
