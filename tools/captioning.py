"""Measures the captioner on the emoji images with the bundled CLIP; docs/captions.md has the results.

Rates are those between the first and the last batch on disk, so that loading the model counts as little as it
does in a large folder; `seconds` are of the whole command.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from keras_sd import load_emoji
from keras_sd.captions.dataset import JOURNALS
from keras_sd.captions.journal import count_lines, read_journal
from keras_sd.captions.ranking import top_k
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_json
from machine import description

PACKAGES = ("keras_sd", "open_clip_torch", "torch", "numpy")
PHRASES, QUERIES, WIDTH = 100_000, 16, 128
INTERVAL = 0.02


def write_images(folder, emoji, copies=1):
    """Draw emoji as PNG files of 64 x 64, each several times."""
    folder.mkdir()
    for e in emoji:
        image = Image.fromarray(e.load(64))
        for copy in range(copies):
            image.save(folder / f"{e.code}-{copy}.png")
    return folder


def command(folder, place, *options):
    """Return the command line that captions a folder in `fast` mode."""
    lists = ("--clip", place / "clip", "--captioner", "none", "--flavors", place / "names.txt")
    arguments = ("caption", folder, "--mode", "fast", "--max-phrases", "5", *lists, *options)
    return [sys.executable, "-m", "keras_sd", *map(str, arguments)]


def lines(folder):
    """Images that are done, by the journals."""
    return count_lines(folder / JOURNALS)


def captions_of(folder):
    """Text by file name."""
    entries = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return {entry["file_name"]: entry["text"] for entry in entries}


def rate(images, place, *options):
    """Caption a copy of a folder: images a second, and seconds of the whole command."""
    folder = place / "copy"
    shutil.copytree(images, folder)
    start = time.perf_counter()
    process = subprocess.Popen(
        command(folder, place, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    moments = [(start, 0)]
    while process.poll() is None:
        count = lines(folder)
        if count > moments[-1][1]:
            moments.append((time.perf_counter(), count))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode())
    shutil.rmtree(folder)
    (first, before), (last, after) = moments[1], moments[-1]
    return {"images_per_second": (after - before) / (last - first), "seconds": seconds}


def compare(images, place, sides, rounds, name):
    """Rates of two ways, taking turns; medians and their ratio, the second over the first."""
    runs = {side: [] for side in sides}
    for number in tqdm(range(rounds), desc=name, unit="round"):
        for side in sides if number % 2 == 0 else reversed(sides):
            runs[side].append(rate(images, place, *sides[side]))
    medians = {
        side: statistics.median(run["images_per_second"] for run in found) for side, found in runs.items()
    }
    first, second = medians.values()
    return {"images_per_second": medians, "ratio": second / first, "runs": runs}


def kill_and_resume(images, place, kills):
    """Kill a run again and again at random moments; count captions that are lost, doubled or other ones."""
    reference, folder = place / "reference", place / "killed"
    for target in (reference, folder):
        shutil.copytree(images, target)
    subprocess.run(command(reference, place), check=True, capture_output=True)
    random.seed(0)
    total, killed = len(captions_of(reference)), 0
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        while killed < kills:
            process = subprocess.Popen(
                command(folder, place, "--batch-size", "4", "--threads", "1"), stderr=subprocess.DEVNULL
            )
            # Most moments lie within the work, some in the loading before it.
            goal = lines(folder) + random.randrange(-20, total // (2 * kills))
            while process.poll() is None and lines(folder) <= goal:
                time.sleep(INTERVAL)
            time.sleep(random.random() / 5)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            bar.update()
    subprocess.run(command(folder, place, "--batch-size", "4"), check=True, capture_output=True)
    journals = (folder / JOURNALS).glob("captions-*.jsonl")
    names = [entry["file_name"] for path in journals for entry in read_journal(path)]
    expected, found = captions_of(reference), captions_of(folder)
    return {
        "kills": killed,
        "images": total,
        "lost": len(set(expected) - set(found)),
        "doubled": len(names) - len(set(names)),
        "different": sum(found.get(name) != text for name, text in expected.items()),
    }


def found_names(place, emoji):
    """Return the share of images whose own name is among the five phrases of their caption."""
    folder = write_images(place / "found", emoji)
    subprocess.run(command(folder, place), check=True, capture_output=True)
    captions = captions_of(folder)
    hits = [e.captions[0] in captions[f"{e.code}-0.png"].split(", ") for e in emoji]
    return {"images": len(hits), "top_5": float(np.mean(hits))}


def exact_search():
    """Compare `top_k` with products in double precision of every phrase."""
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((PHRASES, WIDTH), dtype="float32")
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queries = keys[:QUERIES] + generator.standard_normal((QUERIES, WIDTH), dtype="float32") / 8
    start = time.perf_counter()
    indices, _ = top_k(queries, keys, 32)
    seconds = time.perf_counter() - start
    expected = [np.argsort(-(keys.astype("float64") * q).sum(axis=1), kind="stable")[:32] for q in queries]
    return {
        "phrases": PHRASES,
        "equal": bool((indices == expected).all()),
        "seconds_per_query": seconds / QUERIES,
    }


@click.command(context_settings={"show_default": True})
@output_option("benchmarks/captions.json", "JSON file to write.")
@click.option("--kills", default=20, type=click.IntRange(1), help="SIGKILLs of a run.")
@click.option("--rounds", default=3, type=click.IntRange(1), help="Runs of each side of a comparison.")
def measure(output, overwrite, kills, rounds):
    """Measure names found, workers, batches, kills and exact search; 10 minutes."""
    output = check_output(output, ".json", default="benchmarks/captions.json", overwrite=overwrite)
    emoji = load_emoji()
    names = dict.fromkeys(e.captions[0] for e in emoji if e.code == e.concept)
    training = [e for e in emoji if e.split == "train" and e.code == e.concept]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["KERAS_SD_CACHE"] = str(place / "cache")
        (place / "names.txt").write_text("\n".join(names), encoding="utf-8")
        exported = [sys.executable, "-m", "keras_sd", "convert", "emoji", str(place / "clip"), "--open-clip"]
        subprocess.run(exported, check=True, capture_output=True)
        few = write_images(place / "few", training[:1500])
        many = write_images(place / "many", [e for e in emoji if e.split == "train"], copies=2)
        workers = {name: ("--devices", name, "--threads", "1") for name in ("cpu", "cpu,cpu")}
        batches = {size: ("--batch-size", size) for size in ("1", "32")}
        results = description(PACKAGES) | {
            "command": " ".join(["python", *sys.argv]),
            "names": found_names(place, training[:: len(training) // 200][:200]),
            "search": exact_search(),
            "kills": kill_and_resume(few, place, kills),
            "batches": compare(many, place, batches, rounds, "batch size 1 and 32"),
            "workers": compare(many, place, workers, rounds, "1 and 2 workers"),
        }
    path = output.free()
    write_json(path, results)
    click.echo(path)
    click.echo(json.dumps({name: results[name] for name in ("names", "search", "kills")}, indent=2))
    for name in ("batches", "workers"):
        click.echo(f"{name}: {results[name]['images_per_second']}, ratio {results[name]['ratio']:.2f}")


if __name__ == "__main__":
    run_command(measure, "captioning.py")
