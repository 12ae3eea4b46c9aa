"""A diffusion upscaler on pixels (SR3): a UNet with the enlarged small image as a further input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from keras_sd import presets
from keras_sd.arguments import Images, formerly, image_seeds, whole_number
from keras_sd.diffusion.denoiser import Denoised, Denoiser, NoiseStreams
from keras_sd.diffusion.prediction import add_noise
from keras_sd.diffusion.samplers import Sampler
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.files.writing import replaced_folder
from keras_sd.models.batches import equal_batches
from keras_sd.models.pixels import as_images, images_from_unit, images_to_unit, resized
from keras_sd.models.unet import UNet
from keras_sd.pipeline.defaults import UPSCALING, ModelDefaults
from keras_sd.weights.diffusers_folder import (
    LOW_RES_SCHEDULER,
    SCHEDULER,
    holds_pixel_upscaler,
    write_part,
    write_scheduler,
)
from keras_sd.weights.loading import load_part
from keras_sd.weights.rules import torch_state


class Upscaler:
    """A diffusion upscaler on pixels (SR3, Saharia et al., 2022).

    Inputs of the UNet are the noisy image, the small image enlarged by bicubic interpolation with noise of a
    chosen level, and that level (Ho et al., 2022). Use one object from one thread at a time.

    Args:
        unet: a `UNet` with 6 input and 3 output channels, and class labels for the noise levels.
        scheduler_config: `SchedulerConfig` of the images' noise.
        low_res_scheduler_config: `SchedulerConfig` of the noise on the small image.
        defaults: `keras_sd.pipeline.defaults.ModelDefaults` of the upscaler; by default the usual values.
        batch_size: the largest number of images per batch.
        jit_compile: whether XLA compiles on TensorFlow; None where it is faster. JAX always compiles.

    Raises:
        UserError: the UNet is not that of an upscaler.

    Example:
        ```python
        upscaler = keras_sd.Upscaler.load("runs/upscaler/model")
        larger = upscaler.upscale(images, factor=2, seed=1)
        ```
    """

    def __init__(
        self,
        unet: UNet,
        scheduler_config: SchedulerConfig,
        low_res_scheduler_config: SchedulerConfig,
        *,
        defaults: ModelDefaults | None = None,
        batch_size: int = 8,
        jit_compile: bool | None = None,
    ) -> None:
        config = unet.config
        if config.in_channels != 6 or config.out_channels != 3 or not config.num_class_embeds:
            raise UserError("upscaler: the UNet has not 6 channels in, 3 out and noise levels; use another")
        self.unet = unet
        self.scheduler_config, self.low_res_scheduler_config = scheduler_config, low_res_scheduler_config
        self.defaults = defaults or ModelDefaults(usual_sampling=UPSCALING)
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self._denoiser = Denoiser(unet, NoiseSchedule(scheduler_config), jit_compile=jit_compile)

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "float32", **options: Any) -> Self:
        """Open an upscaler.

        Args:
            path: a folder such as a `super-resolution` run's `model`, a preset or a hub id.
            dtype: precision of weights and computation: "float32", "float16" or "bfloat16".
            options: defaults, batch_size and jit_compile, as in the constructor; defaults are by default
                those of the folder.

        Returns:
            The upscaler.

        Raises:
            UserError: the folder is missing or damaged, or holds no upscaler.
        """
        folder = presets.find(path)
        schedules = (
            SchedulerConfig.from_dict(read_json(folder / place)) for place in (SCHEDULER, LOW_RES_SCHEDULER)
        )
        defaults = ModelDefaults.load(folder)
        return cls(load_part(folder, "unet", dtype), *schedules, **{"defaults": defaults} | options)

    @staticmethod
    def is_in(path: str | Path) -> bool:
        """Return whether a folder holds an upscaler of this kind, not a Stable Diffusion model."""
        return holds_pixel_upscaler(path)

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Write a folder with `unet/`, `scheduler/` and `low_res_scheduler/` in diffusers' layout.

        Args:
            path: the folder, created if necessary.
            dtype: "float32", "float16" or "bfloat16"; by default that of the weights in memory.
        """
        with replaced_folder(path) as folder:
            write_part(folder, "unet", self.unet.config.to_dict(), torch_state(self.unet), dtype)
            write_scheduler(folder / SCHEDULER, self.scheduler_config.to_dict())
            write_scheduler(folder / LOW_RES_SCHEDULER, self.low_res_scheduler_config.to_dict())
            self.defaults.save(folder)

    @formerly(images="image", num_steps="num_inference_steps")
    def upscale(
        self,
        image: Images,
        factor: int = 2,
        *,
        noise_level: int = 0,
        num_inference_steps: int | None = None,
        sampler: str | Sampler | None = None,
        seed: int = 0,
        eta: float = 0.0,
        reuse_interval: int = 1,
        on_step: Callable[[Denoised], object] | None = None,
    ) -> Images:
        """Upscale images.

        Args:
            image: uint8 `(height, width, 3)` or `(n, height, width, 3)`.
            factor: upscaling factor of the sides; best is the one that the UNet was trained for.
            noise_level: noise added to the image, as a timestep. 0 stays close to the image; more lets the
                model invent more.
            num_inference_steps: denoising steps; by default the upscaler's own, usually 10. Fewer steps give
                smoother images, more steps sharper ones.
            sampler, eta, reuse_interval: as `Denoiser.steps` takes them.
            seed: image i is generated from `seed` + i.
            on_step: called after each step with a `Denoised(step, latents)`.

        Returns:
            uint8 `(n, factor * height, factor * width, 3)`.

        Raises:
            UserError: the noise level or the size is out of range.
        """
        whole_number("noise_level", noise_level, 0, self.unet.config.num_class_embeds - 1)
        whole_number("factor", factor, 1)
        if num_inference_steps is None:
            num_inference_steps = self.defaults.sampling["num_inference_steps"]
        images = as_images(image)
        seeds = image_seeds(seed, len(images))
        height, width = (side * factor for side in images.shape[1:3])
        enlarged = np.stack([resized(image, (height, width)) for image in images])
        schedule = NoiseSchedule(self.low_res_scheduler_config)
        rates = schedule.signal_rates[noise_level], schedule.noise_rates[noise_level]
        made = []
        for batch in equal_batches(len(images), self.batch_size):
            streams = NoiseStreams(seeds[batch])
            noise = streams.draw((height, width, 3))
            seen = images_to_unit(enlarged[batch])
            for denoised in self._denoiser.steps(
                noise,
                num_inference_steps=num_inference_steps,
                sampler=sampler,
                streams=streams,
                channels=add_noise(seen, streams.draw(seen.shape[1:]), *rates),
                class_labels=np.full(len(batch), noise_level, "int32"),
                eta=eta,
                reuse_interval=reuse_interval,
            ):
                if on_step is not None:
                    on_step(denoised)
            made.append(images_from_unit(denoised.latents))
        return np.concatenate(made)[: len(images)]
