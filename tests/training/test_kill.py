"""A run killed by SIGKILL at random moments, also inside saves, ends as if it had never been.

`KERAS_SD_KILLS` sets the number of kills, 1 by default. It runs on JAX, where a process that goes on finds
the program of the one before; that both backends resume to the bit, `test_trainer` says.
"""

import json
import os
import random
import signal
import time

from tests import tiny
from tests.programs import Program
from tests.training.test_trainer import assert_same_state, state

KILLS = int(os.environ.get("KERAS_SD_KILLS", "1"))
STEPS = 60 + 20 * KILLS
EVALUATION_STEPS = 20


def start(folder, run, *more):
    """Starts the real command, which saves after every second step."""
    arguments = ["-m", "keras_sd.train", "ddim", "--train-data-dir", folder / "images"]
    arguments += ["--unet-config", folder / "unet.json", "--output-dir", folder / run]
    arguments += ["--max-train-steps", STEPS, "--train-batch-size", 8, "--checkpointing-steps", 2]
    arguments += ["--kid-images", 0, "--num-inference-steps", 3, "--evaluation-steps", EVALUATION_STEPS]
    arguments += [*more]
    return Program(arguments)


def finish(program):
    done = program.finish(seconds=600)
    assert done.returncode == 0, done.stderr


def newest_step(run):
    """The step of the newest checkpoint in the folder, -1 before the first."""
    steps = [int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")]
    return max(steps, default=-1)


def wait_for_progress(program, run):
    """Waits until the run has saved a few times more than when it started."""
    begun, deadline = newest_step(run), time.monotonic() + 300
    while newest_step(run) < begun + 4:
        assert program.is_running() and time.monotonic() < deadline, program.finish().stderr
        time.sleep(0.01)


def kill_before_evaluation(program, run):
    """Kills a run between a checkpoint and the evaluation at that step, or within the evaluation."""
    begun, deadline = newest_step(run), time.monotonic() + 300
    while True:
        step = newest_step(run)
        image = run / "samples" / f"step-{step:06}.png"
        if step > begun and step % EVALUATION_STEPS == 0 and not image.exists():
            program.kill()
            return step, image.exists()
        assert program.is_running() and time.monotonic() < deadline, program.printed()


def test_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    tiny.pixel_folder(tmp_path, 20)
    finish(start(tmp_path, "whole"))

    moments = random.Random(0)
    for kill in range(KILLS):
        resume = ("--resume-from-checkpoint", "latest") if kill else ()
        program = start(tmp_path, "killed", *resume)
        wait_for_progress(program, tmp_path / "killed")
        time.sleep(moments.uniform(0.0, 0.1))
        program.kill()
        assert program.finish().returncode == -signal.SIGKILL
    for _ in range(2):
        program = start(tmp_path, "killed", "--resume-from-checkpoint", "latest")
        step, was_evaluated = kill_before_evaluation(program, tmp_path / "killed")
        assert program.finish().returncode == -signal.SIGKILL
        assert newest_step(tmp_path / "killed") == step and not was_evaluated
    finish(start(tmp_path, "killed", "--resume-from-checkpoint", "latest"))

    assert_same_state(state(tmp_path / "whole", STEPS), state(tmp_path / "killed", STEPS))
    assert records(tmp_path / "whole") == records(tmp_path / "killed")
    whole, killed = (samples(tmp_path / run) for run in ("whole", "killed"))
    assert len(whole) == STEPS // EVALUATION_STEPS
    assert whole == killed


def records(run):
    """Every line of the log, without the times, and what the run has on record as done."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    without_times = [{name: value for name, value in line.items() if name != "time"} for line in lines]
    return without_times, json.loads((run / "logs" / "record.json").read_text())


def samples(run):
    """Name -> content of every sample grid."""
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}
