"""The commands that fine-tune a model on captioned images: all of the UNet, or low-rank updates."""

import click

from keras_sd.cli.command import decorated
from keras_sd.cli.option_types import NOT_NEGATIVE, SHARE
from keras_sd.cli.train.options import (
    evaluation_options,
    inference_steps_option,
    model_option,
    snr_gamma_option,
)
from keras_sd.cli.train.preparation import SMALL_IMAGE, example_sets, image_size_of

pretrained_option = click.option(
    "--pretrained-model-name-or-path",
    default="emoji",
    show_default=True,
    help="Preset, hub id, folder or file.",
)
validation_option = click.option(
    "--validation-prompts",
    multiple=True,
    help="A prompt of the sample grid; may be repeated. Some of the captions by default.",
)


def captioned_options(method):
    """The options of methods that train on captioned images."""
    return decorated(
        pretrained_option,
        snr_gamma_option,
        click.option(
            "--noise-offset",
            default=0.0,
            show_default=True,
            type=NOT_NEGATIVE,
            help="Noise that is the same all over a channel; 0.1 is usual.",
        ),
        click.option(
            "--input-perturbation",
            default=0.0,
            show_default=True,
            type=NOT_NEGATIVE,
            help="More noise on the input than is the target; 0.1 is usual.",
        ),
        click.option(
            "--proportion-empty-prompts",
            default=0.1,
            show_default=True,
            type=SHARE,
            help="Captions left out, for guidance.",
        ),
        validation_option,
        model_option(method, "guidance_scale"),
        evaluation_options(),
    )


def subject_options(method, prompt):
    """The options of methods that show what they have learned of one subject.

    Args:
        prompt: what is drawn where no prompt is given, for the help.
    """
    return decorated(
        click.option(
            "--validation-prompts",
            multiple=True,
            help=f"A prompt of the sample grid; may be repeated. {prompt} by default.",
        ),
        click.option(
            "--num-validation-images",
            default=4,
            show_default=True,
            type=click.IntRange(1, 256),
            help="Samples for each of these prompts.",
        ),
        inference_steps_option(30),
        model_option(method, "guidance_scale"),
    )


def encoded_examples(run, pipeline, frozen_text_encoder, **sampling):
    """What a run on captioned images takes: its encoded source, the repeats and `make_evaluation`.

    Args:
        frozen_text_encoder: None if captions are to stay token ids.
        sampling: how evaluations sample, beside their number of steps: guidance_scale, sampler.
    """
    from keras_sd.training.encodings import EncodedSource

    image_size = image_size_of(pipeline)
    source, held_out, repeats = run.sources(image_size)
    encoded = EncodedSource(
        source, pipeline.vae, frozen_text_encoder, pipeline.tokenizer, jit_compile=run.settings.jit_compile
    )

    def sample(texts):
        return pipeline.text_to_image(
            texts,
            num_inference_steps=run.options["num_inference_steps"],
            seed=run.settings.seed,
            progress=False,
            **sampling,
        )

    def make_evaluation(trainer):
        from keras_sd.data.sources import evenly
        from keras_sd.files.image_files import image_grid
        from keras_sd.metrics.clip_score import ClipScore
        from keras_sd.metrics.features import ClipFeatures
        from keras_sd.training.evaluation import SampleEvaluation
        from keras_sd.training.lora import without_updates

        is_small = image_size <= SMALL_IMAGE
        prompts = list(run.options["validation_prompts"]) or [
            captions[0] for captions in evenly((held_out or source).captions(), 16 if is_small else 4)
        ]
        count = run.options["kid_images"]
        sets = example_sets(source, held_out, count) if pipeline.image_encoder else {}
        captions = {name: [example["captions"][0] for example in examples] for name, examples in sets.items()}
        scored = sets and pipeline.clip_head is not None
        compiled = run.settings.jit_compile
        # By the text encoder as it was, whenever in a run this is made.
        with without_updates(pipeline.text_encoder):
            score = ClipScore(pipeline, captions, compiled) if scored else None
        return SampleEvaluation(
            trainer,
            lambda: image_grid(sample(prompts), labels=prompts, scale=2 if is_small else 1),
            sets=sets,
            generate=lambda examples: sample([example["captions"][0] for example in examples]),
            extractor=ClipFeatures(pipeline.image_encoder, jit_compile=compiled) if sets else None,
            score=score,
        )

    return encoded, repeats, make_evaluation


def train_on_captions(run, pipeline, frozen_text_encoder, *, export, identity=None):
    """Trains what is trainable of the pipeline; a text encoder that is not frozen is trained along."""
    from keras_sd.training.text_to_image import train_text_to_image

    options = run.options
    encoded, repeats, make_evaluation = encoded_examples(
        run, pipeline, frozen_text_encoder, guidance_scale=options["guidance_scale"]
    )
    train_text_to_image(
        run.settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        text_encoder=None if frozen_text_encoder else pipeline.text_encoder,
        identity=part_fingerprints(pipeline, "vae", *(["text_encoder"] if frozen_text_encoder else []))
        | (identity or {}),
        repeats=repeats,
        min_snr_gamma=options["snr_gamma"],
        make_evaluation=make_evaluation,
        export=export,
        caption_dropout=options["proportion_empty_prompts"],
        noise_offset=options["noise_offset"],
        input_perturbation=options["input_perturbation"],
    )


def part_fingerprints(pipeline, *names):
    """Return fingerprints of parts of a pipeline as they are before training, which a resumed run shares."""
    from keras_sd.weights.rules import weights_fingerprint

    return {name: weights_fingerprint(getattr(pipeline, name)) for name in names}


def subject_evaluation(run, pipeline, prompt):
    """`make_evaluation` of a run on one subject: it draws the validation prompts, or this one."""

    def make_evaluation(trainer):
        from keras_sd.files.image_files import image_grid
        from keras_sd.training.evaluation import SampleEvaluation

        columns = run.options["num_validation_images"]
        labels = [text for text in run.options["validation_prompts"] or [prompt] for _ in range(columns)]
        scale = 2 if image_size_of(pipeline) <= SMALL_IMAGE else 1

        def grid():
            images = pipeline.text_to_image(
                labels,
                num_inference_steps=run.options["num_inference_steps"],
                guidance_scale=run.options["guidance_scale"],
                seed=run.settings.seed,
                progress=False,
            )
            return image_grid(images, columns=columns, labels=labels, scale=scale)

        return SampleEvaluation(trainer, grid)

    return make_evaluation
