"""Times what a user waits for before anything happens: opening, the first image, the first training step.

Each side runs as a whole process, in turns with the others, with caches of its own that an earlier process
has filled. Ours are the real commands where there is one. Times are those at which lines of output arrive.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
from tqdm import tqdm

from bench import PACKAGES, PEER_PACKAGES, TOOLS, Choices, model_folder
from benchmark.marks import PROMPT
from benchmark.starts_report import plot, table
from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_json, write_text
from machine import description

STEPS, IMAGES = 30, 4
RUN_TIMEOUT = 1800


class Side(NamedTuple):
    """A command, and the lines of its output that are timed.

    Attributes:
        name: in tables.
        arguments: of Python.
        phases: (name, regular expression of the line that ends it), in order; None is the end of the process.
        counted: names of the phases whose sum is compared; all of them by default.
        backend: of Keras; None for a peer.
        fresh: whether each run begins with an empty cache.
    """

    name: str
    arguments: list[str]
    phases: tuple[tuple[str, str | None], ...]
    counted: tuple[str, ...] = ()
    backend: str | None = None
    fresh: bool = False


class Row(NamedTuple):
    """A line of the table: who is compared, ours first."""

    key: str
    title: str
    sides: list[Side]
    figure: str = "seconds"


class Failure(Exception):
    """A side that cannot be measured; the line says why."""


def ours(title, task, folder, *arguments, phases, counted=(), fresh=False, backends=("tensorflow", "jax")):
    """Return our sides of a task of `benchmark.our_starts`."""
    arguments = ["-m", "benchmark.our_starts", task, str(folder), *map(str, arguments)]
    return [
        Side(f"keras_sd, {NAMES[backend]}{title}", arguments, phases, counted, backend, fresh)
        for backend in backends
    ]


def command(title, *arguments, phases, counted=(), backends=("tensorflow", "jax")):
    """Return our sides of a real command."""
    return [
        Side(f"keras_sd, {NAMES[backend]}{title}", ["-m", *map(str, arguments)], phases, counted, backend)
        for backend in backends
    ]


def peer(task, folder, *arguments, phases, counted=()):
    """Return the side of diffusers."""
    arguments = ["-m", "benchmark.peer_starts", task, str(folder), *map(str, arguments)]
    return Side("diffusers", arguments, phases, counted)


NAMES = {"tensorflow": "TensorFlow", "jax": "JAX"}
WHOLE = (("whole process", None),)
FIRST_STEP = (("to the first step", r"step 1\b"),)


def rows(emoji, sd15, half, size):
    """Return all rows.

    Args:
        emoji, sd15, half: folders of the models, `half` with float16 weights.
        size: pixels of Stable Diffusion's images.
    """
    opening = (("import", "mark: imported"), ("open", "mark: read"))
    drawing = (("import", "mark: imported"), ("open", "mark: opened"), ("first image", "mark: done"))
    of_emoji = (
        "--dataset-name",
        "emoji",
        "--max-train-steps",
        2,
        "--evaluation-steps",
        0,
        "--output-dir",
        "run",
    )
    train = ("keras_sd.train", "text-to-image", *of_emoji, "--max-train-samples", 128)
    lora = ("keras_sd.train", "lora", *of_emoji, "--max-train-samples", 2, "--resolution", size, "--rank", 4)
    lora = (*lora, "--train-batch-size", 1, "--pretrained-model-name-or-path", sd15)
    lora_phases = (("to the opened model", "training: lora"), ("first step", r"step 1\b"))
    large = ("keras_sd", "generate", PROMPT, "--model", half, "--num-inference-steps", 1)
    large = (*large, "--height", 512, "--width", 512, "--dtype", "float16", "--output", "image.png")
    draw = ("keras_sd", "generate", PROMPT, "--num-images", IMAGES, "--output", "image.png")
    return [
        Row(
            "opening",
            "open SD 1.5, every weight read",
            [
                *ours("", "open", sd15, phases=opening, counted=("open",)),
                peer("open", sd15, phases=opening, counted=("open",)),
            ],
        ),
        Row(
            "first-image",
            f"SD 1.5, {size} px: process start to the first image of one step",
            [
                *ours("", "generate", sd15, size, 1, phases=drawing),
                peer("generate", sd15, size, 1, phases=drawing),
            ],
        ),
        Row(
            "generate",
            f"`keras-sd generate` with `emoji`, {IMAGES} images, whole process",
            [
                *command("", *draw, phases=WHOLE),
                peer("generate", emoji, 64, STEPS, IMAGES, phases=WHOLE),
            ],
        ),
        Row(
            "generate-phases",
            f"`emoji`, {IMAGES} images of {STEPS} steps: process start to the images",
            [
                *ours("", "generate", emoji, 64, STEPS, IMAGES, phases=drawing),
                peer("generate", emoji, 64, STEPS, IMAGES, phases=drawing),
            ],
        ),
        Row(
            "training",
            "`train text-to-image` with `emoji`: process start to the first step",
            [
                *command("", *train, phases=FIRST_STEP),
                *command(
                    ", --no-jit-compile",
                    *train,
                    "--no-jit-compile",
                    phases=FIRST_STEP,
                    backends=("tensorflow",),
                ),
                peer("train", emoji, 64, 2, 64, phases=FIRST_STEP),
            ],
        ),
        Row(
            "lora",
            f"`train lora`, SD 1.5, {size} px: opened model to the first step",
            [
                *command("", *lora, phases=lora_phases, counted=("first step",)),
                peer(
                    "train-lora",
                    sd15,
                    size,
                    2,
                    1,
                    phases=(("to the opened model", "mark: opened"), ("first step", r"step 1\b")),
                    counted=("first step",),
                ),
            ],
        ),
        *(
            Row(
                f"first-{part}",
                f"SD 1.5, {size} px, nothing cached: first call of the {title}",
                ours("", part, sd15, size, phases=drawing, counted=("first image",), fresh=True),
            )
            for part, title in (("unet", "UNet"), ("decoder", "decoder"))
        ),
        Row(
            "memory",
            "`keras-sd generate`, SD 1.5, 512 px, one step, float16 weights: peak of memory",
            [
                *command("", *large, phases=WHOLE),
                peer("generate", half, 512, 1, 1, "float16", phases=WHOLE),
            ],
            figure="peak_gigabytes",
        ),
    ]


def run(side, cache, folder, to_the_end):
    """Run a side once; return the seconds of its phases and the peak of its memory.

    Args:
        cache: its folder of caches.
        folder: where it writes, emptied before.
        to_the_end: let it end by itself, so that it fills its caches; otherwise it is killed after its last
            phase.
    """
    for place in (folder, *((cache,) if side.fresh else ())):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    environment = {
        **os.environ,
        "KERAS_BACKEND": side.backend or "",
        "KERAS_SD_CACHE": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if side.backend is None:
        del environment["KERAS_BACKEND"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *side.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    )
    phases, waiting, last = {}, list(side.phases), ""
    for line in process.stdout:
        last = line.strip() or last
        if waiting and waiting[0][1] is not None and re.search(waiting[0][1], line):
            phases[waiting.pop(0)[0]] = time.perf_counter() - start - sum(phases.values())
            if not waiting and not to_the_end:
                process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if waiting and waiting[0][1] is None and process.returncode == 0:
        phases[waiting.pop(0)[0]] = time.perf_counter() - start - sum(phases.values())
    if waiting:
        raise Failure(f"{waiting[0][0]}: not reached ({last[:200]})")
    counted = side.counted or tuple(phases)
    return {
        "seconds": sum(phases[name] for name in counted),
        "peak_gigabytes": usage.ru_maxrss / 2**20,
        "phases": phases,
    }


def measure(row, rounds, root, advance):
    """Return the figures of a row's sides: of the run that filled the caches, and of those in turns."""
    measured = [{"side": side.name, "counted": side.counted, "runs": []} for side in row.sides]
    places = [(root / f"{row.key}-{number}", root / "out") for number in range(len(row.sides))]
    for number in range(rounds + 1):
        for side, figures, (cache, folder) in zip(row.sides, measured, places, strict=True):
            if "failed" in figures:
                continue
            advance(f"{row.key}, {side.name}")
            try:
                figures["runs"].append(run(side, cache, folder, to_the_end=not number))
            except Failure as failure:
                figures["failed"] = str(failure)
    for figures, (cache, _) in zip(measured, places, strict=True):
        if "failed" in figures:
            continue
        first, *runs = figures["runs"]
        figures["first"] = first
        figures["cache_bytes"] = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        figures["median"] = {
            key: statistics.median(one[key] for one in runs) for key in ("seconds", "peak_gigabytes")
        }
        figures["phases"] = {
            name: statistics.median(one["phases"][name] for one in runs) for name in first["phases"]
        }
    for cache, _ in places:
        shutil.rmtree(cache, ignore_errors=True)
    return {"key": row.key, "title": row.title, "figure": row.figure, "sides": measured}


