"""Measures what guidance in part of the steps saves and costs on the `emoji` model.

Time, against guidance in all steps, in turns; the mean difference of pictures of the same seeds; and what
`keras-sd evaluate` measures: KID to held-out pictures, and how often prompts get what they ask for.
"""

import json
import statistics
import time

import click
import numpy as np
from tqdm import tqdm

from keras_sd.cli import check_output
from keras_sd.errors import run_command
from machine import description

INTERVALS = ((0.0, 1.0), (0.0, 0.75), (0.0, 0.5), (0.0, 0.25), (0.25, 1.0), (0.25, 0.75))
FIGURES = ("kid", "kid_standard_deviation", "training_top1", "held_out_concept", "held_out_variant")
SETTINGS = {"num_steps": 30, "guidance_scale": 5.0, "seed": 0}
PICTURES, TURNS = 40, 5


@click.command(context_settings={"show_default": True})
@click.option("--output", default="benchmarks/guidance-interval.json", help="JSON file to write.")
def guidance_interval(output):
    """Measure guidance in part of the steps."""
    output = check_output(output, ".json")
    from keras_sd import StableDiffusion
    from keras_sd.data.emoji import load_emoji
    from keras_sd.metrics.evaluation import evaluate_emoji

    sd = StableDiffusion.from_preset("emoji", batch_size=PICTURES)
    prompts = [emoji.captions[0] for emoji in load_emoji()[::95][:PICTURES]]

    def draw(interval):
        start = time.perf_counter()
        pictures = sd.text_to_image(prompts, guidance_interval=interval, progress=False, **SETTINGS)
        return pictures.astype(float) / 255, time.perf_counter() - start

    rows = []
    everywhere, _ = draw(INTERVALS[0])
    for interval in tqdm(INTERVALS, unit="interval"):
        pictures, _ = draw(interval)
        turns = [(draw(interval)[1], draw(INTERVALS[0])[1]) for _ in range(TURNS)]
        own, whole = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        measured = evaluate_emoji(sd, guidance_interval=interval, **SETTINGS)
        rows.append(
            {
                "interval": interval,
                "time_ratio": own / whole,
                "mean_absolute_difference": float(np.abs(pictures - everywhere).mean()),
                **{name: measured[name] for name in FIGURES},
            }
        )
    command = "python tools/guidance_interval.py"
    results = description(("keras_sd", "keras", "tensorflow")) | {
        "command": command,
        **SETTINGS,
        "rows": rows,
    }
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        click.echo(
            f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}: {row['time_ratio']:.2f} x the time, "
            f"difference {row['mean_absolute_difference']:.3f}, KID {row['kid']:.4f}, "
            f"top-1 {row['training_top1']:.1%}, held out {row['held_out_concept']:.1%}"
        )
    click.echo(output)


if __name__ == "__main__":
    run_command(guidance_interval, "guidance_interval.py")
