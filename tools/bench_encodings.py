"""Measures encodings on disk: the rate of reading, memory, the start with a warm cache, and kills.

    python tools/bench_encodings.py reading
    python tools/bench_encodings.py memory --folder bench/encodings
    python tools/bench_encodings.py kills --folder bench/encodings
    python tools/bench_encodings.py ray --folder bench/encodings

`reading` reads batches of 16 examples at 512 px, with one caption each. `memory` trains with `--cache-latents
disk` on 20,000 images of 64 px and on 200, each in a process of its own, with an empty cache and again with a
warm one. `kills` encodes 2,000 images of 512 px through a small VAE of factor 8 and trains on them, is killed
at random moments and goes on; its shards and weights are compared with those of a run that was left alone.
`ray` encodes the same images by `keras-sd encode` in one process and by two workers of a Ray cluster on this
machine, of which some are killed, and compares the shards.
Each prints a JSON object.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from machine import description

PACKAGES = ("keras", "tensorflow", "jax", "grain", "array_record", "numpy", "ray")
BATCH = 16
SHARD_SIZE = 64
KILLED_STEPS = 400  # about as long as encoding, so that kills fall into both


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", choices=("reading", "memory", "kills", "ray"))
    parser.add_argument("--folder", type=Path, default=Path("bench/encodings"), help="for images and runs")
    parser.add_argument("--kills", type=int, help="by default 10, and 3 for ray")
    parser.add_argument("--images", type=int, help="by default 2,000, and 20,000 for memory")
    arguments = parser.parse_args()
    results = {
        "reading": measure_reading,
        "memory": lambda: measure_memory(arguments.folder, arguments.images or 20_000),
        "kills": lambda: measure_kills(arguments.folder, arguments.images or 2000, arguments.kills or 10),
        "ray": lambda: measure_ray(arguments.folder, arguments.images or 2000, arguments.kills or 3),
    }[arguments.measure]()
    command = f"python tools/bench_encodings.py {' '.join(sys.argv[1:])}"
    print(json.dumps({"command": command, **description(PACKAGES), **results}, indent=2))


def measure_reading(count=4096):
    """Read batches from shards through Grain: the arrays alone, and with the noise of a training example."""
    from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
    from keras_sd.training.text_to_image import diffusion_example

    def arrays(example, generator):
        return {name: example[name] for name in ("mean", "standard_deviation", "empty_context")}

    noise = NoiseDrawing(DiffusionSettings(), 1000)
    draws = {"arrays": arrays, "with noise": functools.partial(diffusion_example, noise=noise)}
    rates = {}
    for dtype in ("float32", "float16", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            source = Stored(folder, count, dtype)
            for name, draw in draws.items():
                rates[f"{dtype}, {name}"] = batch_rate(source, draw)
    return {"batches_of": BATCH, "load_average": os.getloadavg()[0], "reading": rates}


def batch_rate(source, draw, count=256):
    """Return how many examples a second come in batches, and the processor's time for one."""
    from keras_sd.data.sources import batches

    stream = iter(batches(source, batch_size=BATCH, seed=0, draw=draw))
    next(stream)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(stream)
    examples = BATCH * count
    return {
        "examples_per_second": round(examples / (time.perf_counter() - began)),
        "processor_us": round(1e6 * (time.process_time() - used) / examples),
    }


class Stored:
    """Examples of random numbers in shards: moments of 512 px, and one context of 77 x 768 each."""

    def __init__(self, folder, count, dtype):
        from keras_sd.data.encoding_store import EncodingStore, keys_of

        generator = np.random.default_rng(0)
        shapes = {"latents": (2, 64, 64, 4), "text": (77, 768)}
        arrays = {
            kind: generator.standard_normal((SHARD_SIZE, *shape), dtype="float32")
            for kind, shape in shapes.items()
        }
        keys = {kind: keys_of(kind, map(str, range(count))) for kind in shapes}
        self.store = EncodingStore(folder)
        for start in range(0, count, SHARD_SIZE):
            for kind in shapes:
                self.store.write(kind, "", keys[kind][start : start + SHARD_SIZE], arrays[kind], dtype)
        self.numbers = {kind: self.store.find(keys[kind]) for kind in shapes}

    def __len__(self):
        return len(self.numbers["text"])

    def __getitem__(self, index):
        mean, deviation = self.store.read(self.numbers["latents"][index])
        context = self.store.read(self.numbers["text"][index])
        moments = {"mean": mean, "standard_deviation": deviation}
        return {**moments, "contexts": context[None], "empty_context": context}


def measure_memory(folder, count):
    """Train on few and on many images; compare the memory, and the time to the first step."""
    model = small_model(folder / "model-64", 64)
    runs = {}
    for number in (200, count):
        images = write_images(folder / f"images-{number}", number, 64)
        cache = folder / f"cache-{number}"
        shutil.rmtree(cache, ignore_errors=True)
        for state in ("empty", "warm"):
            output = folder / f"run-{number}-{state}"
            shutil.rmtree(output, ignore_errors=True)
            arguments = command(model, images, cache, output, steps=10)
            began, process = time.time(), subprocess.Popen(arguments, env=environment())
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(map(str, arguments))}: ended with status {status}")
            runs[f"{number} images, {state} cache"] = {
                "peak_mib": round(usage.ru_maxrss / 1024),
                "logged_steps_s": round(first_time(output) - began, 2),
            }
    return {"runs": runs}


