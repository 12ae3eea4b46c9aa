"""Upscaling: the command `upscale`, and the second stage of `generate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from keras_sd import interruption, presets
from keras_sd.arguments import whole_number

# Whatever loads a backend is imported inside, after the options have been checked.
from keras_sd.cli.command import Command, decorated, refuse_unused
from keras_sd.cli.model_options import model_options
from keras_sd.cli.outputs import output_option
from keras_sd.cli.sampling_options import check_sampling, fill_sampling, open_for_sampling, prompt_options
from keras_sd.cli.task_images import (
    check_images,
    image_seed,
    num_images_option,
    read_task_image,
    save_images,
    write_images,
)
from keras_sd.errors import UserError
from keras_sd.weights.diffusers_folder import holds_pixel_upscaler

_COMPUTATION = ("dtype", "batch_size", "jit_compile")
_OF_TEXT = ("engine", "quantize")  # of the computation of upscalers that take a text


@click.command(cls=Command)
@click.argument("image")
@click.argument("prompt", default="")
@output_option("image.png")
@num_images_option
@click.option(
    "--noise-level",
    type=click.IntRange(0),
    help="Noise added to IMAGE, in timesteps; more lets the model invent more. By default the model's own.",
)
@prompt_options
@model_options("emoji-upscaler")
def upscale(image, prompt, num_images, noise_level, **options):
    """Upscale IMAGE: 2x with the bundled model, 4x with Stable Diffusion's x4 upscaler.

    The bundled upscaler takes no PROMPT.

    \b
    keras-sd upscale small.png --output large.png
    """
    pixels = read_task_image(image)
    output = check_images(options, num_images)
    folder = presets.find(options["model"])
    more = {} if noise_level is None else {"noise_level": noise_level}
    _check_upscaler(f"model {options['model']}:", folder, noise_level)
    fill_sampling(options["model"], options)
    if holds_pixel_upscaler(folder):
        if prompt:
            raise UserError(f"{options['model']}: takes no prompt; leave it out, or give a model with text")
        unused = {"guidance_scale", "guidance_interval", "guidance_rescale", "negative_prompt"}
        unused |= {"vae", "loras", "lora_folder", "embeddings", "clip_skip", "engine", "quantize"}
        refuse_unused(unused, False, f"on {options['model']}, which takes no text")
        check_sampling(folder, options)
        _upscale_pixels(folder, pixels, output, num_images, more, options)
        return
    pipeline, sampling = open_for_sampling(options)
    images = pipeline.upscale(pixels, prompt, num_images=num_images, **more, **sampling)
    save_images(pipeline, images, output, prompt, sampling, {"Noise level": more.get("noise_level", 20)})


def _check_upscaler(title, folder, noise_level=None):
    """Raise UserError for a model or file that is no upscaler, or lacks the noise level."""
    from keras_sd.config import UNetConfig
    from keras_sd.weights.readers import read_configs

    unet = read_configs(folder).parts.get("unet")
    levels = unet and UNetConfig.from_dict(unet.config).num_class_embeds
    if not levels:
        raise UserError(f"{title} is no upscaler; use emoji-upscaler, x4-upscaler or another one")
    if noise_level is not None:
        whole_number("noise_level", noise_level, 0, levels - 1)


def _upscale_pixels(folder, pixels, output, num_images, noise_level, options):
    """Upscale with a pixel upscaler, which has no text encoder, and write the images."""
    upscaler = _open_pixel_upscaler(options["model"], folder, options)
    seed = options["seed"]
    settings = {name: options[name] for name in ("num_inference_steps", "sampler", "eta", "reuse_interval")}
    images = _run(upscaler, pixels[None].repeat(num_images, axis=0), seed=seed, **settings, **noise_level)
    from keras_sd.pipeline.image_parameters import sampling_parameters

    settings |= {"scheduler_config": upscaler.scheduler_config, "guidance_scale": 1.0}
    settings["size"] = images.shape[1:3]
    more = {"Noise level": noise_level.get("noise_level", 0), "Model": options["model"]}
    if options["dtype"] != "float32":
        more["Precision"] = options["dtype"]
    write_images(
        images, output, lambda index: sampling_parameters("", seed=image_seed(seed, index), **settings) | more
    )


def _open_pixel_upscaler(name, folder, options):
    with interruption.phase(f"opening {name}"):
        from keras_sd.pipeline.upscaler import Upscaler

        return Upscaler.load(folder, **{each: options[each] for each in _COMPUTATION})


def _run(upscaler, images, *, num_inference_steps, **settings):
    """Return upscaled images of a pixel upscaler, and show its steps."""
    from tqdm import tqdm

    turns = -(-len(images) // upscaler.batch_size)
    with tqdm(total=turns * num_inference_steps, unit="step") as bar:
        return upscaler.upscale(
            images,
            num_inference_steps=num_inference_steps,
            **settings,
            on_step=lambda denoised: bar.update(),
        )


second_stage_options = decorated(
    click.option(
        "--upscale", is_flag=True, help="Upscale the images by the upscaler that the model names as its own."
    ),
    click.option(
        "--upscaler",
        help="Upscale the images by this one: preset, hub id or folder, such as x4-upscaler.",
    ),
    click.option(
        "--upscaler-steps",
        type=click.IntRange(1),
        show_default="the upscaler's own",
        help="Denoising steps of the upscaler.",
    ),
)


class SecondStage(NamedTuple):
    """An upscaler that follows a task, checked before anything is opened.

    Attributes:
        name: what the user calls it.
        folder: where it is.
        num_inference_steps: its denoising steps.
        computation: options of the computation, as the first stage has them.
    """

    name: str
    folder: Path
    num_inference_steps: int
    computation: dict[str, Any]

    def open(self) -> Callable:
        """Open the upscaler.

        Returns:
            A function of images, prompt, negative prompt and seed, which returns the upscaled images. Image i
            is upscaled from `seed` + i, as it was drawn, so that it can be made again alone.
        """
        steps = {"num_inference_steps": self.num_inference_steps}
        if holds_pixel_upscaler(self.folder):
            upscaler = _open_pixel_upscaler(self.name, self.folder, self.computation)
            return lambda images, prompt, negative_prompt, seed: _run(upscaler, images, seed=seed, **steps)
        with interruption.phase(f"opening {self.name}"):
            from keras_sd.pipeline.prompts import take_loras
            from keras_sd.pipeline.stable_diffusion import StableDiffusion

            model = StableDiffusion.load(self.folder, name=self.name, **self.computation)

        def run(images, *texts, seed):
            # LoRAs are the first stage's.
            texts = [text and take_loras(text, lambda name: True)[0] for text in texts]
            return model.upscale(images, *texts, num_images=len(images), seed=seed, **steps)

        return run

    def parameters(self, scale):
        """Return what an image's file says of this stage, in A1111's words; `scale` is that of the sides."""
        return {
            "Postprocess upscale by": scale,
            "Postprocess upscaler": self.name,
            "Postprocess steps": self.num_inference_steps,
        }


def second_stage(options):
    """Remove the options of the second stage; return it, or None if no upscaling is asked for.

    Raises:
        UserError: the model has no upscaler of its own and none is named, or that is none; its steps are out
            of range, or given in vain.
    """
    wanted, name, steps = (options.pop(each) for each in ("upscale", "upscaler", "upscaler_steps"))
    refuse_unused({"upscaler_steps"}, wanted or name, "without --upscale or --upscaler")
    if not (wanted or name):
        return None
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.pipeline.defaults import ModelDefaults
    from keras_sd.weights.diffusers_folder import SCHEDULER

    title = f"--upscaler {name}:"
    if not name:
        name = ModelDefaults.load(presets.find(options["model"])).sampling["upscaler"]
        if not name:
            raise UserError(
                f"--upscale: {options['model']} names no upscaler of its own; give one by --upscaler, such "
                "as x4-upscaler"
            )
        title = f"--upscale: {name}, which {options['model']} names,"
    folder = presets.find(name)
    _check_upscaler(title, folder)
    if steps is None:
        steps = ModelDefaults.load(folder).sampling["num_inference_steps"]
    if (folder / SCHEDULER).is_file():
        whole_number("upscaler_steps", steps, 1, SchedulerConfig.load(folder / SCHEDULER).num_train_timesteps)
    return SecondStage(name, folder, steps, {each: options[each] for each in _COMPUTATION + _OF_TEXT})
