"""The tasks of a model: text to image, image to image, inpainting, upscaling, interpolation.

Each task consists of a few calls of primitives (`keras_sd.pipeline.primitives`).
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack, cast

import numpy as np
import numpy.typing as npt
from keras import ops
from tqdm import tqdm

from keras_sd.arguments import (
    MOST_IMAGES,
    Images,
    Parameters,
    Tensor,
    checked_interval,
    checked_rescale,
    checked_seed,
    first_step,
    formerly,
    image_seeds,
    shown,
    whole_number,
)
from keras_sd.diffusion.denoiser import Known, NoiseStreams
from keras_sd.diffusion.guidance import checked_guidance_scale, gives_guidance
from keras_sd.diffusion.prediction import add_noise
from keras_sd.diffusion.samplers import Sampler
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.batches import batches_of_lengths
from keras_sd.models.pixels import any_white, as_images, as_masks, images_to_unit
from keras_sd.pipeline.primitives import Primitives
from keras_sd.pipeline.prompts import as_texts, repeated, take_loras
from keras_sd.weights.lora_files import loras_in

Progress: TypeAlias = bool | Callable[[int, int, Tensor], object]


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every task; `StableDiffusion.text_to_image` documents them."""

    num_inference_steps: int | None
    guidance_scale: float | None
    sampler: str | Sampler | None
    eta: float
    guidance_rescale: float | None
    guidance_interval: tuple[float, float]
    reuse_interval: int
    clip_skip: int | None
    progress: Progress


def _task(task: Callable[Parameters, Images]) -> Callable[Parameters, Images]:
    """Check a task's arguments, add the LoRAs that its prompts name by tags, and hold the model's lock."""
    title = "prompts" if "prompts" in inspect.signature(task).parameters else "prompt"

    @functools.wraps(task)
    def run(self, *arguments, **options):
        # The published signature has all options, and nothing else reaches the primitives.
        signature = inspect.signature(getattr(StableDiffusion, task.__name__))
        try:
            given = signature.bind(self, *arguments, **options).arguments
        except TypeError as error:
            raise TypeError(f"{task.__name__}(): {error}") from None
        _check_progress(given.get("progress"))
        texts = _prompts(given.get(title, ""), given.get("negative_prompt"))
        self._check_guidance(given, texts[1])
        given[title], given["negative_prompt"] = texts  # lists, as an iterator can be read once only
        with self._lock:
            if "<lora:" not in str(texts):
                return task(**given)
            find = functools.partial(_find_lora, self)
            taken = [[take_loras(text, find) for text in kind] for kind in texts]
            asked = [positive | negative for (_, positive), (_, negative) in zip(*taken, strict=True)]
            if any(weights != asked[0] for weights in asked):
                raise UserError("prompts: ask for different LoRAs; make their images in calls of their own")
            given[title], given["negative_prompt"] = ([text for text, _ in kind] for kind in taken)
            with self.adapters.temporarily(asked[0]):
                return task(**given)

    return cast(Callable[Parameters, Images], run)


def _find_lora(model, name):
    """Return whether a LoRA is loaded or in the model's folder; without a folder, tags are left out later."""
    found = model.find_lora(name)
    if not found and model.lora_folder is not None:
        there = ", ".join(path.stem for path in loras_in(model.lora_folder)) or "none"
        raise UserError(
            f"prompt: <lora:{name}> is not in {model.lora_folder}, which has {there}; correct the name"
        )
    return found


