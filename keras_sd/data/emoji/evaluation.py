"""Evaluates the bundled `emoji` model: figures as a flat dictionary and as a Markdown table.

Prompt fidelity is measured by the nearest real image in pixels, for prompts seen in training and for held-out
combinations of a known concept with a skin tone and a gender. Image quality is measured by KID over the
bundled CLIP image tower, between images generated from the held-out prompts and the held-out images, and
sharpness by the edge energy of the reconstructed and of the generated images, against the real ones.
"""

import hashlib
import math
import statistics
import time
from typing import NamedTuple

import keras
import numpy as np

from keras_sd import interruption
from keras_sd.data.emoji.retrieval import first_of_identical, nearest, top1
from keras_sd.data.emoji.source import load_emoji
from keras_sd.diffusion.samplers import find_sampler
from keras_sd.errors import UserError
from keras_sd.metrics.features import ClipFeatures, extract
from keras_sd.metrics.fid import frechet_inception_distance
from keras_sd.metrics.kid import paired_kernel_inception_distance
from keras_sd.metrics.reconstruction import edge_energy_ratio, reconstruction_figures
from keras_sd.models.batches import equal_batches

IMAGE_SIZE = 64
TRAINING_PROMPTS = 200
FLOOR_DRAWS = 20


class Measure(NamedTuple):
    """A row of the table.

    Attributes:
        key, title, form: of the figure, and how it is written.
        bar, hoped: the value that is required, and the one hoped for; None for both if it is only reported.
        ideal: the best value; a target is met by what is as close to it.
    """

    key: str
    title: str
    form: str
    bar: float | None = None
    hoped: float | None = None
    ideal: float = math.inf

    def reaches(self, figure, target):
        """Return whether a figure is at the target, or on the ideal's side of it."""
        if math.isinf(self.ideal):
            return figure >= target if self.ideal > 0 else figure <= target
        return abs(figure - self.ideal) <= abs(target - self.ideal)


MEASURES = (
    Measure("reconstruction_psnr", "VAE reconstruction PSNR, held-out images", "{:.2f} dB", 29.0, 31.0),
    Measure("reconstruction_ssim", "VAE reconstruction SSIM, held-out images", "{:.3f}", 0.85, 0.9),
    Measure(
        "reconstruction_edge_energy",
        "VAE reconstruction: edge energy kept, held-out images",
        "{:.1%}",
        0.9,
        0.97,
        ideal=1.0,
    ),
    Measure("training_top1", "training prompts: nearest base concept is the right one", "{:.1%}", 0.9, 0.97),
    Measure(
        "training_edge_energy",
        "training prompts: edge energy of generated images over the real ones'",
        "{:.1%}",
        0.85,
        0.95,
        ideal=1.0,
    ),
    Measure("held_out_concept", "held-out combinations: right base concept", "{:.1%}", 0.9, 0.95),
    Measure("held_out_variant", "held-out combinations: right variant", "{:.1%}", 0.6, 0.75),
    Measure("kid", "KID of generated against held-out images (kid_emoji)", "{:.5f}"),
    Measure("fid", "FID of generated against held-out images (fid_emoji)", "{:.4f}"),
    Measure("kid_floor", "KID of real variants against held-out images: the floor", "{:.5f}"),
    Measure("kid_ratio", "KID of generated images over the floor", "{:.2f}x", 1.3, 1.0, ideal=-math.inf),
    Measure(
        "generation_seconds",
        "generation of 4 images after the first call",
        "{:.2f} s",
        2.0,
        1.0,
        ideal=-math.inf,
    ),
)


