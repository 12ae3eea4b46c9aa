"""Times `keras_sd` with XLA on and off, on TensorFlow and JAX, and beside what people would use instead.

Each side of a case runs in a process of its own. It is started twice, with an empty cache of compiled
programs and with the one that this has filled; the second process stays, and its calls take turns with
those of the first side of the case, so that a machine that slows down slows both. A ratio is the median of
the turns' own, beside the least and the largest of them. Results are compared before anything is timed.
"""

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from benchmark import report
from benchmark.worker import SAMPLING_CASES
from keras_sd import UserError
from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from machine import accelerator, description, peak_gflops

TOOLS = Path(__file__).resolve().parent
PACKAGES = ("keras_sd", "keras", "tensorflow", "jax", "numpy")
PEER_PACKAGES = ("torch", "diffusers", "transformers", "peft", "openvino", "keras-cv")

PART_CASES = ("text-encoder", "unet", "vae-encode", "vae-decode")
CASES = (*PART_CASES, *SAMPLING_CASES, "training", "training-lora")
MODELS = ("emoji", "sd15", "sd21")
# What is measured of a model if nothing is named: what fits 8 GiB and a quarter of an hour.
USUAL_CASES = {
    "emoji": ("generation", "training"),
    "sd15": PART_CASES,
    "sd21": ("text-encoder", "unet"),
}
STEPS = {"emoji": 30, "sd15": 10, "sd21": 10}
TRAINING_BATCH = {"emoji": 64, "sd15": 1, "sd21": 1}
PEERS = (
    *("diffusers", "diffusers-channels-last", "diffusers-compiled", "openvino", "keras-cv"),
    "engine-openvino",  # ours, with engine="openvino"
)

# The largest difference between two sides, as a share of the largest number.
LARGEST_DIFFERENCE = {"float32": 2e-3, "bfloat16": 0.2, "float16": 0.05}
# Of latents and images, whose differences grow from step to step; images are rounded to 255 steps.
LARGEST_IMAGE_DIFFERENCE = {"float32": 0.03, "bfloat16": 0.5, "float16": 0.2}


class Choices(click.ParamType):
    """Names out of a list, with commas between them."""

    name = "names"

    def __init__(self, names):
        self.names = tuple(names)

    def convert(self, value, param, ctx):
        chosen = value if isinstance(value, tuple) else tuple(name for name in value.split(",") if name)
        for name in chosen:
            if name not in self.names:
                self.fail(f"{name!r} is none of {', '.join(self.names)}", param, ctx)
        return chosen


class Failure(Exception):
    """A side that cannot be measured; the line says why."""


