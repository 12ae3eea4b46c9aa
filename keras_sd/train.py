"""Training from the command line: `python -m keras_sd.train [METHOD] [OPTIONS]`."""

import functools

import click

from keras_sd import config
from keras_sd.errors import UserError, run_command

FEWEST_FOR_KID = 4  # pictures in a set: two in each half


class MethodGroup(click.Group):
    """A group that trains text-to-image when no method is named."""

    def parse_args(self, context, arguments):
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
            arguments = ["text-to-image", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=MethodGroup)
def train():
    """Train a part of a model: text-to-image unless another method is named."""


def run_options(**defaults):
    """The options that every method has; `defaults` replaces default values by the option's name."""

    def option(flag, default, text, **more):
        name = flag.split("/")[0].lstrip("-").replace("-", "_")
        return click.option(flag, default=defaults.get(name, default), show_default=True, help=text, **more)

    options = [
        option("--output-dir", None, "Run folder: checkpoints, logs, samples and, at the end, the model."),
        option("--dataset-name", "emoji", "`emoji` or the name of a TFDS data set."),
        option("--train-data-dir", None, "Folder of images; takes the place of --dataset-name."),
        option("--max-train-steps", 1000, "Updates of the weights."),
        option("--train-batch-size", 32, "Images in a batch."),
        option("--gradient-accumulation-steps", 1, "Batches in one update."),
        option("--learning-rate", 1e-3, "Highest learning rate."),
        option(
            "--lr-scheduler", "cosine", "Course after the warm-up.", type=click.Choice(["cosine", "constant"])
        ),
        option("--lr-warmup-steps", 100, "Updates over which the learning rate rises from 0."),
        option("--adam-beta1", 0.9, "Decay of the first moment."),
        option("--adam-beta2", 0.99, "Decay of the second moment."),
        option("--adam-weight-decay", 0.01, "Decoupled weight decay."),
        option("--max-grad-norm", 1.0, "Global norm at which gradients are clipped."),
        option("--ema-decay", 0.9999, "Largest decay of the averaged weights."),
        option(
            "--mixed-precision", "no", "Precision of the layers.", type=click.Choice(["no", "fp16", "bf16"])
        ),
        option("--jit-compile/--no-jit-compile", True, "Compile the step by XLA."),
        option("--seed", 0, "Seed of weights, order, noise and timesteps."),
        option("--checkpointing-steps", 500, "Updates between two checkpoints."),
        option("--checkpoints-total-limit", 2, "Checkpoints to keep."),
        option("--resume-from-checkpoint", None, "`latest` or a checkpoint folder."),
        option("--evaluation-steps", 1000, "Updates between two evaluations."),
    ]

    def decorate(command):
        return functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)

    return decorate


def _settings(options):
    """Makes the `Settings` of a command's options, and seeds the weights."""
    import dataclasses
    import random

    from keras_sd.training.trainer import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in options.items() if name in names})
    # Keras' initialisers take their seeds from this generator. `keras.utils.set_random_seed` sets it too,
    # but imports TensorFlow, where it is installed, under every backend.
    random.seed(settings.seed)
    return settings


def _sources(options, image_size, need_captions=True):
    """The training examples, the held-out ones (empty when there are none) and the repeats."""
    from keras_sd.data.datasets import available_splits, load_source

    name = options["train_data_dir"] or options["dataset_name"]
    source = load_source(name, "train", image_size, need_captions)
    held_out = ()
    if "validation" in available_splits(name):
        held_out = load_source(name, "validation", image_size, need_captions)
    return source, held_out, source.repeats() if hasattr(source, "repeats") else None


def _example_sets(source, held_out, count):
    """The examples that KID is measured on, spread evenly over each split that has enough of them."""
    if 0 < count < FEWEST_FOR_KID:
        raise UserError(f"--kid-images {count}: too few; give {FEWEST_FOR_KID} or more, or 0 for none")
    splits = {"train": source, "held_out": held_out}
    return {
        name: _evenly(split, count)
        for name, split in splits.items()
        if count and len(split) >= FEWEST_FOR_KID
    }


