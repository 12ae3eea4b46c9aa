"""What UNets with further input channels get in training: a masked image, or a small image and its noise.

Both are made of an image's pixels and differ at each draw, so images are encoded while a run trains
(`caching.Caching.encoding_each_time`).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from keras_sd.diffusion.prediction import add_noise
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.pixels import images_to_unit, resized
from keras_sd.training.degradation import shrunk

_WHOLE = 0.25  # share of masks that hide the whole image
_MOST_SHAPES = 4
_LARGEST_NOISE_LEVEL = 350  # of the x4 upscaler; its labels go on to 1,000
_STREAM = 0x6D61736B73  # keeps masks of evaluations apart from what is drawn in training


class Inpainting:
    """The mask and the rest of the image, for a UNet with a channel for the mask and the VAE's once more.

    A quarter of the masks hides all, as in the training of Stable Diffusion's inpainting models (Rombach et
    al., 2022, and their model cards). The others are rectangles, ellipses or strokes.
    """

    command = ("inpaint", "IMAGE", "MASK")
    """The command that uses such a model, and what it takes before a prompt."""

    reason = "an inpainting model gets another masked image at each draw"

    def draw(self, image: npt.NDArray[np.uint8], generator: np.random.Generator) -> dict[str, Any]:
        """Return `hidden`, bool `(height, width, 1)`, of an image uint8 `(height, width, 3)`."""
        return {"hidden": random_mask(image.shape[:2], generator)[..., None]}

    def generate(self, pipeline: Any, images: npt.NDArray[np.uint8], texts: list[str], **options: Any) -> Any:
        """Return images whose masked parts are made anew, with masks that are the same each time."""
        masks = [
            random_mask(images.shape[1:3], np.random.Generator(np.random.Philox(key=(_STREAM, index))))
            for index in range(len(images))
        ]
        return pipeline.inpaint(images, np.stack(masks), texts, **options)


class Upscaling:
    """A small, noisy image and its noise level, for a UNet with the image's channels and class labels.

    The image is shrunk by a random filter, sometimes blurred before; levels are drawn evenly up to 350, as
    far as Stable Diffusion's x4 upscaler was trained (noise conditioning augmentation, Ho et al., 2022).

    Args:
        schedule: the noise schedule of the small image.
        levels: number of class labels.
        factor: pixels of the large image, along a side, for one of the small image.
    """

    command = ("upscale", "IMAGE")
    reason = "an upscaler gets another small image at each draw"

    def __init__(self, schedule: NoiseSchedule, levels: int, factor: int) -> None:
        self._schedule, self._factor = schedule, factor
        self._levels = min(levels, _LARGEST_NOISE_LEVEL)

    def draw(self, image: npt.NDArray[np.uint8], generator: np.random.Generator) -> dict[str, Any]:
        """Return `channels` and `class_labels` of an image uint8 `(height, width, 3)`.

        The channels are float32 `(height / factor, width / factor, 3)`.
        """
        small = images_to_unit(shrunk(np.ascontiguousarray(image), self._factor, generator))
        level = int(generator.integers(self._levels))
        rates = self._schedule.signal_rates[level], self._schedule.noise_rates[level]
        noise = generator.standard_normal(small.shape, dtype="float32")
        channels = np.asarray(add_noise(small, noise, *rates), "float32")
        return {"channels": channels, "class_labels": np.int32(level)}

    def generate(self, pipeline: Any, images: npt.NDArray[np.uint8], texts: list[str], **options: Any) -> Any:
        """Return images that are shrunk (bicubic) and upscaled again."""
        size = images.shape[1] // self._factor, images.shape[2] // self._factor
        small = np.stack([resized(image, size) for image in images])
        return pipeline.upscale(small, texts, noise_level=min(20, self._levels - 1), **options)


def conditioning_of(pipeline: Any) -> Inpainting | Upscaling | None:
    """Return what the UNet of a `StableDiffusion` gets beside latents; None for a text-to-image model.

    Raises:
        UserError: an upscaler has no noise schedule of the small image.
    """
    unet, vae = pipeline.unet.config, pipeline.vae.config
    more = unet.in_channels - vae.latent_channels
    if not more:
        return None
    if more == vae.latent_channels + 1:
        return Inpainting()
    schedule = pipeline.low_res_scheduler_config
    if schedule is None or not unet.num_class_embeds:
        raise UserError(
            f"model {pipeline.name}: its UNet takes {more} further channels, but it has no low_res_scheduler "
            "or no class embeddings; train a text-to-image or inpainting model, or a whole upscaler"
        )
    return Upscaling(NoiseSchedule(schedule), unet.num_class_embeds, vae.downsampling)


def refuse_conditioning(pipeline: Any, method: str) -> None:
    """Raise UserError for a model that is no text-to-image model, which `method` cannot train."""
    conditioning = conditioning_of(pipeline)
    if conditioning is not None:
        raise UserError(
            f"model {pipeline.name}: {method} trains text-to-image models, and this is one for "
            f"{conditioning.command[0]}; train it by text-to-image or lora"
        )


def random_mask(size: tuple[int, int], generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return a mask, bool `(height, width)`, that is True where something is to be made anew."""
    height, width = size
    if generator.random() < _WHOLE:
        return np.ones(size, bool)
    image = Image.new("L", (width, height))  # arrays of mode "1" hold 255 for True, which XLA takes as it is
    pen = ImageDraw.Draw(image)
    draw = _strokes if generator.random() < 0.5 else _shapes
    draw(pen, width, height, generator)
    return np.asarray(image) > 0


def _shapes(pen: Any, width: int, height: int, generator: np.random.Generator) -> None:
    """Draw a few rectangles and ellipses, from a tenth to the whole of each side."""
    for _ in range(generator.integers(1, _MOST_SHAPES + 1)):
        sides = generator.uniform(0.1, 1.0, 2) * (width, height)
        corner = generator.random(2) * ((width, height) - sides)
        box = [*corner, *(corner + sides)]
        (pen.rectangle if generator.random() < 0.5 else pen.ellipse)(box, fill=1)


def _strokes(pen: Any, width: int, height: int, generator: np.random.Generator) -> None:
    """Draw a few lines of several turns, as wide as a brush, with round ends."""
    for _ in range(generator.integers(1, _MOST_SHAPES + 1)):
        breadth = max(1, round(generator.uniform(0.05, 0.2) * min(width, height)))
        turns = generator.random((int(generator.integers(2, 6)), 2)) * (width, height)
        points = [tuple(point) for point in turns]
        pen.line(points, fill=1, width=breadth, joint="curve")
        for x, y in points:
            radius = breadth / 2
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
