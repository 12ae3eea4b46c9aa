"""The command that fills a folder with the encodings of a data set, for `--cache-latents disk`."""

import sys
from pathlib import Path

import click

from keras_sd import interruption, presets
from keras_sd.cli.command import Command, decorated, refuse_unused
from keras_sd.cli.option_types import COUNT
from keras_sd.cli.train.caching import dtype_option
from keras_sd.cli.train.data_options import (
    max_token_length_option,
    print_notes,
    reading_of,
    source_options,
)
from keras_sd.cli.train.fine_tuning import pretrained_option
from keras_sd.cli.train.framing import check_framing, check_sides, framed, framing_of, framing_options
from keras_sd.cli.train.options import mixed_precision_option
from keras_sd.errors import UserError, require

_OF_CAPTIONS = ("caption_column", "caption_extension", "caption_lines", "max_token_length")


@click.command(cls=Command)
@click.argument("dataset")
@click.argument("folder", type=click.Path(file_okay=False))
@pretrained_option
@source_options()
@max_token_length_option
@click.option(
    "--images-only",
    is_flag=True,
    help="Encode no captions, as for textual inversion, DreamBooth and a text encoder that is trained.",
)
@decorated(*(option for _, option in framing_options(flips=False)))
@dtype_option
@mixed_precision_option
@click.option(
    "--batch-size",
    default=4,
    type=COUNT,
    help="Images per batch. Training encodes 4, and another number may round differently.",
)
@click.option(
    "--train-batch-size",
    default=1,
    type=COUNT,
    help="Images in a batch of the training: buckets with fewer images are merged.",
)
@click.option("--jit-compile/--no-jit-compile", default=True, help="Compile with XLA.")
def encode(dataset, folder, **options):
    """Encode the images and captions of DATASET once, into FOLDER.

    DATASET is a folder of images or the name of a data set, as for training. A run with the same model, size,
    crops and precision and with --cache-latents disk --cache-dir FOLDER then encodes nothing. A run that was
    interrupted goes on where it was.
    """
    refuse_unused(_OF_CAPTIONS, not options["images_only"], "with --images-only")
    check_framing("encode", options)
    if not options["center_crop"]:
        raise UserError("--no-center-crop: another crop at each draw cannot be kept; leave it out")
    require("array_record", "grain")
    interruption.set_kept(f"the shards in {folder} stay")
    from keras_sd.data.encoding_store import EncodingStore
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.data.sources import load_source

    place = Path(dataset) if Path(dataset).is_dir() else dataset
    source = load_source(place, "train", MINIMUM_SIDE, not options["images_only"], **reading_of(options))
    print_notes(source, options)
    model = presets.find(options["pretrained_model_name_or_path"])
    store = EncodingStore(folder)
    stored = _fill(store, source, model, options)
    print(f"{stored.encoded} images encoded, {len(stored)} are in {folder}", file=sys.stderr, flush=True)


def _fill(store, source, model, options):
    """Encode what the store lacks of a source."""
    import keras

    from keras_sd import backend
    from keras_sd.pipeline.stable_diffusion import StableDiffusion
    from keras_sd.training.caption_tokenizer import CaptionTokenizer
    from keras_sd.training.encoder import CaptionIndex, Encoder
    from keras_sd.training.settings import PRECISIONS
    from keras_sd.training.stored_encodings import StoredSource

    precision = options["mixed_precision"]
    if precision == "auto":
        precision = "bf16" if backend.multiplies_bfloat16() else "no"
    keras.config.set_dtype_policy(PRECISIONS[precision])
    with interruption.phase(f"opening {options['pretrained_model_name_or_path']}"):
        pipeline = StableDiffusion.load(model, dtype=PRECISIONS[precision])
    factor = pipeline.vae.config.downsampling
    framing = framing_of(options, pipeline.unet.config.sample_size * factor)
    check_sides(framing, factor)
    framed_source = framed(source, framing, options["train_batch_size"], options["on_bad_sample"])
    tokenizer = CaptionTokenizer(pipeline.tokenizer, int(options["max_token_length"]))
    text_encoder = None if options["images_only"] else pipeline.text_encoder
    captions = CaptionIndex(framed_source.captions(), tokenizer)
    if text_encoder is not None and tokenizer.cut_line():
        print(tokenizer.cut_line(), file=sys.stderr, flush=True)
    encoder = Encoder(pipeline.vae, text_encoder, tokenizer, options["batch_size"], options["jit_compile"])
    return StoredSource(framed_source, encoder, captions, store, options["cache_dtype"])
