"""Measures how fast photographs are decoded and resized, against a plain loop of Pillow's functions.

`python tools/bench_images.py` writes JPEGs of 12 megapixels into a temporary folder. The plain loop opens
each, rotates it by EXIF, converts it to RGB and fits it into a square, on one thread. A training run reads
the same squares in the threads of Grain. It prints a line of JSON.
"""

import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from keras_sd.data.folders import FolderSource
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import batches

_HEIGHT, _WIDTH = 3000, 4000


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEGs of 12 megapixels with the detail of photographs."""
    for index in range(count):
        generator = np.random.default_rng(index)
        coarse = Image.fromarray(generator.integers(0, 256, (75, 100, 3), dtype="uint8"))
        image = coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
        noise = Image.fromarray(generator.integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype="uint8"))
        image = Image.blend(image, noise.filter(ImageFilter.BoxBlur(1)), 0.15)
        image.save(folder / f"{index:03}.jpg", quality=92)


def read_plainly(paths: list[Path], side: int) -> list[np.ndarray]:
    """Return the images as squares, each read by Pillow's usual functions."""
    read = []
    for path in paths:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            read.append(np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS)))
    return read


def read_framed(source: FramedSource, batch_size: int) -> list[np.ndarray]:
    """Return the images of one epoch in the source's order, as a training run reads them."""
    stream = batches(
        source,
        batch_size=batch_size,
        seed=0,
        draw=lambda example, generator: {"image": example["image"]},
        shuffle=False,
    )
    found = itertools.islice(stream, len(source) // batch_size)
    return [image for batch in found for image in batch["image"]]


@click.command()
@click.option("--images", default=24, help="Number of photographs.")
@click.option("--resolution", default=512, help="Side of the squares in pixels.")
@click.option("--rounds", default=3, help="Rounds; the fastest counts.")
def main(images, resolution, rounds):
    """Measure how fast photographs are decoded and resized."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, images)
        paths = sorted(folder.glob("*.jpg"))
        source = FramedSource(FolderSource(folder, 16, need_captions=False), Framing(resolution))
        plain, framed, difference = [], [], 0.0
        for _ in range(rounds):
            start = time.perf_counter()
            expected = read_plainly(paths, resolution)
            middle = time.perf_counter()
            found = read_framed(source, 4)
            plain.append(middle - start)
            framed.append(time.perf_counter() - middle)
            pairs = zip(found, expected, strict=False)
            difference = max(float(np.abs(one - other.astype(float)).mean()) for one, other in pairs)
    figures = {
        "images": images,
        "cores": os.cpu_count(),
        "plain_images_per_second": round(images / min(plain), 2),
        "framed_images_per_second": round(images / min(framed), 2),
        "ratio": round(min(plain) / min(framed), 2),
        "largest_mean_difference": round(difference, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
