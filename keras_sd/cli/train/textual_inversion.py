"""The command that teaches a model a new word from a few images: textual inversion (Gal et al., 2022)."""

import click

from keras_sd import presets
from keras_sd.cli.command import Command
from keras_sd.cli.train.caching import caching_of, caching_options
from keras_sd.cli.train.data_options import clip_skip_identity, dataset_config_option, on_bad_sample_option
from keras_sd.cli.train.diffusion import diffusion_of, diffusion_options
from keras_sd.cli.train.fine_tuning import (
    clip_skip_option,
    part_fingerprints,
    pretrained_option,
    subject_evaluation,
    subject_options,
)
from keras_sd.cli.train.masks import mask_options
from keras_sd.cli.train.opening import image_size_of, open_pipeline
from keras_sd.cli.train.options import run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.cli.train.validation import validated_examples
from keras_sd.errors import UserError
from keras_sd.models.tokenizer import Tokenizer, vector_names


@click.command("textual-inversion", cls=Command)
@run_options(
    "textual-inversion",
    without=("dataset_name",),
    output_dir="runs/textual-inversion",
    evaluation_steps=250,
)
@pretrained_option
@click.option("--placeholder-token", required=True, help="The new word, such as `<my-cat>`.")
@click.option(
    "--initializer-token",
    help="Known words whose vectors it starts from. By default the mean of all vectors.",
)
@click.option(
    "--num-vectors",
    default=1,
    type=click.IntRange(1, 75),  # the tokens of one chunk of CLIP's
    help="Vectors of the word; it takes as many tokens of a prompt.",
)
@click.option(
    "--learnable-property",
    default="object",
    type=click.Choice(["object", "style"]),
    help="What the images have in common; chooses the training prompts.",
)
@dataset_config_option
@on_bad_sample_option
@clip_skip_option
@mask_options
@diffusion_options
@caching_options
@subject_options("textual-inversion", "the new word alone")
def textual_inversion(**options):
    """Teach a model a new word from a few images without captions (textual inversion).

    Only the vectors of the word are trained. The model stays as it is, and the file has a few kilobytes.

    \b
    python -m keras_sd.train textual-inversion --train-data-dir cat --placeholder-token "<cat>"
    """
    if not options["train_data_dir"] and not options["dataset_config"]:
        raise UserError("--train-data-dir: missing; give a folder with images of what the word shall mean")
    words = vector_names(options["placeholder_token"], options["num_vectors"])
    tokenizer = presets.find(options["pretrained_model_name_or_path"]) / "tokenizer"
    if tokenizer.is_dir():  # otherwise the words are checked when the model is open
        Tokenizer.load(tokenizer).add_tokens(words)
    identity = {name: options[name] for name in ("initializer_token", "learnable_property")}
    identity |= {"tokens": words}
    run = prepare("textual-inversion", options, need_captions=False, identity=identity)
    from keras_sd.training.conditioning import refuse_conditioning
    from keras_sd.training.textual_inversion import train_textual_inversion
    from keras_sd.weights.textual_inversion import DIFFUSERS_FILE

    pipeline = open_pipeline(run)
    refuse_conditioning(pipeline, "textual-inversion")
    source, _, repeats = run.sources(image_size_of(pipeline), pipeline.vae.config.downsampling)
    finished = train_textual_inversion(
        run.settings,
        pipeline,
        source,
        placeholder_token=options["placeholder_token"],
        initializer_token=options["initializer_token"],
        num_vectors=options["num_vectors"],
        learnable_property=options["learnable_property"],
        repeats=repeats,
        identity=part_fingerprints(pipeline, "vae") | clip_skip_identity(options),
        diffusion=diffusion_of(options),
        caching=caching_of(options),
        make_evaluation=subject_evaluation(run, pipeline, options["placeholder_token"]),
        validation_examples=validated_examples(run),
    )
    if finished:
        run.print_next_command("--embedding", DIFFUSERS_FILE, prompt=options["placeholder_token"])
