"""The command that shows what a training run would see of a data set."""

import dataclasses
import itertools

import click
import numpy as np

from keras_sd import presets
from keras_sd.cli.command import Command, decorated, in_flags, refuse_unused
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.train.data_options import (
    apply_config,
    caption_rules,
    captions_of,
    configured_source,
    drawing_options,
    print_notes,
    reading_of,
    source_options,
)
from keras_sd.cli.train.fine_tuning import pretrained_option
from keras_sd.cli.train.framing import (
    check_framing,
    check_sides,
    framing_of,
    framing_options,
    train_batch_size_of,
    train_batch_size_option,
)
from keras_sd.cli.train.masks import mask_options
from keras_sd.cli.train.options import max_train_samples_option, seed_option
from keras_sd.data.images import MINIMUM_SIDE
from keras_sd.errors import UserError, require

_CELL = 192  # pixels of the longer side of an image in the grid
_OF_CAPTIONS = (
    *("max_token_length", "caption_column", "caption_extension", "caption_lines", "shuffle_caption"),
    *("keep_tokens", "caption_separator", "caption_tag_dropout_rate"),
)
_BAR_HEIGHT, _BAR_WIDTH = 16, 400


@click.command("dataset", cls=Command)
@click.argument("data")
@output_option("dataset.png")
@click.option("--split", default="train", help="`train` or `validation`.")
@pretrained_option
@train_batch_size_option
@decorated(*(option for _, option in framing_options(flips=False)))
@click.option("--captions/--no-captions", default=True, help="Read captions.")
@source_options()
@mask_options
@max_train_samples_option
@seed_option
@drawing_options
@click.option("--clip", help="open_clip MODEL/WEIGHTS, or a folder, to find similar images. Off by default.")
@click.option(
    "--similarity",
    default=0.95,
    type=click.FloatRange(-1, 1),
    help="Smallest cosine similarity of images that count as similar.",
)
@click.option("--images", "shown", default=24, type=click.IntRange(1, 400), help="Images in the grid.")
def dataset(data, output, overwrite, split, clip, similarity, shown, captions, **options):
    """Print and draw what a run on DATA would see: a folder, a data set's name, or a .toml of several.

    With the options of that run. Of the model only the configs and the tokenizer are read.

    \b
    keras-sd dataset images --resolution 512 --aspect-ratio-buckets 9
    """
    from keras_sd.data.framing import FramedSource, framed_source
    from keras_sd.data.survey import name_of, similar_pairs, survey
    from keras_sd.files.image_files import save_png

    refuse_unused(_OF_CAPTIONS, captions, "with --no-captions")
    refuse_unused(["similarity"], clip, "without --clip")
    output = check_output(output, ".png", default="dataset.png", overwrite=overwrite)
    if clip:
        require("open_clip", "torch", instead="leave out --clip")
    if data.endswith(".toml"):
        options["dataset_config"] = data
        refuse_unused(("split", "captions"), False, f"with {data}, whose file says it")
    apply_config(options)
    captions_of(options)
    refuse_unused({"seed"}, options["max_train_samples"] is not None, "without --max-train-samples")
    check_framing("dataset", options)
    name = options["pretrained_model_name_or_path"]
    model = presets.find(name, weights=False)
    own_size, factor, tokenizer = _facts(name, model)
    source = _open(data, split, captions, options)
    print_notes(source, options)
    framing = framing_of(options, own_size)
    check_sides(framing, factor)
    batch_size = train_batch_size_of(options, model)
    try:
        framed = framed_source(source, framing, batch_size, options["on_bad_sample"])
    except UserError as error:  # a run would stop here; the figures tell more
        click.echo(f"a run would be refused: {in_flags(str(error))}")
        framed = FramedSource(source, dataclasses.replace(framing, bucket_upscale=True), batch_size)
    tokens, cut, room = _tokens(framed.captions(), tokenizer, int(options["max_token_length"]))
    found = survey(data, framed, tokens, cut, room)
    if clip:
        vectors = _vectors(framed, clip)
        found.similar = [
            (name_of(framed, one), name_of(framed, other), value)
            for one, other, value in similar_pairs(vectors, similarity)
        ]
    found.buckets = [in_flags(line) for line in found.buckets]
    for line in found.lines():
        click.echo(line)
    path = output.free()
    rules = caption_rules(options, framed.source) if captions else None
    save_png(_sheet(found, framed, shown, rules), path)
    if shown < len(framed):
        click.echo(f"drawn: {shown} of {len(framed)} images; --images gives their number")
    click.echo(path)


def _open(data, split, captions, options):
    from keras_sd.data.sources import load_source

    if options.get("dataset_config"):
        return configured_source(options, need_captions=True, is_reg="any")
    return load_source(data, split, MINIMUM_SIDE, captions, **reading_of(options))


