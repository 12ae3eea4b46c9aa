"""Options and evaluations that the methods for fine-tuning a pretrained model share."""

import functools
import warnings

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import SHARE
from keras_sd.cli.train.caching import caching_of, caching_options
from keras_sd.cli.train.data_options import (
    caption_identity,
    caption_options,
    caption_rules,
    source_options,
)
from keras_sd.cli.train.diffusion import diffusion_of, diffusion_options
from keras_sd.cli.train.kid import example_sets, extractor_of
from keras_sd.cli.train.masks import mask_options
from keras_sd.cli.train.opening import SMALL_IMAGE, image_size_of
from keras_sd.cli.train.optimizer import text_encoder_rate_option
from keras_sd.cli.train.options import (
    evaluation_options,
    inference_steps_option,
    model_option,
)
from keras_sd.cli.train.prompts import sample_options
from keras_sd.cli.train.samples import sample_grid, sampling
from keras_sd.cli.train.validation import (
    encoded_validation,
    of_training_images,
    validation_options,
    validation_sets,
)

pretrained_option = click.option(
    "--pretrained-model-name-or-path",
    default="emoji",
    help="Model to train: preset, hub id, diffusers folder, or single file.",
)


zero_snr_option = click.option(
    "--rescale-betas-zero-snr",
    "--zero-terminal-snr",
    is_flag=True,
    help="Make the last timestep noise alone (zero terminal SNR), in the written model, too. The UNet must "
    "predict v or the sample.",
)


clip_skip_option = click.option(
    "--clip-skip",
    default=1,
    type=click.IntRange(1, 1000),
    help="Layer of the text encoder that is used, counted from the last, which is 1, as in kohya's scripts.",
)


def text_encoder_options(text):
    """Return a decorator that adds the options of training the text encoder, too.

    Args:
        text: the help of the first.
    """
    return decorated(click.option("--train-text-encoder", is_flag=True, help=text), text_encoder_rate_option)


def trained_parts(options):
    """Return the names of the models that are trained."""
    return ("unet", "text_encoder") if options["train_text_encoder"] else ("unet",)


def captioned_options(method):
    """Return a decorator that adds the options of methods that train on captioned images."""
    return decorated(
        pretrained_option,
        source_options(),
        caption_options,
        clip_skip_option,
        mask_options,
        diffusion_options,
        click.option(
            "--proportion-empty-prompts",
            default=0.1,
            type=SHARE,
            help="Fraction of captions replaced by the empty prompt, as guidance needs.",
        ),
        caching_options,
        validation_options,
        sample_options("some of the captions"),
        model_option(method, "guidance_scale"),
        evaluation_options(),
    )


def subject_options(method, prompt):
    """Return a decorator that adds the sampling options of methods that learn one subject.

    Args:
        prompt: describes the default prompt in the help.
    """
    return decorated(
        of_training_images,
        sample_options(prompt),
        click.option(
            "--num-validation-images", default=4, type=click.IntRange(1, 256), help="Images of each prompt."
        ),
        inference_steps_option(30),
        model_option(method, "guidance_scale"),
    )


