"""The command that trains a diffusion upscaler on pixels (SR3, Saharia et al., 2022)."""

import functools

import click

from keras_sd import config
from keras_sd.cli.command import Command
from keras_sd.cli.train.data_options import dataset_config_option, source_options
from keras_sd.cli.train.diffusion import diffusion_of, diffusion_options
from keras_sd.cli.train.opening import defaults_from, read_config
from keras_sd.cli.train.options import COUNT, FILE, inference_steps_option, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.cli.train.validation import validation_of, validation_options, validation_sets
from keras_sd.training import architectures


@click.command("super-resolution", cls=Command)
@run_options("super-resolution", output_dir="runs/super-resolution", random_flip=True)
@source_options(captions=False)
@dataset_config_option
@click.option("--unet-config", type=FILE, help="config.json of the UNet; by default a small one.")
@click.option("--factor", default=2, type=click.IntRange(2), help="Upscaling factor of the sides.")
@click.option(
    "--crop-size",
    default=48,
    type=COUNT,
    help="Side in pixels of the random squares of the resized images to train on.",
)
@diffusion_options
@validation_options
@inference_steps_option(10)
@click.option(
    "--validation-images", default=32, type=COUNT, help="Held-out images that evaluations shrink and upscale."
)
def super_resolution(unet_config, factor, crop_size, num_inference_steps, validation_images, **options):
    """Train a diffusion upscaler on images and smaller copies of them.

    \b
    python -m keras_sd.train super-resolution --train-data-dir images
    """
    run = prepare(
        "super-resolution",
        options | {"num_inference_steps": num_inference_steps},
        defaults_from=defaults_from(unet_config),
        need_captions=False,
        scheduler_config=architectures.UPSCALER_SCHEDULER,
        identity={"factor": factor, "crop": crop_size},
    )
    import numpy as np

    from keras_sd.data.sources import evenly
    from keras_sd.files.image_files import image_grid
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline.upscaler import Upscaler
    from keras_sd.training.evaluation_schedule import Evaluation
    from keras_sd.training.super_resolution import measure_upscaling, train_super_resolution

    unet_config = read_config(unet_config, config.UNetConfig, architectures.UPSCALER_UNET)
    upscaler = Upscaler(
        UNet(unet_config),
        architectures.UPSCALER_SCHEDULER,
        architectures.LOW_RES_SCHEDULER,
        jit_compile=run.settings.jit_compile,
    )
    source, held_out, repeats = run.sources(unet_config.sample_size)

    @functools.cache  # for both the compilation and the evaluation
    def shown():
        examples = evenly(held_out or source.squares(), validation_images)
        return np.stack([example["image"] for example in examples])

    def measure():
        return measure_upscaling(upscaler, shown(), factor=factor, num_inference_steps=num_inference_steps)

    def make_evaluation(trainer):
        def evaluate(step):
            with trainer.ema.applied():
                images, figures = measure()
            trainer.log_figures(step, figures)
            trainer.log.log_image(step, "samples", image_grid(np.concatenate([images, shown()]), columns=8))

        return evaluate

    train_super_resolution(
        run.settings,
        upscaler,
        source,
        factor=factor,
        crop_size=crop_size,
        repeats=repeats,
        diffusion=diffusion_of(options),
        make_evaluation=Evaluation(make_evaluation, measure),
        validation=validation_of(run, validation_sets(run, source, held_out)),
    )
