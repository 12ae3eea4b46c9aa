"""The command that shows what a training run would see of a data set."""

import itertools
from pathlib import Path

import click
import numpy as np

from keras_sd.cli.command import Command, in_flags, refuse_unused
from keras_sd.cli.option_types import COUNT
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.train.data_options import print_notes, reading_of, source_options
from keras_sd.data.images import MINIMUM_SIDE
from keras_sd.errors import UserError, require

_CELL = 192  # pixels of the longer side of an image in the grid
_OF_CAPTIONS = ("max_token_length", "caption_column", "caption_extension", "caption_lines")
_BAR_HEIGHT, _BAR_WIDTH = 16, 400


@click.command("dataset", cls=Command)
@click.argument("data")
@output_option("dataset.png")
@click.option("--split", default="train", help="`train` or `validation`.")
@click.option(
    "--resolution", default=512, type=click.IntRange(8), help="Side of the training images in pixels."
)
@click.option(
    "--aspect-ratio-buckets", default=1, type=COUNT, help="At most N ratios of equal area; 1: squares."
)
@click.option(
    "--bucket-upscale/--bucket-no-upscale",
    default=False,
    help="Enlarge images that are smaller than their bucket. By default a run is refused.",
)
@click.option("--captions/--no-captions", default=True, help="Read captions.")
@source_options()
@click.option(
    "--max-token-length",
    default="75",
    type=click.Choice(["75", "150", "225"]),
    help="Tokens of CLIP's tokenizer beyond which captions count as cut.",
)
@click.option("--clip", help="open_clip MODEL/WEIGHTS, or a folder, to find similar images. Off by default.")
@click.option(
    "--similarity",
    default=0.95,
    type=click.FloatRange(-1, 1),
    help="Smallest cosine similarity of images that count as similar.",
)
@click.option("--images", "shown", default=24, type=click.IntRange(1, 400), help="Images in the grid.")
def dataset(data, output, overwrite, split, resolution, clip, similarity, shown, captions, **options):
    """Print and draw what a run on DATA would see: a folder, a data set's name, or a .toml of several."""
    from keras_sd.data.framing import FramedSource, Framing, framed_source
    from keras_sd.data.survey import name_of, similar_pairs, survey
    from keras_sd.files.image_files import save_png

    refuse_unused(
        ["max_token_length", "caption_column", "caption_extension", "caption_lines"],
        captions,
        "with --no-captions",
    )
    refuse_unused(["similarity"], clip, "without --clip")
    output = check_output(output, ".png", default="dataset.png", overwrite=overwrite)
    if clip:
        require("open_clip", "torch", instead="leave out --clip")
    source = _open(data, split, captions, options)
    print_notes(source, options)
    buckets = {name: options[name] for name in ("aspect_ratio_buckets", "bucket_upscale")}
    framing = Framing(resolution, **buckets)
    try:
        framed = framed_source(source, framing, on_bad_sample=options["on_bad_sample"])
    except UserError as error:  # a run would stop here; the figures tell more
        click.echo(f"a run would be refused: {in_flags(str(error))}")
        framed = FramedSource(source, Framing(resolution, **buckets | {"bucket_upscale": True}))
    tokens, room = _tokens(framed.captions(), int(options["max_token_length"]))
    found = survey(data, framed, tokens, room)
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
    save_png(_sheet(found, framed, shown), path)
    click.echo(path)


def _open(data, split, captions, options):
    from keras_sd.data.sources import load_config, load_source

    reading = reading_of(options)
    if data.endswith(".toml"):
        names = ("split", "caption_extension", "caption_lines", "image_column", "caption_column")
        refuse_unused((*names, "dataset_config_name", "captions"), False, f"with {data}, whose file says it")
        return load_config(Path(data), MINIMUM_SIDE, reading["on_bad_sample"])
    return load_source(data, split, MINIMUM_SIDE, captions, **reading)


def _tokens(captions, length):
    """Return the tokens of each distinct caption, by CLIP's tokenizer, and the most that are not cut."""
    from keras_sd.models.tokenizer import Tokenizer

    texts = sorted({caption for of_image in captions for caption in of_image})
    return [len(ids) for ids in Tokenizer.clip().encode(texts)] if texts else [], length


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


def _sheet(found, framed, shown):
    """Return one image: bars of ratios and of tokens, and below them crops with their captions."""
    from keras_sd.data.sources import evenly
    from keras_sd.files.image_files import image_grid

    bars = [_bars("width / height", found.ratio_counts())]
    if len(found.tokens):
        edges = (0, 10, 20, 40, 76, 151, 226)
        classes = np.bincount(np.digitize(found.tokens, edges) - 1, minlength=len(edges))
        names = [f"{low} to {next_one - 1} tokens" for low, next_one in itertools.pairwise(edges)]
        names.append(f"from {edges[-1]} tokens")
        bars.append(_bars("captions", dict(zip(names, classes.tolist(), strict=True))))
    indices = evenly(range(len(framed)), shown)
    examples = [framed[index] for index in indices]
    labels = [example["captions"][0] if example["captions"] else "" for example in examples]
    grid = image_grid([_cell(example["image"]) for example in examples], labels)
    return _stacked([*bars, grid])


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
