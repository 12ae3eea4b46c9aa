"""A run killed by SIGKILL while it encodes and while it trains ends with the same shards and weights.

`KERAS_SD_KILLS` sets the number of kills in each phase, 1 by default; `tools/bench_encodings.py kills` does
the same at full size.
"""

import os
import random
import signal
import time

import numpy as np
from PIL import Image

from tests import tiny
from tests.programs import Program
from tests.training.test_kill import newest_step
from tests.training.test_trainer import assert_same_state, state

KILLS = int(os.environ.get("KERAS_SD_KILLS", "1"))
IMAGES, STEPS = 400, 12


def start(folder, name, *more):
    arguments = ["-m", "keras_sd.train", "text-to-image", "--train-data-dir", folder / "images"]
    arguments += ["--pretrained-model-name-or-path", folder / "model", "--output-dir", folder / name]
    arguments += ["--cache-latents", "disk", "--cache-dir", folder / f"cache-{name}"]
    arguments += ["--max-train-steps", STEPS, "--train-batch-size", 2, "--checkpointing-steps", 2]
    arguments += ["--evaluation-steps", 0, "--lr-warmup-steps", 0]
    return Program([*arguments, *more])


def count(folder, pattern):
    return len(list(folder.glob(pattern)))


def kill_after(program, has_come, seconds):
    deadline = time.monotonic() + 300
    while not has_come():
        assert program.is_running() and time.monotonic() < deadline, program.printed()
        time.sleep(0.005)
    time.sleep(seconds)
    program.kill()
    assert program.finish().returncode == -signal.SIGKILL


def finish(program):
    done = program.finish(seconds=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}


def test_killed_run_has_the_shards_and_weights_of_the_uninterrupted_one(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(IMAGES):
        picture = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(picture).save(tmp_path / "images" / f"{index:03}.png")
        (tmp_path / "images" / f"{index:03}.txt").write_text(f"image {index}")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(tmp_path / "model")
    finish(start(tmp_path, "whole"))

    moments, cache, run = random.Random(0), tmp_path / "cache-killed", tmp_path / "killed"
    for kill in range(KILLS):
        written = kill + 1
        program = start(tmp_path, "killed")
        kill_after(
            program, lambda written=written: count(cache, "latents-*") >= written, moments.uniform(0, 0.02)
        )
    assert 0 < count(cache, "latents-*") < count(tmp_path / "cache-whole", "latents-*")
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.arrayrecord")}
    for kill in range(KILLS):
        resume = ("--resume-from-checkpoint", "latest") if kill else ()
        program = start(tmp_path, "killed", *resume)
        before = newest_step(run)
        kill_after(program, lambda before=before: newest_step(run) > before, moments.uniform(0, 0.1))
    told = finish(start(tmp_path, "killed", "--resume-from-checkpoint", "latest"))

    assert f"encodings: {IMAGES} of {IMAGES} images are in {cache}" in told
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in cache.glob("*.arrayrecord")}.items()
    assert shards(cache) == shards(tmp_path / "cache-whole")
    assert count(cache, "latents-*") == -(-IMAGES // 64)
    assert_same_state(state(tmp_path / "whole", STEPS), state(run, STEPS))
