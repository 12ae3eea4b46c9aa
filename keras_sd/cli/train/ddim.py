"""The command that trains an unconditional diffusion model on pixels (DDIM, Song et al., 2021)."""

import functools

import click

from keras_sd import config
from keras_sd.cli.command import Command
from keras_sd.cli.train.data_options import dataset_config_option, source_options
from keras_sd.cli.train.diffusion import diffusion_of, diffusion_options
from keras_sd.cli.train.kid import emoji_image_encoder, example_sets, extractor_of
from keras_sd.cli.train.opening import defaults_from, read_config
from keras_sd.cli.train.options import FILE, evaluation_options, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.cli.train.validation import validation_of, validation_options, validation_sets
from keras_sd.training import architectures


@click.command(cls=Command)
@run_options("ddim", output_dir="runs/ddim", random_flip=True)
@source_options(captions=False)
@dataset_config_option
@click.option(
    "--unet-config", type=FILE, help="config.json of the UNet; by default a small one without attention."
)
@diffusion_options
@validation_options
@evaluation_options()
def ddim(unet_config, num_inference_steps, **options):
    """Train an unconditional diffusion model on pixels, like the Keras example for DDIM.

    \b
    python -m keras_sd.train ddim --train-data-dir images --resolution 64
    """
    run = prepare(
        "ddim",
        options | {"num_inference_steps": num_inference_steps},
        defaults_from=defaults_from(unet_config),
        need_captions=False,
        scheduler_config=architectures.PIXEL_SCHEDULER,
        # Without captions, emoji and their variants count alike.
        counts_repeats=lambda source: not getattr(source, "is_drawn", False),
    )
    import dataclasses

    from keras_sd.files.image_files import image_grid
    from keras_sd.training.evaluation import SampleEvaluation
    from keras_sd.training.evaluation_schedule import Evaluation
    from keras_sd.training.pixel_ddim import sample_images, train_pixel_ddim

    unet_config = read_config(unet_config, config.UNetConfig, architectures.PIXEL_UNET)
    unet_config = dataclasses.replace(unet_config, sample_size=run.resolution(unet_config.sample_size))
    source, held_out, repeats = run.sources(unet_config.sample_size)

    @functools.cache  # for both the compilation and the evaluation
    def sets():
        return example_sets(source.squares(), held_out, run.options["kid_images"])

    def evaluation_of(denoiser):
        def sample(count):
            return sample_images(
                denoiser, count, num_inference_steps=num_inference_steps, seed=run.settings.seed
            )

        def make(trainer):
            return SampleEvaluation(
                trainer,
                lambda: image_grid(sample(16), scale=2),
                sets=sets(),
                generate=lambda examples: sample(len(examples)),
                extractor=extractor_of(run, emoji_image_encoder) if sets() else None,
            )

        return Evaluation(make, lambda: [sample(count) for count in {16, *map(len, sets().values())}])

    train_pixel_ddim(
        run.settings,
        unet_config,
        architectures.PIXEL_SCHEDULER,
        source,
        repeats=repeats,
        diffusion=diffusion_of(options),
        make_evaluation=evaluation_of,
        validation=validation_of(run, validation_sets(run, source, held_out)),
    )