def _facts(name, model):
    """Return the side of a model's images in pixels, the factor of its VAE, and its tokenizer."""
    from keras_sd.config import UNetConfig, VAEConfig
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.weights.readers import read_configs

    checkpoint = read_configs(model)
    if not {"unet", "vae"} <= checkpoint.parts.keys():
        raise UserError(f"{name}: not a whole model; give one that can be trained")
    factor = VAEConfig.from_dict(checkpoint.parts["vae"].config).downsampling
    side = UNetConfig.from_dict(checkpoint.parts["unet"].config).sample_size * factor
    folder = checkpoint.tokenizer
    return side, factor, Tokenizer.clip() if folder is None else Tokenizer.load(folder)


def _tokens(captions, tokenizer, length):
    """Return the tokens of each distinct caption, how many captions are cut, and the most tokens of one."""
    from keras_sd.training.caption_tokenizer import CaptionTokenizer

    texts = sorted({caption for of_image in captions for caption in of_image})
    chunks = CaptionTokenizer(tokenizer, length)
    if texts:
        chunks(texts)
    counts = [len(ids) for ids in tokenizer.encode(texts)] if texts else []
    return counts, chunks.cut, chunks.chunks * chunks.room


def _vectors(framed, name):
    """Return CLIP's unit vectors of all images, float32 (n, d)."""
    from PIL import Image
    from tqdm import tqdm

    from keras_sd.captions.ranking import Clip

    model, vectors = Clip(name), []
    for start in tqdm(range(0, len(framed), 16), desc="embedding images", unit="batch"):
        indices = range(start, min(start + 16, len(framed)))
        vectors.append(model.encode_images([Image.fromarray(framed[index]["image"]) for index in indices]))
    return np.concatenate(vectors)


def _sheet(found, framed, shown, rules):
    """Return one image: bars of ratios and of tokens, and below them crops with their captions."""
    from keras_sd.data.sources import evenly
    from keras_sd.files.image_files import image_grid

    bars = [_bars("width / height", found.ratio_counts())]
    if len(found.tokens):
        edges = (0, 10, 20, 40, 76, 151, 226)
        classes = np.bincount(np.digitize(found.tokens, edges) - 1, minlength=len(edges))
        names = [f"{low} to {next_one - 1} tokens" for low, next_one in itertools.pairwise(edges)]
        names.append(f"from {edges[-1]} tokens")
        bars.append(_bars("different captions", dict(zip(names, classes.tolist(), strict=True))))
    indices = evenly(range(len(framed)), shown)
    generator = np.random.default_rng(0)
    examples = [framed.draw_example(index, generator) for index in indices]
    labels = [example["captions"][0] if example["captions"] else "" for example in examples]
    if rules is not None:
        of_each = rules if isinstance(rules, list) else [rules] * len(framed)
        pairs = zip(indices, examples, strict=True)
        labels = [of_each[index].draw(example["captions"], generator) for index, example in pairs]
    grid = image_grid([_cell(_weighted(example)) for example in examples], labels)
    return _stacked([*bars, grid])


def _weighted(example):
    """Return the image of an example as far as its mask lets a model learn from it; the rest is red."""
    if "mask" not in example:
        return example["image"]
    weight = example["mask"][..., None] / 255
    return np.uint8(np.round(example["image"] * weight + np.array([200, 0, 0]) * (1 - weight)))


def _cell(image):
    """Return an image on a white square, in half or another whole part of its size."""
    from PIL import Image

    scale = _CELL / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    cell = Image.new("RGB", (_CELL, _CELL), "white")
    cell.paste(Image.fromarray(image).resize(size), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return np.asarray(cell)


def _bars(title, counts):
    """Return a bar chart of counts by name, uint8 (h, w, 3)."""
    from PIL import Image, ImageDraw

    most, width = max([1, *counts.values()]), 2 * _BAR_WIDTH
    chart = Image.new("RGB", (width, _BAR_HEIGHT * (len(counts) + 2)), "white")
    draw = ImageDraw.Draw(chart)
    draw.text((4, 2), title, fill="black")
    for row, (name, count) in enumerate(counts.items(), start=1):
        top, left = row * _BAR_HEIGHT, width // 4
        draw.text((4, top + 2), name, fill="black")
        right = left + round((width // 2) * count / most)
        draw.rectangle((left, top + 3, right, top + _BAR_HEIGHT - 3), fill=(70, 110, 180))
        draw.text((right + 6, top + 2), str(count), fill="black")
    return np.asarray(chart)


def _stacked(images):
    """Return images one below the other, on white."""
    width = max(image.shape[1] for image in images)
    padded = [
        np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255) for image in images
    ]
    return np.concatenate(padded)