def encoded_examples(run, pipeline, frozen_text_encoder, captions=None, alignment=None, **options):
    """Return encoded source, repeats, `Evaluation` and `Validation` of a run on captioned images.

    Args:
        frozen_text_encoder: None if the text encoder encodes captions in the training step, so that they are
            only tokenized.
        captions: `data.captions.Captions`, or one for each example, if they are drawn anew each time; without
            a frozen text encoder.
        alignment: `training.alignment.Alignment`, or None.
        options: of sampling in evaluations, such as guidance_scale and sampler.
    """
    from keras_sd.data.sources import evenly
    from keras_sd.models.parameters import parameter_paths
    from keras_sd.training.caption_tokenizer import CaptionTokenizer, DrawnCaptions
    from keras_sd.training.conditioning import conditioning_of
    from keras_sd.training.evaluation_schedule import Evaluation
    from keras_sd.training.lora import without_updates
    from keras_sd.training.stored_encodings import encoded_source

    conditioning = conditioning_of(pipeline)
    caching = caching_of(run.options)
    if conditioning is not None:
        caching = caching.encoding_each_time(conditioning.reason)
        run.command = conditioning.command

    def texts():
        some = evenly((held_out or source).captions(), 16 if source.framing.resolution <= SMALL_IMAGE else 4)
        return [captions[0] for captions in some]

    def images(count):
        return evenly(held_out or source.squares(), count)

    grid = sample_grid(run, pipeline, texts, conditioning=conditioning, images=images, **options)
    source, held_out, repeats = run.sources(image_size_of(pipeline), pipeline.vae.config.downsampling)
    tokenizer = CaptionTokenizer(pipeline.tokenizer, int(run.options.get("max_token_length", 75)))
    encoded = encoded_source(
        source,
        pipeline.vae,
        frozen_text_encoder,
        tokenizer,
        caching,
        jit_compile=run.settings.jit_compile,
        alignment=alignment,
    )
    sets = validation_sets(run, source, held_out)
    mode = "memory" if conditioning is None else "off"
    validation = encoded_validation(run, sets, pipeline, frozen_text_encoder, tokenizer, mode)
    if tokenizer.cut_line():
        warnings.warn(tokenizer.cut_line(), stacklevel=2)
    if captions is not None:
        captions = caption_rules(run.options, run.source)  # of the images that are left
        encoded = DrawnCaptions(encoded, source.captions(), captions, tokenizer)

    sample = sampling(run, pipeline, conditioning, **options)
    extractor = extractor_of(run, lambda: pipeline.image_encoder)

    def score_of(captions):
        """Return the CLIP score of sets of captions by the pretrained text encoder."""
        from keras_sd.metrics.clip_score import ClipScore

        if not captions or pipeline.image_encoder is None or pipeline.clip_head is None:
            return None
        with without_updates(pipeline.text_encoder):
            return ClipScore(pipeline, captions, run.settings.jit_compile)

    @functools.cache  # for both the compilation and the evaluation
    def captions_of_sets():
        sets = example_sets(source.squares(), held_out, run.options["kid_images"])
        sets = sets if extractor is not None else {}
        return sets, {name: [one["captions"][0] for one in examples] for name, examples in sets.items()}

    # A text encoder whose own weights are trained is another one later, and in a resumed run from the start.
    scores_now = frozen_text_encoder is None and any(
        one.variable.trainable and ".lora_" not in one.name for one in parameter_paths(pipeline.text_encoder)
    )
    scores_now = scores_now and run.settings.evaluation_steps
    score_before = score_of(captions_of_sets()[1]) if scores_now else None

    def generate(examples):
        return sample([example["captions"][0] for example in examples], examples)

    def make_evaluation(trainer):
        from keras_sd.training.evaluation import SampleEvaluation

        sets, captions = captions_of_sets()
        return SampleEvaluation(
            trainer,
            grid,
            sets=sets,
            generate=generate,
            extractor=extractor,
            score=score_before or score_of(captions),
        )

    def compile_evaluation():
        grid()
        for examples in captions_of_sets()[0].values():
            generate(examples)

    return encoded, repeats, Evaluation(make_evaluation, compile_evaluation), validation


def train_on_captions(run, pipeline, frozen_text_encoder, *, export, identity=None, alignment=None):
    """Train the trainable weights of the UNet, and of the text encoder unless it is frozen.

    Args:
        alignment: `training.alignment.Alignment` of the UNet, or None.

    Returns:
        Whether training reached its end.
    """
    from keras_sd.training.conditioning import conditioning_of
    from keras_sd.training.lora import freeze
    from keras_sd.training.text_to_image import train_text_to_image

    options, captions = run.options, caption_rules(run.options, run.source)
    is_encoded_before = frozen_text_encoder is not None and captions is None
    if frozen_text_encoder is not None and captions is not None:
        freeze(frozen_text_encoder)  # it becomes a part of the objective
    encoded, repeats, make_evaluation, validation = encoded_examples(
        run,
        pipeline,
        frozen_text_encoder if is_encoded_before else None,
        captions,
        alignment,
        guidance_scale=options["guidance_scale"],
    )
    return train_text_to_image(
        run.settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        text_encoder=None if is_encoded_before else pipeline.text_encoder,
        identity=part_fingerprints(pipeline, "vae", *(["text_encoder"] if frozen_text_encoder else []))
        | _small_image_identity(pipeline)
        | caption_identity(options)
        | (identity or {}),
        repeats=repeats,
        diffusion=diffusion_of(options),
        make_evaluation=make_evaluation,
        validation=validation,
        export=export,
        caption_dropout=options["proportion_empty_prompts"],
        conditioning=conditioning_of(pipeline),
        alignment=alignment,
    )


def _small_image_identity(pipeline):
    """Return what a resumed run shares of the noise on an upscaler's small image; nothing of other models."""
    schedule = pipeline.low_res_scheduler_config
    return {} if schedule is None else {"low_res_schedule": schedule.noise_schedule()}


def part_fingerprints(pipeline, *names):
    """Return the fingerprints of parts of a pipeline before training, which a resumed run must share."""
    from keras_sd.weights.rules import weights_fingerprint

    return {name: weights_fingerprint(getattr(pipeline, name)) for name in names}


def subject_evaluation(run, pipeline, prompt):
    """Return the `Evaluation` of a run on one subject: images of the validation prompts, or of `prompt`."""
    from keras_sd.training.evaluation_schedule import Evaluation

    grid = sample_grid(
        run,
        pipeline,
        lambda: [prompt],
        columns=run.options["num_validation_images"],
        guidance_scale=run.options["guidance_scale"],
    )

    def make_evaluation(trainer):
        from keras_sd.training.evaluation import SampleEvaluation

        return SampleEvaluation(trainer, grid)

    return Evaluation(make_evaluation, grid)