KEYS = (
    "opening",
    "first-image",
    "generate",
    "generate-phases",
    "training",
    "lora",
    "first-unet",
    "first-decoder",
    "memory",
)


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", show_default="bench/starts.json, numbered if there is one", help="JSON file to write."
)
@overwrite_option
@click.option("--rows", "chosen", default=",".join(KEYS), type=Choices(KEYS), help="Those to measure.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Timed runs of each side.")
@click.option("--size", default=256, type=click.IntRange(64), help="Pixels of Stable Diffusion's images.")
@click.option("--weights-dir", default="build/bench", help="Where models with random weights are kept.")
@click.option("--before", type=click.Path(exists=True), help="An earlier result, drawn beside in the plot.")
def bench_start(output, overwrite, chosen, rounds, size, weights_dir, before):
    """Time the starts of the commands beside diffusers."""
    place = check_output(
        output,
        ".json",
        default="bench/starts.json",
        overwrite=overwrite,
        beside=lambda path: [path.with_suffix(".md"), path.with_suffix(".png")],
    )
    listed = rows(
        model_folder("emoji", weights_dir),
        Path(model_folder("sd15", weights_dir)).resolve(),
        Path(model_folder("sd15", weights_dir, "float16")).resolve(),
        size,
    )
    todo = [row for row in listed if row.key in chosen]
    results = description(PACKAGES + PEER_PACKAGES)
    results |= {
        "command": " ".join(["python tools/bench_start.py", *sys.argv[1:]]),
        "rounds": rounds,
        "rows": [],
    }
    output = place.free()
    with (
        tempfile.TemporaryDirectory() as root,
        tqdm(total=sum(len(row.sides) for row in todo) * (rounds + 1), unit="run", dynamic_ncols=True) as bar,
    ):

        def advance(what):
            bar.set_description(what)
            bar.update()

        for row in todo:
            results["rows"].append(measure(row, rounds, Path(root), advance))
            write_json(output, results)
            bar.write(table({**results, "rows": results["rows"][-1:]}))
    write_text(output.with_suffix(".md"), table(results) + "\n")
    plot(output.with_suffix(".png"), results, json.loads(Path(before).read_text()) if before else None)
    click.echo(f"{output}, {output.with_suffix('.md')} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(bench_start, "bench_start.py")
