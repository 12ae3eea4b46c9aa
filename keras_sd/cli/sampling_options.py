"""Options of sampling, their defaults from the model, and their checks before it is opened."""

import click

# Whatever loads a backend is imported inside, after the options have been checked.
from keras_sd import presets
from keras_sd.arguments import LARGEST_SEED, checked_interval
from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.model_options import open_model, skipped_layers
from keras_sd.cli.option_types import NOT_NEGATIVE, SHARE
from keras_sd.diffusion.samplers import SAMPLERS, sampler_key
from keras_sd.errors import UserError


class _SamplerChoice(click.Choice):
    def convert(self, value, parameter, context):
        return super().convert(sampler_key(value), parameter, context)


sampling_options = decorated(
    click.option(
        "--num-inference-steps",
        type=click.IntRange(1),
        show_default="the model's own; usually 30, of an upscaler on pixels 10",
        help="Denoising steps for an image; the time is proportional to them.",
    ),
    click.option(
        "--guidance-scale",
        type=NOT_NEGATIVE,
        show_default="the model's own; usually 7.5",
        help="Strength of classifier-free guidance (CFG scale); 1 or less: no guidance, half the time.",
    ),
    click.option(
        "--guidance-rescale",
        type=SHARE,
        show_default="the model's own; usually 0",
        help="Reduce overexposure by guidance; 0: off, otherwise usually 0.7.",
    ),
    click.option(
        "--guidance-interval",
        default=(0.0, 1.0),
        type=(SHARE, SHARE),
        metavar="START END",
        help="Fractions of the steps between which there is guidance; other steps take half the time.",
    ),
    click.option(
        "--reuse-interval",
        default=1,
        type=click.IntRange(1),
        help="Run the whole UNet every N steps; steps between reuse its deep features (DeepCache).",
    ),
    click.option(
        "--sampler",
        type=_SamplerChoice(tuple(SAMPLERS)),
        show_default="the model's own",
        help="How a step follows from the last. A1111's names are understood.",
    ),
    click.option(
        "--seed", default=0, type=click.IntRange(0, LARGEST_SEED), help="Image i uses this seed + i."
    ),
)

prompt_options = decorated(
    click.option("--negative-prompt", help="What the images must not show. By default nothing."),
    sampling_options,
    click.option(
        "--eta", default=0.0, type=SHARE, help="Fraction of fresh noise in a step of DDIM and TCD; 0: none."
    ),
    click.option(
        "--clip-skip",
        default=1,
        type=click.IntRange(1, 1000),
        help="Layer of the text encoder that is used, counted from the last, which is 1, as in A1111.",
    ),
)


def fill_sampling(model, options):
    """Set steps and guidance that are not given to the model's own defaults (`keras_sd.json`).

    Args:
        model: its name.
        options: of the command; changed in place.
    """
    from keras_sd.pipeline.defaults import ModelDefaults

    names = ("num_inference_steps", "guidance_scale", "guidance_rescale")
    options |= ModelDefaults.load(presets.find(model)).filled({name: options[name] for name in names})


def check_sampling(model, options):
    """Raise UserError for options of sampling that the model cannot take, if its files say it already.

    Args:
        model: its name.
        options: of the command, after `fill_sampling`.
    """
    folder = presets.find(model)
    from keras_sd.diffusion.samplers import find_sampler
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.weights.diffusers_folder import SCHEDULER

    if (folder / SCHEDULER).is_file():
        config, steps = SchedulerConfig.load(folder / SCHEDULER), options["num_inference_steps"]
        if steps > config.num_train_timesteps:
            raise UserError(
                f"num_inference_steps {steps}: out of range; use 1 to {config.num_train_timesteps}"
            )
        sampler = find_sampler(options["sampler"], config)
        sampler.tables(NoiseSchedule(config), steps, options.get("eta", 0.0))
    scale = options["guidance_scale"]
    unused = {"guidance_interval", "guidance_rescale"}
    if options.get("negative_prompt"):
        unused.add("negative_prompt")
    refuse_unused(unused, scale > 1, f"with --guidance-scale {scale:g}, which is no guidance")


def open_for_sampling(options):
    """Open the model that the options name, after `fill_sampling`.

    Returns:
        The pipeline, and the remaining options, which its task takes.
    """
    names = ("model", "vae", "loras", "lora_folder", "embeddings")
    names += ("dtype", "batch_size", "jit_compile", "engine", "quantize")
    model = {name: options.pop(name) for name in names}
    check_sampling(model["model"], options)
    checked_interval(options["guidance_interval"])
    pipeline = open_model(**model)
    options["clip_skip"] = skipped_layers(pipeline.text_encoder, options["clip_skip"])
    return pipeline, options
