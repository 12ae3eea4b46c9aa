"""Times what a user waits for before anything happens: opening, the first image, the first training step.

Each side runs as a whole process, in turns with the others, with caches of its own that an earlier process
has filled. Ours are the real commands where there is one. Times are those at which lines of output arrive.
"""

import functools
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

from bench import PACKAGES, PEER_PACKAGES, TOOLS, Choices, installed_backends, model_folder
from benchmark.marks import PROMPT
from benchmark.starts_report import plot, table
from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_json, write_text
from machine import description

STEPS, IMAGES = 30, 4


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

    title: str
    sides: list[Side]
    figure: str = "seconds"


class Failure(Exception):
    """A side that cannot be measured; the line says why."""


def ours(task, folder, *arguments, phases, counted=(), fresh=False):
    """Return our sides of a task of `benchmark.our_starts`."""
    arguments = ["-m", "benchmark.our_starts", task, str(folder), *map(str, arguments)]
    return [
        Side(f"keras_sd, {name}", arguments, phases, counted, backend, fresh)
        for backend, name in NAMES.items()
    ]


def command(*arguments, phases, title="", backends=("tensorflow", "jax")):
    """Return our sides of a real command, with a title that tells it from another one of the row."""
    return [
        Side(f"keras_sd, {NAMES[backend]}{title}", ["-m", *map(str, arguments)], phases, backend=backend)
        for backend in backends
    ]


def peer(task, folder, *arguments, phases, counted=()):
    """Return the side of diffusers."""
    arguments = ["-m", "benchmark.peer_starts", task, str(folder), *map(str, arguments)]
    return Side("diffusers", arguments, phases, counted)


NAMES = {"tensorflow": "TensorFlow", "jax": "JAX"}
WHOLE = (("whole process", None),)
FIRST_STEP = (("to the first step", r"step 1\b"),)
OPENING = (("import", "mark: imported"), ("open", "mark: read"))
DRAWING = (("import", "mark: imported"), ("open", "mark: opened"), ("first image", "mark: done"))
TRAINING = ("--dataset-name", "emoji", "--max-train-steps", 2, "--evaluation-steps", 0, "--output-dir", "run")


class Models:
    """Folders of the models, which are made when they are asked for."""

    def __init__(self, weights_dir):
        self._weights_dir = weights_dir

    @functools.cached_property
    def emoji(self):
        return model_folder("emoji", self._weights_dir)

    @functools.cached_property
    def sd15(self):
        return model_folder("sd15", self._weights_dir).resolve()

    @functools.cached_property
    def half(self):
        """SD 1.5 with float16 weights."""
        return model_folder("sd15", self._weights_dir, "float16").resolve()


def opening(models, size):
    return Row(
        "open SD 1.5, every weight read",
        [
            *ours("open", models.sd15, phases=OPENING, counted=("open",)),
            peer("open", models.sd15, phases=OPENING, counted=("open",)),
        ],
    )


def first_image(models, size):
    return Row(
        f"SD 1.5, {size} px: process start to the first image of one step",
        [
            *ours("generate", models.sd15, size, 1, phases=DRAWING),
            peer("generate", models.sd15, size, 1, phases=DRAWING),
        ],
    )


def generate(models, size):
    draw = ("keras_sd", "generate", PROMPT, "--num-images", IMAGES, "--output", "image.png")
    return Row(
        f"`keras-sd generate` with `emoji`, {IMAGES} images, whole process",
        [*command(*draw, phases=WHOLE), peer("generate", models.emoji, 64, STEPS, IMAGES, phases=WHOLE)],
    )


def generate_phases(models, size):
    return Row(
        f"`emoji`, {IMAGES} images of {STEPS} steps: process start to the images",
        [
            *ours("generate", models.emoji, 64, STEPS, IMAGES, phases=DRAWING),
            peer("generate", models.emoji, 64, STEPS, IMAGES, phases=DRAWING),
        ],
    )


def training(models, size):
    train = ("keras_sd.train", "text-to-image", *TRAINING, "--max-train-samples", 128)
    plain = (*train, "--no-jit-compile")
    return Row(
        "`train text-to-image` with `emoji`: process start to the first step",
        [
            *command(*train, phases=FIRST_STEP),
            *command(*plain, phases=FIRST_STEP, title=", --no-jit-compile", backends=("tensorflow",)),
            peer("train", models.emoji, 64, 2, 64, phases=FIRST_STEP),
        ],
    )


def lora(models, size):
    train = ("keras_sd.train", "lora", *TRAINING, "--pretrained-model-name-or-path", models.sd15)
    train = (*train, "--max-train-samples", 2, "--resolution", size, "--rank", 4, "--train-batch-size", 1)
    of_peer = (("import and open", "mark: opened"), *FIRST_STEP)
    return Row(
        f"`train lora`, SD 1.5, {size} px, batch of 1: process start to the first step",
        [
            *command(*train, phases=FIRST_STEP),
            peer("train-lora", models.sd15, size, 2, 1, phases=of_peer),
        ],
    )


