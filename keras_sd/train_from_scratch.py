"""The commands that train a part of a model from the beginning."""

import click

from keras_sd import config, presets
from keras_sd.errors import UserError
from keras_sd.option_types import NOT_NEGATIVE
from keras_sd.train_options import (
    COUNT,
    FILE,
    FILE_OR_FOLDER,
    evaluation_options,
    evenly,
    example_sets,
    extractor_of,
    inference_steps_option,
    prepare,
    read_config,
    refuse_unused,
    run_options,
    snr_gamma_option,
)


def _defaults_from(config_path):
    """The model whose values a small built-in network is trained with; None for one of a user's config."""
    return None if config_path else presets.find("emoji")


@click.command()
@run_options("vae", output_dir="runs/vae")
@click.option("--vae-config", type=FILE, help="config.json of the autoencoder; the emoji model's by default.")
@click.option(
    "--kl-weight",
    default=3e-4,
    show_default=True,
    type=NOT_NEGATIVE,
    help="Weight of the divergence per latent number.",
)
@click.option("--random-crop", type=COUNT, help="Side of the squares trained on; whole images by default.")
@click.option("--pretrained-vae", type=FILE_OR_FOLDER, help="Folder of an autoencoder to go on with.")
@click.option("--decoder-only", is_flag=True, help="Keep its latents as they are; only decode them better.")
def vae(vae_config, kl_weight, random_crop, pretrained_vae, decoder_only, **options):
    """Train the autoencoder that encodes images to latents."""
    if decoder_only and not pretrained_vae:
        raise UserError("--decoder-only: there are no latents yet; name an autoencoder with --pretrained-vae")
    refuse_unused(["vae_config"], not pretrained_vae, "with --pretrained-vae")
    refuse_unused(["kl_weight"], not decoder_only, "with --decoder-only")
    run = prepare(
        "vae",
        options,
        variant=None if pretrained_vae else "from scratch",
        defaults_from=pretrained_vae or _defaults_from(vae_config),
        need_captions=False,
    )
    from keras_sd.loading import load_part
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.autoencoder import train_autoencoder
    from keras_sd.training.trainer import PRECISIONS

    if pretrained_vae:
        autoencoder = load_part(pretrained_vae, "vae", PRECISIONS[run.settings.mixed_precision])
    else:
        autoencoder = AutoencoderKL(read_config(vae_config, config.VAEConfig, config.EMOJI_VAE))
    source, held_out, repeats = run.sources(autoencoder.config.sample_size)
    train_autoencoder(
        run.settings,
        autoencoder,
        source,
        held_out,
        repeats=repeats,
        kl_weight=kl_weight,
        random_crop=random_crop,
        decoder_only=decoder_only,
    )


@click.command()
@run_options("clip", output_dir="runs/clip")
@click.option(
    "--text-config", type=FILE, help="config.json of the text encoder; the emoji model's by default."
)
@click.option(
    "--image-config", type=FILE, help="config.json of the image encoder; the emoji model's by default."
)
@click.option(
    "--tokenizer",
    "tokenizer_folder",
    type=FILE_OR_FOLDER,
    help="Folder of a tokenizer; learned from the captions by default.",
)
@click.option(
    "--frozen-text-encoder",
    type=FILE_OR_FOLDER,
    help="Folder of a model whose text encoder and tokenizer are kept.",
)
def clip(text_config, image_config, tokenizer_folder, frozen_text_encoder, **options):
    """Train CLIP's text and image encoders on captioned images."""
    refuse_unused(["text_config", "tokenizer_folder"], not frozen_text_encoder, "with --frozen-text-encoder")
    run = prepare("clip", options, defaults_from=_defaults_from(text_config or image_config))
    from keras_sd.training.contrastive import train_contrastive

    image_config = read_config(image_config, config.ImageEncoderConfig, config.EMOJI_IMAGE_ENCODER)
    source, held_out, repeats = run.sources(image_config.image_size)
    if frozen_text_encoder:
        from keras_sd.loading import load_clip

        parts = load_clip(frozen_text_encoder)
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
        text_encoder.trainable = False
    else:
        tokenizer, text_encoder = new_text_encoder(text_config, tokenizer_folder, source)
    train_contrastive(run.settings, text_encoder, image_config, tokenizer, source, held_out, repeats=repeats)


def new_text_encoder(config_path, tokenizer_folder, source):
    """A tokenizer, learned from the captions unless its folder is given, and a text encoder for it."""
    import dataclasses

    from keras_sd.models.text_encoder import TextEncoder
    from keras_sd.models.tokenizer import Tokenizer

    text_config = read_config(config_path, config.TextEncoderConfig, config.EMOJI_TEXT_ENCODER)
    if tokenizer_folder:
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        captions = [caption for of_image in source.captions() for caption in of_image]
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