def environment():
    """Return the environment of a run: JAX sets TensorFlow's level of logging in this process."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def first_time(output):
    """Return when a run logged its first steps, which includes compilation."""
    return json.loads((output / "logs" / "metrics.jsonl").read_text().splitlines()[0])["time"]


def measure_kills(folder, count, kills):
    """Kill a run at random moments while it encodes and while it trains; compare it with one left alone."""
    model = small_model(folder / "model-512", 512)
    images = write_images(folder / f"images-512-{count}", count, 512)
    runs = {name: (folder / f"cache-{name}", folder / f"run-{name}") for name in ("whole", "killed")}
    for paths in runs.values():
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(model, images, *runs["whole"], steps=KILLED_STEPS), check=True, env=environment())
    duration, generator, moments = time.monotonic() - began, random.Random(0), []
    while True:
        resumed = (
            ["--resume-from-checkpoint", "latest"] if list(runs["killed"][1].glob("checkpoint-*")) else []
        )
        process = subprocess.Popen(
            [*command(model, images, *runs["killed"], steps=KILLED_STEPS), *resumed], env=environment()
        )
        # The second half of the kills falls into training: it begins with the first checkpoint.
        while len(moments) >= kills // 2 and not list(runs["killed"][1].glob("checkpoint-*")):
            time.sleep(0.5)
        try:
            # Starting takes some seconds, in which nothing is written.
            process.wait(generator.uniform(0.03, 0.1) * duration if len(moments) < kills else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            cache, output = runs["killed"]
            shards, last = len(list(cache.glob("latents-*"))), len(list(output.glob("checkpoint-*")))
            moments.append("training" if last else f"encoding, {shards} shards written")
    caches, outputs = zip(*runs.values(), strict=True)
    shards = [contents(cache, "*.arrayrecord") for cache in caches]
    weights = [contents(output, "model/*/*.safetensors") for output in outputs]
    return {
        "kills": moments,
        "shards": len(shards[0]),
        "shards_are_equal": shards[0] == shards[1],
        "weights_are_equal": len(weights[0]) > 0 and weights[0] == weights[1],
    }


def measure_ray(folder, count, kills):
    """Encode by one process, and by two Ray workers of which some are killed; compare the shards."""
    model = small_model(folder / "model-512", 512)
    images = write_images(folder / f"images-512-{count}", count, 512)
    caches = {name: folder / f"cache-{name}" for name in ("one-process", "ray")}
    encode = [sys.executable, "-m", "keras_sd", "encode", str(images)]
    options = ["--pretrained-model-name-or-path", str(model)]
    seconds, moments = {}, []
    for name, cache in caches.items():
        shutil.rmtree(cache, ignore_errors=True)
        on_ray = ["--ray", "local", "--ray-workers", "2"] if name == "ray" else []
        began = time.monotonic()
        process = subprocess.Popen([*encode, str(cache), *options, *on_ray], env=environment())
        total = -(-count // SHARD_SIZE)
        for number in range(kills if on_ray else 0):
            workers = []
            while process.poll() is None and not workers:
                time.sleep(0.05)
                if written(cache) > number * total // (kills + 1):
                    workers = list(worker_processes(process.pid))
            moments.append(f"{written(cache)} of {total} shards of images written")
            os.kill(workers[0], signal.SIGKILL)
        if process.wait():
            raise SystemExit(f"{name}: ended with status {process.returncode}")
        seconds[name] = round(time.monotonic() - began, 1)
    shards = [contents(cache, "*.arrayrecord") for cache in caches.values()]
    return {
        "images": count,
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
        "killed_workers": moments,
        "shards": len(shards[0]),
        "shards_are_equal": len(shards[0]) > 0 and shards[0] == shards[1],
    }


def written(cache):
    """Return how many shards of images there are."""
    return len(list(cache.glob("latents-*")))


def worker_processes(program):
    """Yield the ids of the Ray workers of a command that are at work, one after another."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    for number, title in titles.items():
        above = number
        while above in parents and above != program:
            above = parents[above]
        if above == program and title.startswith(b"ray::MapWorker") and b".submit" in title:
            yield number


def contents(folder, pattern):
    """Return the SHA-256 of each file that fits."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
    }


def command(model, images, cache, output, steps):
    """Return the command of a run with encodings on disk."""
    arguments = [sys.executable, "-m", "keras_sd.train", "text-to-image"]
    arguments += [
        "--pretrained-model-name-or-path",
        model,
        "--train-data-dir",
        images,
        "--output-dir",
        output,
    ]
    arguments += ["--cache-latents", "disk", "--cache-dir", cache]
    arguments += ["--max-train-steps", steps, "--train-batch-size", 4, "--evaluation-steps", 0]
    arguments += ["--checkpointing-steps", 10, "--lr-warmup-steps", 0]
    return [str(argument) for argument in arguments]


def write_images(folder, count, side):
    """Write images with captions, unless they are there."""
    if len(list(folder.glob("*.jpg"))) == count:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        # Noise of few details, which compresses.
        small = np.random.default_rng(index).integers(0, 256, (8, 8, 3), "uint8")
        Image.fromarray(small).resize((side, side)).save(folder / f"{index:06}.jpg")
        (folder / f"{index:06}.txt").write_text(f"image {index}")
    return folder


def small_model(folder, side):
    """Write a model of images of this side, with a VAE of factor 8 and hardly any weights."""
    if (folder / "model_index.json").exists():
        return folder
    from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.models.text_encoder import TextEncoder
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.models.unet import UNet
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.pipeline.stable_diffusion import StableDiffusion

    tokenizer = Tokenizer.clip()
    text_encoder = TextEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.max_length,
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=tokenizer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNetConfig(
        sample_size=side // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = VAEConfig(sample_size=side, block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
    parts = TextEncoder(text_encoder), UNet(unet), AutoencoderKL(vae)
    StableDiffusion(tokenizer, *parts, SchedulerConfig()).save(folder)
    return folder


if __name__ == "__main__":
    main()