def first_unet(models, size):
    return Row(
        f"SD 1.5, {size} px, nothing cached: first call of the UNet",
        ours("unet", models.sd15, size, phases=DRAWING, counted=("first image",), fresh=True),
    )


def first_decoder(models, size):
    return Row(
        f"SD 1.5, {size} px, nothing cached: first call of the decoder",
        ours("decoder", models.sd15, size, phases=DRAWING, counted=("first image",), fresh=True),
    )


def memory(models, size):
    draw = ("keras_sd", "generate", PROMPT, "--model", models.half, "--num-inference-steps", 1)
    draw = (*draw, "--height", 512, "--width", 512, "--dtype", "float16", "--output", "image.png")
    return Row(
        "`keras-sd generate`, SD 1.5, 512 px, one step, float16 weights: peak of memory",
        [
            *command(*draw, phases=WHOLE),
            # In bfloat16, of the same size: in float16 a step takes torch more than 40 minutes here.
            peer("generate", models.half, 512, 1, 1, "bfloat16", phases=WHOLE),
        ],
        figure="peak_gigabytes",
    )


ROWS = {
    "opening": opening,
    "first-image": first_image,
    "generate": generate,
    "generate-phases": generate_phases,
    "training": training,
    "lora": lora,
    "first-unet": first_unet,
    "first-decoder": first_decoder,
    "memory": memory,
}


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


def measure(key, row, rounds, root, advance):
    """Return the figures of a row's sides: of the run that filled the caches, and of those in turns."""
    measured = [{"side": side.name, "counted": side.counted, "runs": []} for side in row.sides]
    places = [(root / f"{key}-{number}", root / "out") for number in range(len(row.sides))]
    for number in range(rounds + 1):
        for side, figures, (cache, folder) in zip(row.sides, measured, places, strict=True):
            if "failed" in figures:
                continue
            advance(f"{key}, {side.name}")
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
            name: statistics.median(one[name] for one in runs) for name in ("seconds", "peak_gigabytes")
        }
        figures["phases"] = {
            name: statistics.median(one["phases"][name] for one in runs) for name in first["phases"]
        }
    for cache, _ in places:
        shutil.rmtree(cache, ignore_errors=True)
    return {"key": key, "title": row.title, "figure": row.figure, "sides": measured}


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", show_default="bench/starts.json, numbered if there is one", help="JSON file to write."
)
@overwrite_option
@click.option("--rows", "chosen", default=",".join(ROWS), type=Choices(ROWS), help="Those to measure.")
@click.option(
    "--backends",
    default=lambda: ",".join(installed_backends()),
    show_default="those installed",
    type=Choices(NAMES),
)
@click.option("--rounds", default=5, type=click.IntRange(1), help="Timed runs of each side.")
@click.option("--size", default=256, type=click.IntRange(64), help="Pixels of Stable Diffusion's images.")
@click.option("--weights-dir", default="build/bench", help="Where models with random weights are kept.")
@click.option("--before", type=click.Path(exists=True), help="An earlier result, drawn beside in the plot.")
def bench_start(output, overwrite, chosen, backends, rounds, size, weights_dir, before):
    """Time the starts of the commands beside diffusers."""
    place = check_output(
        output,
        ".json",
        default="bench/starts.json",
        overwrite=overwrite,
        beside=lambda path: [path.with_suffix(".md"), path.with_suffix(".png")],
    )
    models = Models(weights_dir)
    todo = {}
    for key in chosen:
        row = ROWS[key](models, size)
        todo[key] = row._replace(sides=[side for side in row.sides if side.backend in (None, *backends)])
    results = description(PACKAGES + PEER_PACKAGES)
    results |= {
        "command": " ".join(["python tools/bench_start.py", *sys.argv[1:]]),
        "rounds": rounds,
        "rows": [],
    }
    output = place.free()
    with (
        tempfile.TemporaryDirectory() as root,
        tqdm(
            total=sum(len(row.sides) for row in todo.values()) * (rounds + 1), unit="run", dynamic_ncols=True
        ) as bar,
    ):

        def advance(what):
            bar.set_description(what)
            bar.update()

        for key, row in todo.items():
            results["rows"].append(measure(key, row, rounds, Path(root), advance))
            write_json(output, results)
            bar.write(table({**results, "rows": results["rows"][-1:]}))
    write_text(output.with_suffix(".md"), table(results) + "\n")
    plot(output.with_suffix(".png"), results, json.loads(Path(before).read_text()) if before else None)
    click.echo(f"{output}, {output.with_suffix('.md')} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(bench_start, "bench_start.py")