def evaluate_emoji(
    pipeline,
    *,
    num_inference_steps=None,
    guidance_scale=None,
    guidance_rescale=None,
    guidance_interval=(0.0, 1.0),
    reuse_interval=1,
    sampler=None,
    seed=0,
    batch_size=40,
    progress=None,
):
    """Measure an `emoji` pipeline and return a flat dictionary of figures, ready for JSON.

    Args:
        pipeline: a `keras_sd.StableDiffusion` with an image encoder.
        num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, reuse_interval, sampler: as
            in `text_to_image`; by default the model's own.
        seed: image i is drawn from `seed` + i.
        batch_size: the largest number of prompts per call; all calls are of one size, so that sampling is
            compiled once.
        progress: callable (iterable, description) -> iterable, such as a progress bar.

    Returns:
        `reconstruction_psnr` in dB, `reconstruction_ssim`, `reconstruction_edge_energy` (the share that is
        kept): VAE (mode of the posterior) on the held-out images.
        `training_top1`: share of 200 canonical captions of base concepts, chosen by hash, whose generated
        image is nearest to the right one among the images of all base concepts.
        `training_edge_energy`: mean edge energy of these generated images over that of the real images of
        the same captions.
        `held_out_concept`, `held_out_variant`: share of the held-out captions whose generated image is
        nearest, among all images of the set, to an image of the right concept, or to the right image.
        `kid`, `kid_standard_deviation`: images of the held-out captions against the held-out images.
        `fid`: of the same images; biased, so it compares with others of as many images only.
        `kid_floor`: root mean square, over 20 draws by hash, of the KID of equally many real training
        variants against the held-out images. The estimator is unbiased, so the mean of these draws,
        `kid_floor_mean`, is about zero with either sign and cannot serve as a floor itself.
        `kid_ratio`: `kid` / `kid_floor`.
        `kid_training`: KID of real training images of all kinds, mean over the draws.
        `generation_seconds`: 4 images of one prompt, median of 5 calls after a first one.
        `targets`: key of a figure -> its "bar" and the value "hoped" for, or None (`MEASURES`).
        The remaining entries are the settings and the numbers of images. The sampler has its displayed name.

    Raises:
        UserError: the pipeline has no image encoder.
    """
    if getattr(pipeline, "image_encoder", None) is None:
        raise UserError("model to evaluate: no image_encoder, which KID needs; use emoji")
    options = pipeline.defaults.filled(
        {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": list(guidance_interval),
            "reuse_interval": reuse_interval,
            "sampler": sampler,
        }
    )
    progress = progress or (lambda iterable, description: iterable)
    emoji = load_emoji()
    images = np.stack([one.load(IMAGE_SIZE) for one in progress(emoji, "images")])
    held_out = np.array([i for i, one in enumerate(emoji) if one.split == "validation"])
    bases = np.array([i for i, one in enumerate(emoji) if one.code == one.concept])
    prompted = by_hash(emoji, bases, "prompts")[:TRAINING_PROMPTS]

    def generate(indices, description):
        prompts = [emoji[i].captions[0] for i in indices]
        batches = progress(equal_batches(len(prompts), batch_size), description)
        images = [generate_batch(pipeline, prompts, batch, seed, options) for batch in batches]
        return np.concatenate(images)[: len(prompts)]

    from_training = generate(prompted, "training prompts")
    from_held_out = generate(held_out, "held-out prompts")
    reconstructed = reconstruction_figures(images[held_out], pipeline.reconstruct(images[held_out]))
    with interruption.phase("evaluating retrieval", in_commands=True):
        rates = held_out_rates(emoji, images, held_out, from_held_out)
        rates["training_top1"] = top1(from_training, images[bases], np.searchsorted(bases, prompted))
        rates["training_edge_energy"] = edge_energy_ratio(images[prompted], from_training)
    with interruption.phase("evaluating KID", in_commands=True):
        kid = kid_and_floor(emoji, images, held_out, from_held_out, ClipFeatures(pipeline.image_encoder))
    return {
        **{f"reconstruction_{name}": figure for name, figure in reconstructed.items()},
        **rates,
        **kid,
        "generation_seconds": generation_seconds(pipeline, seed, options),
        "targets": {each.key: {"bar": each.bar, "hoped": each.hoped} for each in MEASURES},
        **options,
        "sampler": find_sampler(sampler, pipeline.scheduler_config).name,
        "seed": seed,
        "backend": keras.backend.backend(),
        "training_prompts": len(prompted),
        "held_out_prompts": len(held_out),
        "base_concepts": len(bases),
        "images": len(emoji),
    }


def format_table(results):
    """Return the figures and their bars as a Markdown table with aligned columns."""
    rows = [("measure", "bar", "hoped for", "figure", "met")]
    for measure in MEASURES:
        if measure.key not in results:  # of an earlier version
            continue
        targets = ["reported" if t is None else measure.form.format(t) for t in (measure.bar, measure.hoped)]
        figure = measure.form.format(results[measure.key])
        rows.append((measure.title, *targets, figure, _verdict(measure, results[measure.key])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _verdict(measure, figure):
    if measure.bar is None:
        return "reported"
    if measure.reaches(figure, measure.hoped):
        return "as hoped"
    return "yes" if measure.reaches(figure, measure.bar) else "no"


def by_hash(emoji, indices, salt):
    """Return the indices in a pseudo-random order that depends on the codes and the salt alone."""

    def key(index):
        return hashlib.sha256(f"{salt}:{emoji[index].code}".encode()).digest()

    return np.array(sorted(indices, key=key))


def generate_batch(pipeline, prompts, batch, seed, options):
    """Return the images of the prompts at the indices `batch`, uint8 (n, h, w, 3).

    Image i has `seed` + i. At the end of `batch` the last index may be repeated (`models.batches`).
    """
    chosen = [prompts[index] for index in batch]
    return pipeline.text_to_image(chosen, seed=seed + int(batch[0]), progress=False, **options)


def held_out_rates(emoji, images, held_out, generated):
    """Return how often the nearest real image has the right concept, and how often it is the right image."""
    same = first_of_identical(images)
    found, _ = nearest(generated, images)
    concepts = np.array([one.concept for one in emoji])
    # The same pixels may stand for several emoji: any of them counts.
    hits = [concepts[h] in concepts[same == same[f]] for f, h in zip(found, held_out, strict=True)]
    return {
        "held_out_concept": float(np.mean(hits)),
        "held_out_variant": float(np.mean(same[found] == same[held_out])),
    }


def kid_and_floor(emoji, images, held_out, generated, extractor):
    """Return the KID of the generated images and of real ones, all against the held-out ones."""
    real = extract(extractor, images)
    training = np.array([i for i, one in enumerate(emoji) if one.split == "train"])
    variants = np.array([i for i in training if emoji[i].code != emoji[i].concept])

    def kid(features):
        # Real draws are not paired, but must be compared in subsets of the same size.
        return paired_kernel_inception_distance(real[held_out], features)

    def draws(candidates):
        chosen = [by_hash(emoji, candidates, f"floor {draw}")[: len(held_out)] for draw in range(FLOOR_DRAWS)]
        return np.array([kid(real[indices]).mean for indices in chosen])

    made = extract(extractor, generated)
    measured = kid(made)
    among_variants = draws(variants)
    floor = float(np.sqrt(np.mean(among_variants**2)))
    return {
        "kid": measured.mean,
        "kid_standard_deviation": measured.standard_deviation,
        "fid": frechet_inception_distance(real[held_out], made),
        "kid_floor": floor,
        "kid_floor_mean": float(np.mean(among_variants)),
        "kid_ratio": measured.mean / floor,
        "kid_training": float(np.mean(draws(training))),
    }


def generation_seconds(pipeline, seed, options, repeats=5):
    """Return the median time of generating 4 images of one prompt, after a first call that compiles."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pipeline.text_to_image(["red heart"] * 4, seed=seed, progress=False, **options)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