def _evenly(sequence, count):
    """Up to `count` elements at equal distances."""
    count = min(count, len(sequence))
    return [sequence[index * len(sequence) // count] for index in range(count)]


def _extractor(name):
    """The feature extractor of that KID; the choice offers no other names."""
    from keras_sd.loading import load_part
    from keras_sd.metrics.features import ClipFeatures, InceptionFeatures
    from keras_sd.presets import find

    if name == "kid_inception":
        return InceptionFeatures(75)
    return ClipFeatures(load_part(find("emoji"), "image_encoder"))


_PARTS = ("tokenizer", "text_encoder", "image_encoder", "clip_head", "unet", "vae", "scheduler_config")


def _open_pipeline(options):
    """The pretrained model, with those parts replaced that the options name or begin anew."""
    import dataclasses

    from keras_sd.loading import load_clip, load_part
    from keras_sd.models.unet import UNet
    from keras_sd.pipeline import StableDiffusion

    vae_folder, clip_folder = options["pretrained_vae"], options["pretrained_clip"]
    parts = {}
    if not (vae_folder and clip_folder and options["from_scratch"]):
        pretrained = StableDiffusion.from_preset(options["pretrained_model_name_or_path"])
        parts = {name: getattr(pretrained, name) for name in _PARTS}
    if vae_folder:
        parts["vae"] = load_part(vae_folder, "vae")
    if clip_folder:
        parts |= load_clip(clip_folder)
    if options["from_scratch"]:
        parts["unet"] = UNet(_config(options["unet_config"], config.UNetConfig, config.EMOJI_UNET))
        parts.setdefault("scheduler_config", config.EMOJI_SCHEDULER)
    if options["prediction_type"]:
        parts["scheduler_config"] = dataclasses.replace(
            parts["scheduler_config"], prediction_type=options["prediction_type"]
        )
    # What fits in training fits in sampling.
    return StableDiffusion(**parts, batch_size=options["train_batch_size"])


def _config(path, config_class, default):
    return config_class.load(path) if path else default


def evaluation_options(command):
    """The options of methods that draw samples on their way."""
    command = click.option(
        "--kid-images",
        default=100,
        show_default=True,
        help="Pictures of each split that KID compares; 0: none.",
    )(command)
    return click.option(
        "--num-inference-steps", default=20, show_default=True, help="Sampling steps of evaluations."
    )(command)


@train.command()
@run_options(output_dir="runs/vae", max_train_steps=3000, train_batch_size=16, learning_rate=1e-3)
@click.option("--vae-config", help="config.json of the autoencoder; the emoji model's by default.")
@click.option(
    "--kl-weight", default=3e-4, show_default=True, help="Weight of the divergence per latent number."
)
def vae(vae_config, kl_weight, **options):
    """Train the autoencoder that turns pictures into latents."""
    settings = _settings(options)
    from keras_sd.training.autoencoder import train_autoencoder

    vae_config = _config(vae_config, config.VAEConfig, config.EMOJI_VAE)
    source, held_out, repeats = _sources(options, vae_config.sample_size, need_captions=False)
    train_autoencoder(settings, vae_config, source, held_out, repeats=repeats, kl_weight=kl_weight)


@train.command()
@run_options(output_dir="runs/clip", max_train_steps=2000, train_batch_size=256, learning_rate=1e-3)
@click.option("--text-config", help="config.json of the text encoder; the emoji model's by default.")
@click.option("--image-config", help="config.json of the image encoder; the emoji model's by default.")
@click.option(
    "--tokenizer", "tokenizer_folder", help="Folder of a tokenizer; learned from the captions by default."
)
@click.option("--frozen-text-encoder", help="Folder of a model whose text encoder and tokenizer are kept.")
def clip(text_config, image_config, tokenizer_folder, frozen_text_encoder, **options):
    """Train CLIP's text and image encoders on captioned pictures."""
    settings = _settings(options)
    from keras_sd.training.contrastive import train_contrastive

    settings.use_precision()
    image_config = _config(image_config, config.ImageEncoderConfig, config.EMOJI_IMAGE_ENCODER)
    source, held_out, repeats = _sources(options, image_config.image_size)
    if frozen_text_encoder:
        from keras_sd.loading import load_clip

        parts = load_clip(frozen_text_encoder)
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
        text_encoder.trainable = False
    else:
        tokenizer, text_encoder = _new_text_encoder(text_config, tokenizer_folder, source)
    train_contrastive(settings, text_encoder, image_config, tokenizer, source, held_out, repeats=repeats)


def _new_text_encoder(config_path, tokenizer_folder, source):
    """A tokenizer, learned from the captions unless its folder is given, and a text encoder for it."""
    import dataclasses

    from keras_sd.models.text_encoder import TextEncoder
    from keras_sd.models.tokenizer import Tokenizer

    text_config = _config(config_path, config.TextEncoderConfig, config.EMOJI_TEXT_ENCODER)
    if tokenizer_folder:
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        captions = [caption for index in range(len(source)) for caption in source[index]["captions"]]
        tokenizer = Tokenizer.train(captions, text_config.vocab_size, text_config.max_position_embeddings)
    # Few captions give fewer tokens than were asked for.
    text_config = dataclasses.replace(
        text_config,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=tokenizer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, TextEncoder(text_config)


@train.command("text-to-image")
@run_options(output_dir="runs/text-to-image", train_batch_size=64, learning_rate=2e-4, ema_decay=0.999)
@click.option("--pretrained-model-name-or-path", default="emoji", show_default=True, help="Preset or folder.")
@click.option("--from-scratch", is_flag=True, help="Begin with a new UNet instead of the pretrained one.")
@click.option("--unet-config", help="config.json of the new UNet; the emoji model's by default.")
@click.option("--pretrained-vae", help="Folder of a `vae` run's model, in place of the pretrained VAE.")
@click.option("--pretrained-clip", help="Folder of a `clip` run's model, in place of the pretrained CLIP.")
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="What the UNet predicts; as it was trained by default.",
)
@click.option("--snr-gamma", type=float, help="Gamma of min-SNR weighting; 5 is usual. Off by default.")
@click.option(
    "--proportion-empty-prompts", default=0.1, show_default=True, help="Captions left out, for guidance."
)
@evaluation_options
@click.option("--validation-prompts", multiple=True, help="A prompt of the sample grid; may be repeated.")
@click.option("--guidance-scale", default=5.0, show_default=True, help="Guidance of the samples.")
def text_to_image(
    snr_gamma,
    proportion_empty_prompts,
    kid_images,
    num_inference_steps,
    validation_prompts,
    guidance_scale,
    **options,
):
    """Train the UNet on captioned pictures: fine-tune a model, or begin one from scratch."""
    settings = _settings(options)
    import numpy as np

    from keras_sd.images import image_grid
    from keras_sd.metrics.features import ClipFeatures
    from keras_sd.training.encodings import EncodedSource
    from keras_sd.training.evaluation import SampleEvaluation
    from keras_sd.training.text_to_image import train_text_to_image

    settings.use_precision()
    pipeline = _open_pipeline(options)
    image_size = pipeline.unet.config.sample_size * pipeline.vae.config.downsampling
    source, held_out, repeats = _sources(options, image_size)
    encoded = EncodedSource(source, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    prompts = validation_prompts or _evenly([example["captions"][0] for example in held_out or source], 16)
    sets = _example_sets(source, held_out, kid_images) if pipeline.image_encoder else {}

    def sample(texts):
        return pipeline.text_to_image(
            texts,
            num_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=settings.seed,
            progress=False,
        )

    def make_evaluation(trainer):
        return SampleEvaluation(
            trainer,
            ClipFeatures(pipeline.image_encoder) if sets else None,
            {name: np.stack([example["image"] for example in examples]) for name, examples in sets.items()},
            lambda name: sample([example["captions"][0] for example in sets[name]]),
            lambda: image_grid(sample(list(prompts)), labels=list(prompts), scale=2),
        )

    train_text_to_image(
        settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        repeats=repeats,
        caption_dropout=proportion_empty_prompts,
        min_snr_gamma=snr_gamma,
        make_evaluation=make_evaluation,
        export=pipeline.save,
    )


@train.command()
@run_options(
    output_dir="runs/ddim", max_train_steps=2000, train_batch_size=64, learning_rate=1e-3, ema_decay=0.999
)
@click.option(
    "--unet-config", help="config.json of the UNet; a small one of attention-free blocks by default."
)
@click.option("--resolution", type=int, help="Side of the pictures; the config's by default.")
@click.option("--snr-gamma", type=float, help="Gamma of min-SNR weighting; 5 is usual. Off by default.")
@click.option(
    "--random-flip/--no-random-flip", default=True, show_default=True, help="Mirror half of the pictures."
)
@click.option(
    "--kid",
    type=click.Choice(["kid_emoji", "kid_inception"]),
    default="kid_emoji",
    help="What KID looks through.",
)
@evaluation_options
def ddim(unet_config, resolution, snr_gamma, random_flip, kid, kid_images, num_inference_steps, **options):
    """Train an unconditional model on pixels, as the Keras DDIM example does."""
    settings = _settings(options)
    import dataclasses

    import numpy as np

    from keras_sd.images import image_grid
    from keras_sd.training.evaluation import SampleEvaluation
    from keras_sd.training.pixel_ddim import sample_pictures, train_pixel_ddim

    unet_config = _config(unet_config, config.UNetConfig, config.PIXEL_UNET)
    if resolution:
        unet_config = dataclasses.replace(unet_config, sample_size=resolution)
    source, held_out, _ = _sources(options, unet_config.sample_size, need_captions=False)
    sets = _example_sets(source, held_out, kid_images)
    extractor = _extractor(kid) if sets else None

    def make_evaluation(trainer, denoiser):
        def sample(count):
            return sample_pictures(denoiser, count, num_steps=num_inference_steps, seed=settings.seed)

        return SampleEvaluation(
            trainer,
            extractor,
            {name: np.stack([example["image"] for example in examples]) for name, examples in sets.items()},
            lambda name: sample(len(sets[name])),
            lambda: image_grid(sample(16), scale=2),
        )

    train_pixel_ddim(
        settings,
        unet_config,
        config.PIXEL_SCHEDULER,
        source,
        min_snr_gamma=snr_gamma,
        flip=random_flip,
        make_evaluation=make_evaluation,
    )


if __name__ == "__main__":
    run_command(train, "python -m keras_sd.train")
