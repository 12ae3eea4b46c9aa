"""The commands that fine-tune a model on captioned pictures: all of the UNet, or low-rank updates."""

import functools

import click

from keras_sd.train_options import (
    evaluation_options,
    evenly,
    example_sets,
    open_pipeline,
    run_options,
    settings_of,
    sources_of,
)

pretrained_option = click.option(
    "--pretrained-model-name-or-path",
    default="emoji",
    show_default=True,
    help="Preset, hub id, folder or file.",
)
validation_option = click.option(
    "--validation-prompts", multiple=True, help="A prompt of the sample grid; may be repeated."
)


def captioned_options(command):
    """The options of methods that train on captioned pictures."""
    options = [
        pretrained_option,
        click.option(
            "--snr-gamma", type=float, help="Gamma of min-SNR weighting; 5 is usual. Off by default."
        ),
        click.option("--noise-offset", default=0.0, help="Noise that is the same all over; 0.1 is usual."),
        click.option(
            "--input-perturbation", default=0.0, help="More noise on the input than is the target; 0.1."
        ),
        click.option(
            "--proportion-empty-prompts",
            default=0.1,
            show_default=True,
            help="Captions left out, for guidance.",
        ),
        validation_option,
        click.option("--guidance-scale", default=5.0, show_default=True, help="Guidance of the samples."),
        evaluation_options(),
    ]
    return functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)


def low_rank_options(*, rank, layers):
    """The options of low-rank updates, with these values by default."""
    options = [
        click.option(
            "--rank", default=rank, show_default=True, type=click.IntRange(1), help="Rank of the updates."
        ),
        click.option(
            "--lora-alpha", type=float, help="Updates are scaled by alpha / rank; the rank by default."
        ),
        click.option(
            "--lora-layers",
            default=layers,
            show_default=True,
            type=click.Choice(["attention", "all"]),
            help="Projections of attention, or all linear layers and the residual blocks' convolutions.",
        ),
    ]
    return lambda command: functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)


@click.command("text-to-image")
@run_options(output_dir="runs/text-to-image", train_batch_size=64, learning_rate=2e-4, ema_decay=0.999)
@captioned_options
@click.option("--from-scratch", is_flag=True, help="Begin with a new UNet instead of the pretrained one.")
@click.option("--unet-config", help="config.json of the new UNet; the emoji model's by default.")
@click.option("--pretrained-vae", help="Folder of a `vae` run's model, in place of the pretrained VAE.")
@click.option("--pretrained-clip", help="Folder of a `clip` run's model, in place of the pretrained CLIP.")
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="What the UNet predicts; as it was trained by default.",
)
def text_to_image(**options):
    """Train the UNet on captioned pictures: fine-tune a model, or begin one from scratch."""
    settings = settings_of(options)
    settings.use_precision()
    pipeline = open_pipeline(options)
    _train(settings, options, pipeline, pipeline.text_encoder, export=pipeline.save)


@click.command()
@run_options(
    output_dir="runs/lora",
    train_batch_size=64,
    learning_rate=1e-3,
    ema_decay=0.999,
    checkpoints_total_limit=2,
)
@captioned_options
@low_rank_options(rank=8, layers="attention")
@click.option("--train-text-encoder", is_flag=True, help="Low-rank updates for the text encoder too.")
def lora(rank, lora_alpha, lora_layers, train_text_encoder, **options):
    """Teach a model by low-rank updates (LoRA), kept in a small file beside it."""
    settings = settings_of(options)
    settings.use_precision()
    from keras_sd.training.lora import save_lora

    alpha = rank if lora_alpha is None else lora_alpha
    trained = ("unet", "text_encoder") if train_text_encoder else ("unet",)
    pipeline = open_pipeline(
        options, lambda parts: add_loras(parts, trained, rank, alpha, everywhere=lora_layers == "all")
    )
    models = {name: getattr(pipeline, name) for name in trained}
    _train(
        settings,
        options,
        pipeline,
        None if train_text_encoder else pipeline.text_encoder,
        identity={"method": "lora", "rank": rank, "alpha": alpha},
        export=lambda folder: save_lora(folder, models, alpha),
    )


def add_loras(parts, names, rank, alpha, *, everywhere):
    """Gives the named parts of a model low-rank updates."""
    from keras_sd.training.lora import add_lora

    for name in names:
        add_lora(parts[name], rank, alpha, everywhere=everywhere)


def encoded_examples(settings, options, pipeline, frozen_text_encoder, **sampling):
    """What a run on captioned pictures takes: its encoded source, the repeats and `make_evaluation`.

    Args:
        frozen_text_encoder: None if captions are to stay token ids.
        sampling: how evaluations sample, beside their number of steps: guidance_scale, sampler.
    """
    from keras_sd.images import image_grid
    from keras_sd.metrics.clip_score import ClipScore
    from keras_sd.metrics.features import ClipFeatures
    from keras_sd.training.encodings import EncodedSource
    from keras_sd.training.evaluation import SampleEvaluation

    image_size = pipeline.unet.config.sample_size * pipeline.vae.config.downsampling
    source, held_out, repeats = sources_of(options, image_size)
    encoded = EncodedSource(
        source, pipeline.vae, frozen_text_encoder, pipeline.tokenizer, jit_compile=settings.jit_compile
    )
    prompts = list(options["validation_prompts"])
    prompts = prompts or evenly([example["captions"][0] for example in held_out or source], 16)
    sets = example_sets(source, held_out, options["kid_images"]) if pipeline.image_encoder else {}

    def sample(texts):
        return pipeline.text_to_image(
            texts,
            num_steps=options["num_inference_steps"],
            seed=settings.seed,
            progress=False,
            **sampling,
        )

    captions = {name: [example["captions"][0] for example in examples] for name, examples in sets.items()}
    scored = sets and pipeline.clip_head is not None

    def make_evaluation(trainer):
        return SampleEvaluation(
            trainer,
            lambda: image_grid(sample(prompts), labels=prompts, scale=2),
            sets=sets,
            generate=lambda examples: sample([example["captions"][0] for example in examples]),
            extractor=ClipFeatures(pipeline.image_encoder) if sets else None,
            score=ClipScore(pipeline, captions) if scored else None,
        )

    return encoded, repeats, make_evaluation


def _train(settings, options, pipeline, frozen_text_encoder, *, export, identity=None):
    """Trains what is trainable of the pipeline; a text encoder that is not frozen is trained along."""
    from keras_sd.training.text_to_image import train_text_to_image

    encoded, repeats, make_evaluation = encoded_examples(
        settings, options, pipeline, frozen_text_encoder, guidance_scale=options["guidance_scale"]
    )
    train_text_to_image(
        settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        text_encoder=None if frozen_text_encoder else pipeline.text_encoder,
        identity=identity,
        repeats=repeats,
        min_snr_gamma=options["snr_gamma"],
        make_evaluation=make_evaluation,
        export=export,
        caption_dropout=options["proportion_empty_prompts"],
        noise_offset=options["noise_offset"],
        input_perturbation=options["input_perturbation"],
    )
