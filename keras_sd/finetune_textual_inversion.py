"""The command that teaches a model a new word by a few pictures: textual inversion."""

import functools
from pathlib import Path

import click

from keras_sd.errors import UserError
from keras_sd.train_options import open_pipeline, run_options, settings_of


def textual_inversion_options(command):
    """The options that are textual inversion's own."""
    options = [
        click.option(
            "--pretrained-model-name-or-path",
            default="emoji",
            show_default=True,
            help="Preset, hub id, folder or file.",
        ),
        click.option("--placeholder-token", required=True, help="The new word: `<my-cat>`."),
        click.option(
            "--initializer-token", help="Known words that it begins as; the mean of all by default."
        ),
        click.option(
            "--num-vectors",
            default=1,
            show_default=True,
            type=click.IntRange(1),
            help="Vectors of the word, and tokens that it takes of a prompt.",
        ),
        click.option(
            "--learnable-property",
            default="object",
            show_default=True,
            type=click.Choice(["object", "style"]),
            help="What the pictures have in common.",
        ),
        click.option(
            "--snr-gamma", type=float, help="Gamma of min-SNR weighting; 5 is usual. Off by default."
        ),
        click.option(
            "--validation-prompts",
            multiple=True,
            help="A prompt of the sample grid; may be repeated. The new word alone by default.",
        ),
        click.option(
            "--num-validation-images",
            default=4,
            show_default=True,
            type=click.IntRange(1),
            help="Samples for each of these prompts.",
        ),
        click.option(
            "--num-inference-steps",
            default=30,
            show_default=True,
            type=click.IntRange(1),
            help="Sampling steps of the samples.",
        ),
        click.option("--guidance-scale", default=5.0, show_default=True, help="Guidance of the samples."),
    ]
    return functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)


@click.command("textual-inversion")
@run_options(
    without=("dataset_name",),
    output_dir="runs/textual-inversion",
    max_train_steps=1000,
    train_batch_size=4,
    learning_rate=5e-3,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    ema_decay=0.99,
    evaluation_steps=250,
)
@textual_inversion_options
def textual_inversion(**options):
    """Teach a model a new word by a few pictures without captions (textual inversion).

    Only the vectors of that word are trained: the model stays as it is, and the file is a few kilobytes.
    """
    if not options["train_data_dir"]:
        raise UserError("--train-data-dir: missing; give a folder with pictures of what the word shall mean")
    from keras_sd.data.folders import FolderSource
    from keras_sd.data.images import MINIMUM_SIDE

    folder = Path(options["train_data_dir"])
    # Refuses what cannot be trained on before a model is opened.
    FolderSource(folder, MINIMUM_SIDE, need_captions=False)
    settings = settings_of(options)
    settings.use_precision()
    from keras_sd.training.textual_inversion import train_textual_inversion

    pipeline = open_pipeline(options)
    image_size = pipeline.unet.config.sample_size * pipeline.vae.config.downsampling
    train_textual_inversion(
        settings,
        pipeline,
        FolderSource(folder, image_size, need_captions=False),
        placeholder_token=options["placeholder_token"],
        initializer_token=options["initializer_token"],
        num_vectors=options["num_vectors"],
        learnable_property=options["learnable_property"],
        min_snr_gamma=options["snr_gamma"],
        make_evaluation=functools.partial(_make_evaluation, pipeline, options),
    )


def _make_evaluation(pipeline, options, trainer):
    """The evaluation that draws the validation prompts."""
    from keras_sd.images import image_grid
    from keras_sd.training.evaluation import SampleEvaluation

    prompts = options["validation_prompts"] or [options["placeholder_token"]]
    labels = [prompt for prompt in prompts for _ in range(options["num_validation_images"])]

    def grid():
        images = pipeline.text_to_image(
            labels,
            num_steps=options["num_inference_steps"],
            guidance_scale=options["guidance_scale"],
            seed=options["seed"],
            progress=False,
        )
        return image_grid(images, columns=options["num_validation_images"], labels=labels, scale=2)

    return SampleEvaluation(trainer, grid)