class StableDiffusion(Primitives):
    """A text-to-image model: tokenizer, text encoder, UNet, VAE and noise schedule.

    Args:
        tokenizer, text_encoder, unet, vae: the parts, from `keras_sd.models`.
        scheduler_config: `SchedulerConfig` of the noise schedule that the UNet was trained on.
        image_encoder: CLIP's image encoder, which metrics use, or None.
        clip_head: the image encoder's arrays "text_projection.weight" `(projection, width)` and "logit_scale"
            by name, or None.
        low_res_scheduler_config: the noise schedule of an upscaler's low-resolution image, or None.
        defaults: `keras_sd.pipeline.defaults.ModelDefaults` of the model; by default the usual values.
        name: the model's name in the parameters of images.
        batch_size: the largest number of images per batch; more are split into batches of equal size.
        jit_compile: whether XLA compiles on TensorFlow; None where it is faster. JAX always compiles.
        engine: "keras", or "openvino": on a processor with TensorFlow and the extra `openvino`, each part is
            computed by OpenVINO for shapes of inputs where that is faster. Both are measured once.

    Attributes:
        lora_folder: folder of the LoRAs that prompts name, or None.
        vae_source: name and file of a replaced VAE, for the parameters of images.
        embedding_files: token -> file of textual inversions, for the parameters of images.
        The arguments are attributes too.

    Images are uint8 `(n, height, width, 3)`. Primitives take and return NumPy arrays, channels last.

    Threads may share a model: a lock lets one task, or one change of LoRAs or tokens, run at a time. The
    primitives (`encode_text`, `encode_image`, `denoise`, `decode`) take no lock: call them while no other
    thread uses the model.

    Example:
        ```python
        sd = keras_sd.StableDiffusion.from_preset("emoji")
        images = sd.text_to_image("a red heart", num_images=4, seed=1)
        keras_sd.save_png(images[0], "heart.png")
        ```
    """

    @formerly(num_steps="num_inference_steps")
    @_task
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | Sampler | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        reuse_interval: int = 1,
        clip_skip: int | None = None,
        progress: Progress = True,
    ) -> Images:
        """Generate images from a text.

        Args:
            prompt: a text, or a list of texts, in A1111's language (`keras_sd.pipeline.prompts`).
            negative_prompt: what images must not show: a text, or a list with one for each prompt.
            num_images: images for each prompt. Image i of all is generated from `seed` + i. It is the same
                alone or in a batch, up to rounding.
            num_inference_steps: denoising steps, 1 to the schedule's number of timesteps. By default the
                model's own, usually 30.
            guidance_scale: scale of classifier-free guidance (Ho and Salimans, 2022); up to 1 there is none,
                in half the time. By default the model's own, usually 7.5.
            sampler: a name in `keras_sd.SAMPLERS`, or a `Sampler`; by default that of the model's
                `scheduler_config.json`.
            seed: seed of image 0, 0 to 2**64 - 1.
            height, width: in pixels, multiples of the VAE's factor (8); by default the size that the model
                was trained at.
            eta: fraction of fresh noise in each step of DDIM and TCD, 0 (none) to 1.
            guidance_rescale: 0 (not) to 1; reduces overexposure by strong guidance (Lin et al., 2023). By
                default the model's own, usually 0.
            guidance_interval: fractions of the steps between which there is guidance; other steps take half
                the time (Kynkäänniemi et al., 2024).
            reuse_interval: run the whole UNet every so many steps; steps between reuse its deep features
                (DeepCache, Ma et al., 2024). 1 reuses none.
            clip_skip: number of the text encoder's last layers that are left out, as in diffusers: 1 where
                A1111's "Clip skip" is 2. None is the encoder's own, usually 0.
            progress: True for a progress bar on stderr, False for none, or a function that is called with
                (completed steps, all steps, latents).

        Returns:
            uint8 `(len(prompts) * num_images, height, width, 3)`; the images of a prompt are consecutive.

        Raises:
            UserError: a number is out of range, the sampler is unknown, or lists have different lengths.

        Example:
            ```python
            images = sd.text_to_image(
                ["a red heart", "a (blue:1.3) heart"], "blurry", num_images=2, sampler="dpmpp_2m", seed=7
            )  # uint8 (4, 64, 64, 3)
            ```
        """
        self._refuse_more_channels("text_to_image")
        context, negative, seeds = self._conditions(prompt, negative_prompt, num_images, seed, clip_skip)
        return self._sample(
            context,
            negative,
            seeds,
            self.latent_shape(height, width),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            reuse_interval=reuse_interval,
            sampler=sampler,
            eta=eta,
            progress=progress,
        )

    @formerly(num_steps="num_inference_steps")
    @_task
    def image_to_image(
        self,
        image: Images,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        *,
        strength: float = 0.8,
        seed: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Images:
        """Generate images from a text and an initial image (SDEdit, Meng et al., 2022).

        Args:
            image: uint8 `(height, width, 3)` for all results, or `(n, height, width, 3)` with one for each.
            prompt, negative_prompt, num_images, seed and further arguments: as in `text_to_image`.
            strength: fraction of the denoising steps that is run, above 0 and up to 1; 1 ignores the image.

        Returns:
            uint8 `(n, height, width, 3)`.

        Raises:
            UserError: as `text_to_image`; or the number or size of the images does not fit.

        Example:
            ```python
            images = sd.image_to_image(photo, "a watercolour", strength=0.6, seed=7)
            ```
        """
        self._refuse_more_channels("image_to_image")
        clip_skip = options.pop("clip_skip", None)
        context, negative, seeds = self._conditions(prompt, negative_prompt, num_images, seed, clip_skip)
        latents = _one_for_each(self.encode_image(image), len(seeds), "images")

        def begin(noise, batch, streams):
            return {"sample": latents[batch]}

        return self._sample(
            context, negative, seeds, latents.shape[1:], begin=begin, strength=strength, **options
        )

    @formerly(num_steps="num_inference_steps")
    @_task
    def inpaint(
        self,
        image: Images,
        mask: npt.NDArray[Any],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        *,
        strength: float = 1.0,
        seed: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Images:
        """Generate the masked part of an image; all other pixels are kept exactly.

        An inpainting model (9 channels) gets the mask and the rest of the image as inputs. With any other
        model, the rest is replaced by the noisy image after each step (RePaint, Lugmayr et al., 2022,
        equation 8).

        Args:
            image: uint8 `(height, width, 3)` for all results, or `(n, height, width, 3)` with one for each.
            mask: uint8 or bool `(height, width)`, or one for each image; white (from 128) is generated. A
                latent position (8 x 8 pixels) with any white is generated as a whole, and its other pixels
                are restored at the end.
            prompt, negative_prompt, num_images, seed and further arguments: as in `text_to_image`.
            strength: as in `image_to_image`; 1 starts from noise alone.

        Returns:
            uint8 `(n, height, width, 3)`.

        Raises:
            UserError: as `image_to_image`; or the mask has another size than the image, or no white.

        Example:
            ```python
            images = sd.inpaint(photo, mask, "a blue vase", seed=7)
            ```
        """
        images = self._checked(image)
        mask = as_masks(mask, images.shape[1:3])
        clip_skip = options.pop("clip_skip", None)
        context, negative, seeds = self._conditions(prompt, negative_prompt, num_images, seed, clip_skip)
        count, factor = len(seeds), self.vae.config.downsampling
        latents = _one_for_each(self.encode_image(images), count, "images")
        small_mask = _one_for_each(any_white(mask, factor).astype("float32"), count, "masks")
        channels = None
        if self._extra_channels == self.vae.config.latent_channels + 1:
            hidden = self._encode_unit(images_to_unit(images) * ~mask)
            channels = np.concatenate([small_mask, _one_for_each(hidden, count, "images")], axis=-1)
        else:
            self._refuse_more_channels("inpaint")

        def begin(noise, batch, streams):
            given = {"sample": None if strength == 1 else latents[batch]}
            if channels is not None:
                return given | {"channels": channels[batch]}
            return given | {"known": Known(small_mask[batch], latents[batch], noise)}

        made = self._sample(
            context, negative, seeds, latents.shape[1:], begin=begin, strength=strength, **options
        )
        return np.where(mask, made, images)

    @formerly(num_steps="num_inference_steps")
    @_task
    def upscale(
        self,
        image: Images,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        *,
        noise_level: int = 20,
        seed: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Images:
        """Upscale an image by a model that was trained for it (SD x4 upscaler).

        Args:
            image: uint8 `(height, width, 3)` for all results, or `(n, height, width, 3)` with one for each.
            prompt, negative_prompt, num_images, seed and further arguments: as in `text_to_image`.
            noise_level: timestep of the noise added to the image. 0 stays close to the image; more lets the
                model invent more.

        Returns:
            uint8 `(n, 4 * height, 4 * width, 3)`; 4 is the VAE's factor.

        Raises:
            UserError: the model is no upscaler; or as `image_to_image`.
        """
        levels, schedule_config = self.unet.config.num_class_embeds, self.low_res_scheduler_config
        if not levels or schedule_config is None or self._extra_channels != self.vae.config.in_channels:
            raise UserError(f"upscale: {self.name} is no upscaler; load one such as the SD x4 upscaler")
        whole_number("noise_level", noise_level, 0, levels - 1)
        clip_skip = options.pop("clip_skip", None)
        context, negative, seeds = self._conditions(prompt, negative_prompt, num_images, seed, clip_skip)
        images = _one_for_each(images_to_unit(as_images(image)), len(seeds), "images")
        schedule = NoiseSchedule(schedule_config)
        rates = schedule.signal_rates[noise_level], schedule.noise_rates[noise_level]
        shape = (*images.shape[1:3], self.vae.config.latent_channels)

        def begin(noise, batch, streams):
            noisy = add_noise(images[batch], streams.draw(images.shape[1:]), *rates)
            return {"channels": noisy, "class_labels": np.full(len(batch), noise_level, "int32")}

        return self._sample(context, negative, seeds, shape, begin=begin, **options)

    @formerly(num_steps="num_inference_steps")
    @_task
    def random_walk(
        self,
        prompts: str | Sequence[str],
        num_frames: int = 24,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Images:
        """Generate the frames of a walk in latent space.

        Several prompts: text encodings are interpolated in equal steps, with the same noise. One prompt: the
        noise moves along a circle, so that the last frame leads to the first.

        Args:
            prompts: a text, or a list of texts.
            num_frames: frames of the whole walk, at least one for each prompt.
            negative_prompt: a text for all frames, or a list with one for each prompt, interpolated too.
            seed: of the noise; a circle uses `seed` and `seed` + 1.
            height, width and further arguments: as in `text_to_image`.

        Returns:
            uint8 `(num_frames, height, width, 3)`.

        Raises:
            UserError: there are fewer frames than prompts; or as `text_to_image`.
        """
        self._refuse_more_channels("random_walk")
        prompts, negatives = _prompts(prompts, negative_prompt)
        if whole_number("num_frames", num_frames, 1, MOST_IMAGES) < len(prompts):
            raise UserError(f"num_frames {num_frames}: fewer than the {len(prompts)} prompts; use more")
        clip_skip = options.pop("clip_skip", None)
        contexts, negatives = np.split(self.encode_text(prompts + negatives, clip_skip=clip_skip), 2)
        shape = self.latent_shape(height, width)
        noises = NoiseStreams(image_seeds(seed, 2)).draw(shape)
        if len(prompts) == 1:
            angles = 2 * np.pi * np.arange(num_frames) / num_frames
            weights = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("float32")
            noise = np.tensordot(weights, noises, axes=1)
            context, negative = (np.repeat(each, num_frames, axis=0) for each in (contexts, negatives))
        else:
            noise = np.repeat(noises[:1], num_frames, axis=0)
            context, negative = (_interpolate(each, num_frames) for each in (contexts, negatives))

        def begin(_, batch, streams):
            return {"noise": noise[batch]}

        # Samplers that add noise add the same to every frame.
        seeds = np.full(num_frames, seed, "uint64")
        return self._sample(context, negative, seeds, shape, begin=begin, **options)

    @formerly(images="image")
    def reconstruct(self, image: Images) -> Images:
        """Encode and decode images by the VAE, which bounds the quality of generated images.

        Args:
            image: uint8 `(height, width, 3)` or `(n, height, width, 3)`.

        Returns:
            uint8 `(n, height, width, 3)`.
        """
        return self.decode(self.encode_image(image))

    @property
    def _extra_channels(self):
        return self.unet.config.in_channels - self.vae.config.latent_channels

    def _check_guidance(self, given, negatives):
        """Check a task's arguments of guidance, and warn of those that have no effect without any."""
        scale = self.defaults.filled({"guidance_scale": given.get("guidance_scale")})["guidance_scale"]
        scale, rescale = checked_guidance_scale(scale), given.get("guidance_rescale")
        if "guidance_interval" in given:
            given["guidance_interval"] = checked_interval(given["guidance_interval"])
        unused = {
            "negative_prompt": any(negatives),
            "guidance_rescale": rescale is not None and checked_rescale(rescale),
            "guidance_interval": given.get("guidance_interval", (0, 1)) != (0, 1),
        }
        for name in unused if not gives_guidance(scale) else ():
            if unused[name]:
                warnings.warn(f"{name} has no effect at guidance_scale {scale:g}", stacklevel=4)

    def _refuse_more_channels(self, task):
        """Raise UserError if the UNet has further input channels."""
        if self._extra_channels:
            use = "upscale" if self.unet.config.num_class_embeds else "inpaint"
            raise UserError(f"{task}: {self.name} was trained for another task; use {use}")

    def _conditions(self, prompt, negative_prompt, num_images, seed, clip_skip):
        """Return for each image the encodings of both prompts `(tokens, width)`, and its seed."""
        prompts, negatives = _prompts(prompt, negative_prompt)
        num_images, seed = whole_number("num_images", num_images, 1, MOST_IMAGES), checked_seed(seed)
        encodings = self.encode_each(prompts + negatives, clip_skip)
        context, negative = (
            [encoding for encoding in kind for _ in range(num_images)]
            for kind in (encodings[: len(prompts)], encodings[len(prompts) :])
        )
        return context, negative, image_seeds(seed, len(context))

    def _sample(
        self,
        context,
        negative,
        seeds,
        shape,
        *,
        begin=None,
        strength=1.0,
        num_inference_steps=None,
        guidance_scale=None,
        guidance_rescale=None,
        sampler=None,
        progress=True,
        **options,
    ):
        """Generate an image for each text encoding and seed, in batches.

        Args:
            context, negative: for each image `(tokens, width)`.
            shape: of one image's latents.
            begin: called for each batch with `(noise, indices, streams)`; returns further arguments of
                `denoise`, "noise" to replace the noise, and "sample", the latents to start from if
                `strength` is below 1.
        """
        guidance = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
        chosen = self.defaults.filled({"num_inference_steps": num_inference_steps, **guidance})
        num_inference_steps = chosen.pop("num_inference_steps")
        grid = {
            "sampler": sampler,
            "num_inference_steps": num_inference_steps,
            "first_step": first_step(strength, num_inference_steps),
        }
        lengths = [math.lcm(len(each), len(other)) for each, other in zip(context, negative, strict=True)]
        batches = batches_of_lengths(lengths, self.batch_size, self.tokenizer.max_length)
        images = [None] * len(seeds)
        with _reporter(progress, len(batches) * (num_inference_steps - grid["first_step"])) as on_step:
            for batch, tokens in batches:
                streams = NoiseStreams(seeds[batch])
                noise = streams.draw(shape)
                given = begin(noise, batch, streams) if begin else {}
                latents, sample = given.pop("noise", noise), given.pop("sample", None)
                if sample is not None:
                    latents = self._denoiser.noisy(sample, latents, **grid)
                latents = self.denoise(
                    latents,
                    *(np.stack([repeated(kind[i], tokens) for i in batch]) for kind in (context, negative)),
                    streams=streams,
                    on_step=on_step,
                    **grid,
                    **chosen,
                    **given,
                    **options,
                )
                for index, image in zip(batch, self.decode(latents), strict=True):
                    images[index] = image
        return np.stack(images)


def _prompts(prompt, negative_prompt):
    """Return prompts and negative prompts as two lists of the same length."""
    prompts = as_texts("prompt", prompt)
    if negative_prompt is None or isinstance(negative_prompt, str):
        return prompts, [negative_prompt or ""] * len(prompts)
    negatives = as_texts("negative_prompt", negative_prompt)
    if len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one for each")
    return prompts, negatives


def _one_for_each(values, count, title):
    """Return one value repeated `count` times, or `count` values as they are."""
    if len(values) not in (1, count):
        raise UserError(f"{len(values)} {title} for {count} results; give one, or one for each")
    return values if len(values) == count else np.repeat(values, count, axis=0)


def _interpolate(points, count):
    """Return `count` points, linearly interpolated between the first and the last of `points`."""
    places = np.linspace(0, len(points) - 1, count)
    start = np.minimum(places.astype(int), len(points) - 2)
    share = (places - start).astype("float32").reshape(-1, *[1] * (points.ndim - 1))
    return points[start] * (1 - share) + points[start + 1] * share


def _check_progress(progress):
    """Raise a UserError unless progress can be shown, or told to a function."""
    if not (progress is None or isinstance(progress, bool | np.bool_) or callable(progress)):
        raise UserError(f"progress {shown(progress)}: give True, False or a function")


@contextlib.contextmanager
def _reporter(progress, total):
    """Yield the function that `denoise` calls after each of `total` steps, or None."""
    if not progress:
        yield None
    elif not callable(progress):
        with tqdm(total=total, unit="step") as bar:

            def advance(denoised):
                ops.convert_to_numpy(denoised.latents)  # waits for a step that was only dispatched
                bar.update()

            yield advance
    else:
        done = iter(range(1, total + 1))
        yield lambda denoised: progress(next(done), total, denoised.latents)


# For `help` and editors: the signatures name the options of `text_to_image` that a task passes on.
_SHARED = inspect.signature(StableDiffusion.text_to_image).parameters
for _name in ("image_to_image", "inpaint", "upscale", "random_walk"):
    _given = inspect.signature(_published := getattr(StableDiffusion, _name))
    _own = [each for each in _given.parameters.values() if each.kind is not each.VAR_KEYWORD]
    _more = [
        _SHARED[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in SamplingOptions.__annotations__
    ]
    _published.__signature__ = _given.replace(parameters=[*_own, *_more])