@click.command()
@run_options("ddim", output_dir="runs/ddim")
@click.option(
    "--unet-config",
    type=FILE,
    help="config.json of the UNet; a small one of attention-free blocks by default.",
)
@click.option("--resolution", type=COUNT, help="Side of the images; the config's by default.")
@snr_gamma_option
@click.option(
    "--random-flip/--no-random-flip", default=True, show_default=True, help="Mirror half of the images."
)
@click.option(
    "--kid",
    type=click.Choice(["kid_emoji", "kid_inception"]),
    default="kid_emoji",
    show_default=True,
    help="What KID looks through.",
)
@evaluation_options()
def ddim(unet_config, resolution, snr_gamma, random_flip, kid, kid_images, num_inference_steps, **options):
    """Train an unconditional model on pixels, as the Keras DDIM example does."""
    refuse_unused(["kid"], kid_images, "with --kid-images 0")
    run = prepare(
        "ddim",
        options | {"num_inference_steps": num_inference_steps},
        defaults_from=_defaults_from(unet_config),
        need_captions=False,
        scheduler_config=config.PIXEL_SCHEDULER,
    )
    import dataclasses

    from keras_sd.images import image_grid
    from keras_sd.training.evaluation import SampleEvaluation
    from keras_sd.training.pixel_ddim import sample_pictures, train_pixel_ddim

    unet_config = read_config(unet_config, config.UNetConfig, config.PIXEL_UNET)
    if resolution:
        unet_config = dataclasses.replace(unet_config, sample_size=resolution)
    source, held_out, _ = run.sources(unet_config.sample_size)

    def make_evaluation(trainer, denoiser):
        sets = example_sets(source, held_out, kid_images)

        def sample(count):
            return sample_pictures(denoiser, count, num_steps=num_inference_steps, seed=run.settings.seed)

        return SampleEvaluation(
            trainer,
            lambda: image_grid(sample(16), scale=2),
            sets=sets,
            generate=lambda examples: sample(len(examples)),
            extractor=extractor_of(kid, run.settings.jit_compile) if sets else None,
        )

    train_pixel_ddim(
        run.settings,
        unet_config,
        config.PIXEL_SCHEDULER,
        source,
        min_snr_gamma=snr_gamma,
        flip=random_flip,
        make_evaluation=make_evaluation,
    )


@click.command("super-resolution")
@run_options("super-resolution", output_dir="runs/super-resolution")
@click.option("--unet-config", type=FILE, help="config.json of the UNet; a small one by default.")
@click.option("--factor", default=2, show_default=True, type=click.IntRange(2), help="How much larger.")
@click.option(
    "--random-crop", default=48, show_default=True, type=COUNT, help="Side of the squares trained on."
)
@snr_gamma_option
@inference_steps_option(10)
@click.option(
    "--validation-images",
    default=32,
    show_default=True,
    type=COUNT,
    help="Held-out images made small and large again.",
)
def super_resolution(
    unet_config, factor, random_crop, snr_gamma, num_inference_steps, validation_images, **options
):
    """Train a diffusion upscaler on images that are made small."""
    run = prepare(
        "super-resolution",
        options | {"num_inference_steps": num_inference_steps},
        defaults_from=_defaults_from(unet_config),
        need_captions=False,
        scheduler_config=config.UPSCALER_SCHEDULER,
    )
    import numpy as np

    from keras_sd.images import image_grid
    from keras_sd.models.unet import UNet
    from keras_sd.training.super_resolution import measure_upscaling, train_super_resolution
    from keras_sd.upscaler import Upscaler

    unet_config = read_config(unet_config, config.UNetConfig, config.UPSCALER_UNET)
    upscaler = Upscaler(
        UNet(unet_config),
        config.UPSCALER_SCHEDULER,
        config.LOW_RES_SCHEDULER,
        jit_compile=run.settings.jit_compile,
    )
    source, held_out, repeats = run.sources(unet_config.sample_size)

    def make_evaluation(trainer):
        shown = np.stack([example["image"] for example in evenly(held_out or source, validation_images)])

        def evaluate(step):
            with trainer.ema.applied():
                pictures, figures = measure_upscaling(
                    upscaler, shown, factor=factor, num_steps=num_inference_steps
                )
            trainer.log.log_scalars(step, figures)
            trainer.log.log_image(step, "samples", image_grid(np.concatenate([pictures, shown]), columns=8))

        return evaluate

    train_super_resolution(
        run.settings,
        upscaler,
        source,
        factor=factor,
        crop=random_crop,
        repeats=repeats,
        min_snr_gamma=snr_gamma,
        make_evaluation=make_evaluation,
    )