class Side:
    """A process that runs one case by one implementation whenever it is asked to."""

    def __init__(self, spec, cache):
        self._errors = tempfile.TemporaryFile("w+")
        environment = {
            **os.environ,
            "KERAS_BACKEND": "jax" if spec["implementation"] == "jax" else "tensorflow",
            "KERAS_SD_CACHE": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(cache, "inductor")),
            # Two sides are there at a time.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "HF_HUB_OFFLINE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self._process.kill()
            raise
        self.ready["start_seconds"] = time.perf_counter() - start

    def _answer(self):
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        raise Failure(said[-1][:300] if said and code > 0 else f"ended by signal {-code}")

    def call(self):
        """Return the seconds of one call, by the clock and of the processor's cores."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["processor_seconds"]

    def close(self):
        """End the process; return the most bytes that it had in memory."""
        self._process.stdin.close()
        peak = self._answer()["peak_bytes"]
        self._process.wait()
        return peak

    def kill(self):
        self._process.kill()
        self._process.wait()


def started(spec, folder, cache=None):
    """Start a side with an empty and then with a filled cache; return what both took, and the second.

    With a `cache` of the caller's there is one start, with what is kept there.
    """
    starts = {}
    if cache is None:
        cache = Path(folder, "cache")
        shutil.rmtree(cache, ignore_errors=True)
        cold = Side(spec, cache)
        cold.close()
        starts["cold"] = cold.ready
    warm = Side(spec, cache)
    return {**starts, "warm": warm.ready}, warm


def difference(result, expected):
    """Return the largest difference as a share of the largest expected number."""
    return float(np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-12))


def largest_difference(workload):
    """Return how far two sides may be from each other."""
    is_sampling = workload["case"] in SAMPLING_CASES
    bars = LARGEST_IMAGE_DIFFERENCE if is_sampling else LARGEST_DIFFERENCE
    return bars[workload["precision"]]


def measure(workload, implementations, repeats, cache, advance):
    """Measure all sides of a case, each in turns with the first.

    Args:
        workload: the specification, without the implementation.
        implementations: dictionaries of implementation and xla; ratios are to the first.
        cache: as `started` takes it.
        advance: called with each side's figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        reference, expected, first = None, None, None
        try:
            for number, implementation in enumerate(implementations):
                spec = {**workload, **implementation, "result": str(Path(folder, f"{number}.npy"))}
                figures = {**implementation}
                try:
                    starts, side = started(spec, folder, cache)
                    figures |= starts
                    result = np.load(spec["result"])
                    if expected is None:
                        expected = result
                    elif implementation["implementation"] != "keras-cv":  # which has its own weights
                        figures["difference"] = difference(result, expected)
                        if figures["difference"] > largest_difference(workload):
                            side.kill()
                            raise Failure(f"another result: {figures['difference']:.1e}")
                    figures |= take_turns(side, reference, repeats)
                    if number == 0:
                        reference, first = side, figures
                    else:
                        figures["peak_bytes"] = side.close()
                except Failure as failure:
                    figures["failed"] = str(failure)
                advance(figures)
            if reference is not None:
                with contextlib.suppress(Failure):
                    first["peak_bytes"] = reference.close()
        finally:
            if reference is not None:
                reference.kill()


def take_turns(side, reference, repeats):
    """Call a side, and the reference in between if there is one."""
    side.call()  # both are out of the cache by now
    pairs = [(side.call(), reference.call() if reference else None) for _ in range(repeats)]
    seconds, processor = zip(*(own for own, _ in pairs), strict=True)
    figures = {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "processor_seconds": statistics.median(processor),
    }
    if reference:
        ratios = [own[0] / other[0] for own, other in pairs]
        figures["reference_seconds"] = statistics.median(other[0] for _, other in pairs)
        figures |= {
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "largest_ratio": max(ratios),
        }
    return figures


def model_folder(model, root, dtype="float32"):
    """Return a diffusers folder of the model; Stable Diffusion's is made once, with random weights."""
    from keras_sd import presets

    if model == "emoji":
        return presets.find("emoji")
    folder = Path(root, model if dtype == "float32" else f"{model}-{dtype}")
    if not folder.exists():
        click.echo(f"{folder}: writing {model} with random weights", err=True)
        command = [sys.executable, "-m", "benchmark.random_models", model, str(folder), dtype]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(TOOLS)})
    return folder


def sides(case, backends, xla, peers):
    """Who computes a case: ours first, XLA before the others."""
    ours = [
        {"implementation": backend, "xla": switch}
        for backend in backends
        for switch in (xla if backend == "tensorflow" else ("on",))
    ]
    has = {
        "openvino": case in PART_CASES,
        "keras-cv": case in PART_CASES,
        "engine-openvino": case in SAMPLING_CASES,
        "diffusers-channels-last": case != "text-encoder",
    }
    return ours + [{"implementation": peer, "xla": None} for peer in peers if has.get(peer, True)]


def gemm_ceiling(model, backends, precision):
    """GFLOP/s of the product of two large matrices by the fastest of the backends."""
    found = []
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "gemm.npy")
            spec = {"case": "gemm", "implementation": backend, "result": str(result)}
            spec |= {"folder": str(model), "batch": 1, "precision": precision}
            Side({**spec, "size": 8192 if accelerator() else 2048}, folder).close()
            found.append(float(np.load(result)))
    return max(found)


def workloads(models, cases, size, batch, steps, precisions, root):
    """Yield the specifications of all cases that are to be measured."""
    for model in models:
        folder = model_folder(model, root)
        for case in cases or USUAL_CASES[model]:
            for precision in precisions:
                yield {
                    "case": case,
                    "model": model,
                    "folder": str(folder),
                    "size": 64 if model == "emoji" else size,
                    "batch": batch or _batch(model, case),
                    "steps": steps or STEPS[model],
                    "precision": precision,
                }


