"""The commands that fine-tune a model on captioned images: all of the UNet, or low-rank updates."""

import click

from keras_sd.option_types import NOT_NEGATIVE, POSITIVE, SHARE
from keras_sd.train_options import (
    FILE,
    FILE_OR_FOLDER,
    SMALL_IMAGE,
    decorated,
    evaluation_options,
    evenly,
    example_sets,
    image_size_of,
    inference_steps_option,
    model_option,
    open_pipeline,
    prepare,
    refuse_unused,
    run_options,
    snr_gamma_option,
)

RANK = click.IntRange(1, 16_384)

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


def rank_options(rank):
    """Rank and alpha of low-rank updates, with this rank by default."""
    return decorated(
        click.option("--rank", default=rank, show_default=True, type=RANK, help="Rank of the updates."),
        click.option(
            "--lora-alpha", type=POSITIVE, help="Updates are scaled by alpha / rank; the rank by default."
        ),
    )


def low_rank_options(*, rank, layers):
    """The options of low-rank updates, with these values by default."""
    return decorated(
        rank_options(rank),
        click.option(
            "--lora-layers",
            default=layers,
            show_default=True,
            type=click.Choice(["attention", "all"]),
            help="Projections of attention, or all linear layers and the residual blocks' convolutions.",
        ),
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


@click.command("text-to-image")
@run_options("text-to-image", output_dir="runs/text-to-image")
@captioned_options("text-to-image")
@click.option("--from-scratch", is_flag=True, help="Begin with a new UNet instead of the pretrained one.")
@click.option("--unet-config", type=FILE, help="config.json of the new UNet; the emoji model's by default.")
@click.option(
    "--pretrained-vae",
    type=FILE_OR_FOLDER,
    help="Folder of a `vae` run's model, in place of the pretrained VAE.",
)
@click.option(
    "--pretrained-clip",
    type=FILE_OR_FOLDER,
    help="Folder of a `clip` run's model, in place of the pretrained CLIP.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="What the UNet predicts; as it was trained by default.",
)
def text_to_image(**options):
    """Train the UNet on captioned images: fine-tune a model, or begin one from scratch."""
    refuse_unused(["unet_config"], options["from_scratch"], "without --from-scratch")
    run = prepare("text-to-image", options, variant="from scratch" if options["from_scratch"] else None)
    pipeline = open_pipeline(run)
    whole = () if options["from_scratch"] else ("unet",)
    identity = base_parts(pipeline, whole)
    _train(run, pipeline, pipeline.text_encoder, identity=identity, export=pipeline.save)


@click.command()
@run_options("lora", output_dir="runs/lora")
@captioned_options("lora")
@low_rank_options(rank=8, layers="attention")
@click.option("--train-text-encoder", is_flag=True, help="Low-rank updates for the text encoder too.")
def lora(**options):
    """Teach a model by low-rank updates (LoRA), kept in a small file beside it."""
    trained = ("unet", "text_encoder") if options["train_text_encoder"] else ("unet",)
    run = prepare("lora", options, identity=low_rank_identity(options, trained))
    from keras_sd.training.lora import save_lora

    pipeline, alpha, identity = open_with_loras(run, trained)
    models = {name: getattr(pipeline, name) for name in trained}
    _train(
        run,
        pipeline,
        None if options["train_text_encoder"] else pipeline.text_encoder,
        identity={"method": "lora", **identity},
        export=lambda folder: save_lora(folder, models, alpha),
    )


def open_with_loras(run, names):
    """The pretrained model whose named parts have low-rank updates, their alpha, and what a checkpoint of
    them must share with a run: `(pipeline, alpha, identity)`."""
    identity = low_rank_identity(run.options, names)
    rank, alpha, layers = (identity[name] for name in ("rank", "lora_alpha", "lora_layers"))

    def adapt(parts):
        from keras_sd.training.lora import add_lora

        for name in names:
            add_lora(parts[name], rank, alpha, everywhere=layers == "all")

    return open_pipeline(run, adapt), alpha, identity


def low_rank_identity(options, names):
    """What options say of the low-rank updates of the named parts, as a checkpoint of them keeps it."""
    rank, alpha, layers = (options.get(name) for name in ("rank", "lora_alpha", "lora_layers"))
    alpha = rank if alpha is None else alpha
    return {"rank": rank, "lora_alpha": alpha, "lora_layers": layers, "trained": list(names)}


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
            num_steps=run.options["num_inference_steps"],
            seed=run.settings.seed,
            progress=False,
            **sampling,
        )

    def make_evaluation(trainer):
        from keras_sd.images import image_grid
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


def _train(run, pipeline, frozen_text_encoder, *, export, identity=None):
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
        identity=frozen_parts(pipeline, frozen_text_encoder) | (identity or {}),
        repeats=repeats,
        min_snr_gamma=options["snr_gamma"],
        make_evaluation=make_evaluation,
        export=export,
        caption_dropout=options["proportion_empty_prompts"],
        noise_offset=options["noise_offset"],
        input_perturbation=options["input_perturbation"],
    )


def frozen_parts(pipeline, frozen_text_encoder):
    """Fingerprints of the parts that a run depends on and that are no part of its objective."""
    from keras_sd.weights.rules import weights_fingerprint

    parts = {"vae": pipeline.vae}
    if frozen_text_encoder:
        parts["text_encoder"] = frozen_text_encoder
    return {name: weights_fingerprint(part) for name, part in parts.items()}


def base_parts(pipeline, names):
    """Fingerprints of the parts that are trained whole, as they were before."""
    from keras_sd.weights.rules import weights_fingerprint

    return {name: weights_fingerprint(getattr(pipeline, name)) for name in names}


def subject_evaluation(run, pipeline, prompt):
    """`make_evaluation` of a run on one subject: it draws the validation prompts, or this one."""

    def make_evaluation(trainer):
        from keras_sd.images import image_grid
        from keras_sd.training.evaluation import SampleEvaluation

        columns = run.options["num_validation_images"]
        labels = [text for text in run.options["validation_prompts"] or [prompt] for _ in range(columns)]
        scale = 2 if image_size_of(pipeline) <= SMALL_IMAGE else 1

        def grid():
            images = pipeline.text_to_image(
                labels,
                num_steps=run.options["num_inference_steps"],
                guidance_scale=run.options["guidance_scale"],
                seed=run.settings.seed,
                progress=False,
            )
            return image_grid(images, columns=columns, labels=labels, scale=scale)

        return SampleEvaluation(trainer, grid)

    return make_evaluation
