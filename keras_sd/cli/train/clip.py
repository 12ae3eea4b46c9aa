"""The command that trains CLIP: a text encoder and an image encoder."""

import click

from keras_sd import config
from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.train.data_options import dataset_config_option, source_options
from keras_sd.cli.train.opening import defaults_from, find_part, read_config
from keras_sd.cli.train.options import FILE, FILE_OR_FOLDER, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.data.emoji import architecture


@click.command(cls=Command)
@run_options("clip", output_dir="runs/clip")
@source_options()
@dataset_config_option
@click.option(
    "--text-config", type=FILE, help="config.json of the text encoder; by default the emoji model's."
)
@click.option(
    "--image-config", type=FILE, help="config.json of the image encoder; by default the emoji model's."
)
@click.option(
    "--tokenizer",
    "tokenizer_folder",
    type=FILE_OR_FOLDER,
    help="Folder of a tokenizer. By default a new one is trained on the captions.",
)
@click.option(
    "--frozen-text-encoder",
    help="Model whose text encoder and tokenizer are used and not trained: preset, hub id, folder or file.",
)
def clip(text_config, image_config, tokenizer_folder, frozen_text_encoder, **options):
    """Train CLIP's text and image encoders on captioned images.

    \b
    python -m keras_sd.train clip --train-data-dir images
    """
    refuse_unused(["text_config", "tokenizer_folder"], not frozen_text_encoder, "with --frozen-text-encoder")
    place = frozen_text_encoder and find_part(frozen_text_encoder, "text_encoder")
    run = prepare("clip", options, defaults_from=defaults_from(text_config or image_config))
    from keras_sd.training.contrastive import train_contrastive

    image_config = read_config(image_config, config.ImageEncoderConfig, architecture.EMOJI_IMAGE_ENCODER)
    source, held_out, repeats = run.sources(image_config.image_size)
    if place:
        from keras_sd.weights.loading import load_clip

        parts = load_clip(place)
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
        text_encoder.trainable = False
    else:
        tokenizer, text_encoder = new_text_encoder(text_config, tokenizer_folder, source)
    train_contrastive(run.settings, text_encoder, image_config, tokenizer, source, held_out, repeats=repeats)


def new_text_encoder(config_path, tokenizer_folder, source):
    """Return a tokenizer, trained on the captions unless its folder is given, and a text encoder for it."""
    import dataclasses

    from keras_sd.models.text_encoder import TextEncoder
    from keras_sd.models.tokenizer import Tokenizer

    text_config = read_config(config_path, config.TextEncoderConfig, architecture.EMOJI_TEXT_ENCODER)
    if tokenizer_folder:
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        captions = [caption for of_image in source.captions() for caption in of_image]
        tokenizer = Tokenizer.train(captions, text_config.vocab_size, text_config.max_position_embeddings)
    # Few captions give fewer tokens than the config has.
    text_config = dataclasses.replace(
        text_config,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=tokenizer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, TextEncoder(text_config)
