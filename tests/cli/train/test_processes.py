"""Processes that train together: the end of one is soon the end of all, with a line, and all resume."""

import contextlib
import os
import shlex
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.training.checkpoints import check_manifest
from tests import tiny
from tests.programs import Program

ENDLESS = 100_000  # steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise, and the config of a tiny UNet."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.pixel_folder(folder, 8)
    return folder


def arguments_of(folder, run, steps):
    arguments = ["ddim", "--train-data-dir", folder / "images"]
    arguments += ["--unet-config", folder / "unet.json", "--output-dir", folder / run]
    arguments += [
        "--train-batch-size",
        4,
        "--lr-warmup-steps",
        1,
        "--evaluation-steps",
        0,
        "--checkpointing-steps",
        2,
    ]
    # What the weights are does not depend on the number of steps.
    return [*arguments, "--lr-scheduler", "constant", "--max-train-steps", steps]


def start(folder, run, steps, *more, count=2, own=None, cwd=None, program=("-m", "keras_sd.train")):
    """Starts the processes; `own` holds more options of each of them, `cwd` where each is started."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    arguments = [*arguments_of(folder, run, steps), "--distribution", "auto", "--coordinator", address]
    arguments += ["--num-processes", count, *more]
    programs = []
    for index in range(count):
        with contextlib.chdir(cwd[index] if cwd else "."):
            options = [*arguments, "--process-id", index, *(own[index] if own else ())]
            programs.append(Program([*program, *options]))
    return programs


def copy_of(program):
    """The id of the process that trains, which `program` watches."""
    return int(Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()[0])


def wait_for_checkpoint(programs, run):
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoint-*")):
        assert all(program.is_running() for program in programs), [one.printed() for one in programs]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_checkpoint(run):
    """The step of the last checkpoint."""
    return max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def lines_of(done):
    """The lines of ours that tell an error."""
    return [line for line in done.stderr.splitlines() if line.startswith("python -m keras_sd.train: error:")]


def end_all(programs, seconds=60):
    """Waits for the end of all, which has to come soon."""
    began = time.monotonic()
    ended = [program.finish() for program in programs]
    assert time.monotonic() - began < seconds
    return ended


def exists(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def check_killed_and_resumed(folder, run, programs, killed):
    wait_for_checkpoint(programs, folder / run)
    copies = [copy_of(program) for program in programs]
    os.kill(copies[killed], signal.SIGKILL)
    told = f"python -m keras_sd.train: error: process {killed} was ended by SIGKILL, which ends the run; "
    for index, done in enumerate(end_all(programs)):
        assert done.returncode == 128 + signal.SIGKILL
        (line,) = lines_of(done)
        assert line.startswith(f"{told}resume all, this one with: KERAS_BACKEND=jax ")
        words = shlex.split(line.partition("this one with: ")[2])
        assert words[-2:] == ["--resume-from-checkpoint", "latest"]
        assert words[words.index("--process-id") + 1] == str(index)
    deadline = time.monotonic() + 20  # the kernel may need a while to take back the memory of a busy machine
    while any(map(exists, copies)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    last = last_checkpoint(folder / run) + 2
    resumed = start(folder, run, last, "--resume-from-checkpoint", "latest", count=len(programs))
    for done in end_all(resumed, 240):
        assert done.returncode == 0, done.stderr
    alone = Program(["-m", "keras_sd.train", *arguments_of(folder, f"{run}-alone", last)]).finish()
    assert alone.returncode == 0, alone.stderr
    for group in ("weights", "ema"):
        found, expected = (
            load_file(folder / name / f"checkpoint-{last}" / f"{group}.safetensors")
            for name in (run, f"{run}-alone")
        )
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4)


def test_a_killed_process_ends_the_other_and_both_resume(folder):
    check_killed_and_resumed(folder, "two", start(folder, "two", ENDLESS), killed=1)


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_all_resume(folder):
    check_killed_and_resumed(folder, "four", start(folder, "four", ENDLESS, count=4), killed=2)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_a_checkpoint_and_ends_both(folder):
    programs = start(folder, "signal", ENDLESS)
    wait_for_checkpoint(programs, folder / "signal")
    programs[1].send(signal.SIGTERM)
    for done in end_all(programs):
        assert done.returncode == 128 + signal.SIGTERM
        assert "SIGTERM: ended; resume with: KERAS_BACKEND=jax " in done.stderr.splitlines()[-1]
        assert not lines_of(done) and "Traceback" not in done.stderr


SLOW_DISK = """
import os, sys, time
fsync, folder = os.fsync, os.environ["SLOW_FOLDER"]
def slow_fsync(descriptor):
    if os.path.exists(folder):
        time.sleep(3)
    fsync(descriptor)
os.fsync = slow_fsync
from keras_sd.train import main
main("keras_sd.cli.train.main")
"""


@pytest.mark.slow
def test_a_checkpoint_on_a_slow_disk_is_saved_after_a_signal(folder, tmp_path, monkeypatch):
    """Process 1, which writes nothing, waits for it."""
    monkeypatch.setenv("SLOW_FOLDER", str(tmp_path / "slow"))
    programs = start(folder, "slow", ENDLESS, program=("-c", SLOW_DISK))
    wait_for_checkpoint(programs, folder / "slow")
    (tmp_path / "slow").mkdir()
    before = last_checkpoint(folder / "slow")
    programs[1].send(signal.SIGTERM)
    for done in end_all(programs, 240):
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
        assert not lines_of(done) and "Traceback" not in done.stderr
    saved = last_checkpoint(folder / "slow")
    assert saved > before
    check_manifest(folder / "slow" / f"checkpoint-{saved}")


def test_bad_input_of_one_process_ends_both(folder, tmp_path):
    """The images of process 1 are not there, as its path is relative and it is started elsewhere."""
    ended = end_all(start(folder, "elsewhere", ENDLESS, "--train-data-dir", "images", cwd=(folder, tmp_path)))
    assert [done.returncode for done in ended] == [2, 2]
    lines = [line for done in ended for line in lines_of(done)]
    assert len(lines) == 2, [done.stderr for done in ended]
    assert lines[0].endswith(
        "error: process 1 ended with exit code 2 (bad input, which it names itself), which ends the run; "
        "there is no checkpoint yet, start again"
    )
    assert lines[1].endswith("error: images: no such folder; give a folder with images")


def test_different_options_end_both(folder):
    own = [("--seed", 3), ("--learning-rate", 0.5, "--seed", 4)]
    for done in end_all(start(folder, "different", ENDLESS, own=own)):
        assert done.returncode == 2
        (line,) = lines_of(done)
        assert line.endswith(
            "error: process 1: --learning-rate is 0.5 there and None in process 0; give both the same; "
            "process 1: --seed is 4 there and 3 in process 0; give both the same"
        )
    assert not (folder / "different").exists()