def _batch(model, case):
    if case.startswith("training"):
        return TRAINING_BATCH[model]
    return 4 if model == "emoji" else 1


def installed_backends():
    """TensorFlow and JAX, as far as they are here."""
    return tuple(name for name in ("tensorflow", "jax") if importlib.util.find_spec(name))


@click.command(context_settings={"show_default": True})
@click.option(
    "--output",
    show_default="bench/xla.json, or bench/peers.json, numbered if there is one",
    help="JSON file to write; a table and a plot go beside.",
)
@overwrite_option
@click.option("--models", default="emoji,sd15", type=Choices(MODELS), help=f"Of {', '.join(MODELS)}.")
@click.option("--cases", default="", type=Choices(CASES), help=f"Of {', '.join(CASES)}; the usual ones.")
@click.option(
    "--backends",
    default=lambda: ",".join(installed_backends()),
    show_default="those installed",
    type=Choices(("tensorflow", "jax")),
)
@click.option("--xla", default="on,off", type=Choices(("on", "off", "auto")), help="On TensorFlow.")
@click.option("--precisions", default="float32", type=Choices(tuple(LARGEST_DIFFERENCE)))
@click.option("--peers", default="", type=Choices(PEERS), help=f"Of {', '.join(PEERS)}.")
@click.option(
    "--size",
    default=lambda: 512 if accelerator() else 256,
    show_default="256; 512 on a GPU",
    type=click.IntRange(64),
    help="Pixels of Stable Diffusion's images.",
)
@click.option("--batch", type=click.IntRange(1), help="Images at a time; by default as the case has them.")
@click.option("--steps", type=click.IntRange(1), help="Steps of sampling: 10; 30 for emoji.")
@click.option("--repeats", default=5, type=click.IntRange(1), help="Timed calls of each side.")
@click.option("--weights-dir", default="build/bench", help="Where models with random weights are kept.")
@click.option("--cache-dir", help="Compiled programs; sides are then started once, with what is there.")
def bench(
    output,
    overwrite,
    models,
    cases,
    backends,
    xla,
    precisions,
    peers,
    size,
    batch,
    steps,
    repeats,
    weights_dir,
    cache_dir,
):
    """Time models with XLA on and off, on TensorFlow and JAX, and beside other libraries."""
    place = check_output(
        output,
        ".json",
        default="bench/peers.json" if peers else "bench/xla.json",
        overwrite=overwrite,
        beside=lambda path: [path.with_suffix(".md"), path.with_suffix(".png")],
    )
    if size % 64:
        raise UserError(f"--size {size}: no multiple of 64; use {size // 64 * 64}")
    if not backends:
        raise UserError("--backends: nothing to measure; name tensorflow, jax or both")
    todo = list(workloads(models, cases, size, batch, steps, precisions, weights_dir))
    plan = [(workload, sides(workload["case"], backends, xla, peers)) for workload in todo]
    results = description(PACKAGES + (PEER_PACKAGES if peers else ()))
    results |= {"command": " ".join(["python tools/bench.py", *sys.argv[1:]]), "repeats": repeats}
    emoji = model_folder("emoji", weights_dir)
    results["gemm_gflops"] = {name: gemm_ceiling(emoji, backends, name) for name in precisions}
    results["results"] = []
    output = place.free()

    with tqdm(total=sum(len(each) for _, each in plan), unit="side", dynamic_ncols=True) as bar:

        def advance(result, figures):
            report.complete(result, figures, results["gemm_gflops"], peak_gflops())
            result["sides"].append(figures)
            bar.write(report.line(result, figures))
            bar.update()
            report.write(output, results)

        bar.write(report.HEAD)
        for workload, implementations in plan:
            result = {key: value for key, value in workload.items() if key != "folder"} | {"sides": []}
            results["results"].append(result)
            measure(workload, implementations, repeats, cache_dir, functools.partial(advance, result))
    report.write(output, results)
    report.plot(output.with_suffix(".png"), results)
    click.echo(f"{output}, {output.with_suffix('.md')} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(bench, "bench.py")
