"""Measures what sampling with fewer evaluations of the network saves and costs on the `emoji` model.

Ways are fewer steps of DDIM and of DPM++ 2M, guidance in part of the steps, reuse of deep features, and the
sampler `lcm` with a LoRA distilled for it. Time is taken against DDIM in 30 steps, in turns. Images are
compared with DDIM's of the same prompts and seeds, and measured as `keras-sd evaluate` does: KID to held-out
images, and how often prompts get what they ask for.
"""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from tqdm import tqdm

from keras_sd import UserError
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_json
from machine import description

SETTINGS = {"num_inference_steps": 30, "guidance_scale": 2.0, "sampler": "ddim"}
BATCH, SEED, TURNS = 20, 0, 3
INTERVALS = ((0.0, 0.75), (0.0, 0.5), (0.25, 1.0))
REUSES, LCM_STEPS, DDIM_STEPS = (2, 3, 5), (1, 2, 4, 6, 8), (10, 8, 4, 2, 1)
# A guided step evaluates the network twice: 2 and 3 steps are what 4 and 6 of LCM compare with.
DPM_STEPS = (20, 10, 5, 3, 2)


class Way(NamedTuple):
    """A way of sampling: its name, and what it changes of `SETTINGS`."""

    name: str
    changes: dict
    needs_lora: bool = False


def ways(with_lora):
    """Return all that is measured; what everything is compared with first."""
    listed = [Way("DDIM, 30 steps", {})]
    listed += [
        Way(f"DDIM, {steps} step{'s' * (steps > 1)}", {"num_inference_steps": steps}) for steps in DDIM_STEPS
    ]
    listed += [
        Way(f"DPM++ 2M, {steps} steps", {"sampler": "dpmpp_2m", "num_inference_steps": steps})
        for steps in DPM_STEPS
    ]
    if with_lora:
        distilled = {"sampler": "lcm", "guidance_scale": 1.0}
        listed += [
            Way(
                f"LCM, {steps} step{'s' * (steps > 1)}",
                distilled | {"num_inference_steps": steps},
                needs_lora=True,
            )
            for steps in LCM_STEPS
        ]
    listed += [
        Way(f"guidance from {start:g} to {end:g}", {"guidance_interval": (start, end)})
        for start, end in INTERVALS
    ]
    listed += [Way(f"deep features for {reuse} steps", {"reuse_interval": reuse}) for reuse in REUSES]
    return listed


class Bench:
    """The model, its prompts and the real images that its own are compared with.

    Args:
        lora: path of a LoRA for the sampler `lcm`, or None.
        count: prompts of each kind, at most the 200 that `evaluate_emoji` takes.
    """

    def __init__(self, lora, count):
        from keras_sd import ClipFeatures, StableDiffusion, extract, load_emoji
        from keras_sd.data.emoji.evaluation import IMAGE_SIZE, by_hash

        self.pipeline = StableDiffusion.from_preset("emoji", batch_size=BATCH)
        if lora is not None:
            self.pipeline.load_lora(lora, "lcm", weight=0.0)
        self.emoji = load_emoji()
        self.images = np.stack([one.load(IMAGE_SIZE) for one in self.emoji])
        held_out = [index for index, one in enumerate(self.emoji) if one.split == "validation"]
        self.bases = np.array([index for index, one in enumerate(self.emoji) if one.code == one.concept])
        self.held_out = by_hash(self.emoji, held_out, "prompts")[:count]
        self.prompted = by_hash(self.emoji, self.bases, "prompts")[:count]
        self.extractor = ClipFeatures(self.pipeline.image_encoder)
        self.real_features = extract(self.extractor, self.images[self.held_out])

    def adapted(self, way):
        """Return a block in which the model has the LoRA if the way needs it."""
        return self.pipeline.adapters.temporarily({"lcm": 1.0} if way.needs_lora else {})

    def draw(self, way, indices):
        """Return the images of the first captions of these emoji, uint8 `(n, 64, 64, 3)`."""
        from keras_sd.data.emoji.evaluation import generate_batch
        from keras_sd.models.batches import equal_batches

        prompts = [self.emoji[index].captions[0] for index in indices]
        options = SETTINGS | way.changes
        batches = equal_batches(len(prompts), BATCH)
        images = [generate_batch(self.pipeline, prompts, batch, SEED, options) for batch in batches]
        return np.concatenate(images)[: len(prompts)]

    def seconds(self, way):
        """Return the time of one batch, without that of adding the LoRA."""
        with self.adapted(way):
            start = time.perf_counter()
            self.draw(way, self.prompted[:BATCH])
            return time.perf_counter() - start

    def measure(self, way, reference):
        """Return one row of the results, and the images of the held-out prompts.

        Args:
            reference: images of the held-out prompts to compare with; None for the way's own.
        """
        from keras_sd import extract, paired_kernel_inception_distance
        from keras_sd.data.emoji.evaluation import held_out_rates
        from keras_sd.data.emoji.retrieval import top1

        with self.adapted(way):
            of_training, images = self.draw(way, self.prompted), self.draw(way, self.held_out)
        reference = images if reference is None else reference
        kid = paired_kernel_inception_distance(self.real_features, extract(self.extractor, images))
        row = {
            "way": way.name,
            **SETTINGS,
            **way.changes,
            "mean_absolute_difference": float(np.abs(images / 255 - reference / 255).mean()),
            "kid": kid.mean,
            "kid_standard_deviation": kid.standard_deviation,
            "training_top1": top1(
                of_training, self.images[self.bases], np.searchsorted(self.bases, self.prompted)
            ),
            **held_out_rates(self.emoji, self.images, self.held_out, images),
        }
        return row, images


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| way | time | difference | KID | top-1 | held-out concept | variant |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['time_ratio']:.2f} × | {row['mean_absolute_difference']:.3f} "
            f"| {row['kid']:.3f} | {row['training_top1']:.1%} | {row['held_out_concept']:.1%} "
            f"| {row['held_out_variant']:.1%} |"
        )
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--lora", help="LoRA distilled for the sampler lcm, which is left out without one.")
@click.option("--prompts", default=120, type=click.IntRange(4, 200), help="Prompts of each kind.")
@output_option("benchmarks/fewer-evaluations.json", "JSON file to write.")
def fewer_evaluations(lora, prompts, output, overwrite):
    """Measure sampling with fewer evaluations of the network."""
    output = check_output(output, ".json", default="benchmarks/fewer-evaluations.json", overwrite=overwrite)
    if lora is not None and not Path(lora).exists():
        raise UserError(f"{lora}: no such LoRA; give a file, or a folder that holds one")
    bench = Bench(lora, prompts)
    listed, rows, reference = ways(lora is not None), [], None
    for way in tqdm(listed, unit="way"):
        row, images = bench.measure(way, reference)
        reference = images if reference is None else reference
        rows.append(row)
    turns = [[bench.seconds(way) for way in listed] for _ in tqdm(range(TURNS), unit="turn")]
    medians = [statistics.median(seconds) for seconds in zip(*turns, strict=True)]
    for row, seconds in zip(rows, medians, strict=True):
        row |= {"seconds": seconds, "time_ratio": seconds / medians[0]}
    results = description(("keras_sd", "keras", "tensorflow")) | {
        "command": "python tools/fewer_evaluations.py" + (" --lora LORA" if lora else ""),
        "prompts": prompts,
        "seed": SEED,
        "images_timed": BATCH,
        "rows": rows,
    }
    click.echo(table(rows))
    path = output.free()
    write_json(path, results)
    click.echo(path)


if __name__ == "__main__":
    run_command(fewer_evaluations, "fewer_evaluations.py")
