"""Times the emoji model with XLA on and off: a training step, and sampling.

Every case runs in a process of its own, since XLA's cache grows with each model, and the two sides take
turns, so that a machine that slows down slows both. XLA is switched for TensorFlow; JAX cannot do without.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import click
from machine import description

from keras_sd.cli import check_output
from keras_sd.errors import run_command

CASES = {
    "train": "train step, batch of 64 latents 8x8x16",
    "sample": "text to image, 4 images 64x64, 30 steps",
}
PACKAGES = ("keras_sd", "keras", "tensorflow", "numpy")


def train_step(xla):
    """Returns a function that trains the emoji UNet for one step on a fixed batch."""
    import keras
    import numpy as np

    from keras_sd import config
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.unet import UNet
    from keras_sd.training.losses import DiffusionObjective
    from keras_sd.training.optimizer import AdamW

    keras.utils.set_random_seed(0)
    objective = DiffusionObjective(UNet(config.EMOJI_UNET), NoiseSchedule(config.EMOJI_SCHEDULER))
    optimizer = AdamW(1e-4, weight_decay=0.01, global_clipnorm=1.0)
    optimizer.build(objective.trainable_variables)
    objective.compile(optimizer=optimizer, jit_compile=xla)
    random = np.random.default_rng(0)
    side, channels = config.EMOJI_UNET.sample_size, config.EMOJI_UNET.in_channels
    text = (64, config.EMOJI_TEXT_ENCODER.max_position_embeddings, config.EMOJI_TEXT_ENCODER.hidden_size)
    batch = {
        "samples": random.standard_normal((64, side, side, channels), dtype="float32"),
        "noise": random.standard_normal((64, side, side, channels), dtype="float32"),
        "timesteps": random.integers(0, 1000, 64).astype("int32"),
        "context": random.standard_normal(text, dtype="float32"),
    }
    return lambda: objective.train_on_batch(batch)


def sampling(xla):
    """Returns a function that makes four pictures with the bundled model."""
    from keras_sd import StableDiffusion

    pipeline = StableDiffusion.from_preset("emoji", jit_compile=xla)
    return lambda: pipeline.text_to_image("red heart", num_images=4, num_steps=30, progress=False)


def measure(case, xla, repeats):
    """Times one side of a case in this process: seconds of the first call and of the following ones."""
    call = {"train": train_step, "sample": sampling}[case](xla)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"first_call_seconds": seconds[0], "seconds": seconds[1:]}


def measure_in_process(case, xla, repeats):
    """Has `measure` run in a new process."""
    command = [sys.executable, __file__, "--case", case, "--xla" if xla else "--no-xla"]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(
        [*command, "--repeats", str(repeats)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case, rounds, repeats):
    """Measures both sides of a case in turns and sums them up by their medians."""
    sides = {"on": [], "off": []}
    for number in range(rounds):
        # The side that goes first changes too.
        for side in ("on", "off") if number % 2 == 0 else ("off", "on"):
            sides[side].append(measure_in_process(case, side == "on", repeats))
            click.echo(f"{case}, XLA {side}, round {number + 1} of {rounds}", err=True)
    summary = {"case": CASES[case]}
    for side, runs in sides.items():
        seconds = [second for run in runs for second in run["seconds"]]
        summary[f"xla_{side}"] = {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "first_call_seconds": statistics.median(run["first_call_seconds"] for run in runs),
            "runs": runs,
        }
    summary["speedup"] = summary["xla_off"]["seconds"] / summary["xla_on"]["seconds"]
    return summary


def format_table(results):
    """Returns the results as a Markdown table: medians in seconds, with the range in brackets."""
    lines = ["| case | XLA on | XLA off | off / on | first call on / off |", "|---|---|---|---|---|"]
    for result in results:
        on, off = result["xla_on"], result["xla_off"]
        cells = [f"{s['seconds']:.3f} s ({s['fastest']:.3f}-{s['slowest']:.3f})" for s in (on, off)]
        first = f"{on['first_call_seconds']:.0f} / {off['first_call_seconds']:.0f} s"
        lines.append(f"| {result['case']} | {' | '.join(cells)} | {result['speedup']:.2f}x | {first} |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--output", default="bench/xla.json", help="JSON file to write.")
@click.option("--rounds", default=3, type=click.IntRange(1), help="Processes for each side of a case.")
@click.option("--repeats", default=10, type=click.IntRange(1), help="Timed calls in each process.")
@click.option("--case", type=click.Choice(list(CASES)), hidden=True)
@click.option("--xla/--no-xla", default=True, hidden=True)
def bench(output, rounds, repeats, case, xla):
    """Time the emoji model's training step and sampling with XLA on and off."""
    if case:
        click.echo(json.dumps(measure(case, xla, repeats)))
        return
    output = check_output(output, ".json")
    results = description(PACKAGES) | {"results": [compare(name, rounds, repeats) for name in CASES]}
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    click.echo(format_table(results["results"]))
    click.echo(f"\n{results['date']}, {results['processor']}, {results['cores']} cores, {versions}\n{output}")


if __name__ == "__main__":
    run_command(bench, "bench.py")
