"""Ctrl-C and SIGTERM at every phase of a real training: exit code, what is kept, and how it goes on."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keras_sd.cli.program import started_again
from keras_sd.training import architectures
from tests import tiny
from tests.programs import Program

LIMIT = 10.0  # seconds from a signal to the end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise, and the configs of a tiny UNet and of one that takes long to compile."""
    folder = tmp_path_factory.mktemp("interruption")
    tiny.pixel_folder(folder, 8)
    dataclasses.replace(architectures.PIXEL_UNET, layers_per_block=8).save(folder / "large.json")
    return folder


def arguments_of(folder, run, *more):
    arguments = ["ddim", "--train-data-dir", folder / "images", "--output-dir", folder / run]
    arguments += ["--train-batch-size", 4, *more]
    if "--evaluation-steps" not in more or more[more.index("--evaluation-steps") + 1]:
        arguments += ["--kid-images", 0]
    return ["-m", "keras_sd.train", *map(str, arguments)]


def start(folder, run, *more):
    return Program(arguments_of(folder, run, "--unet-config", folder / "unet.json", *more))


def wait_for(program, condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert program.is_running() and time.monotonic() < deadline, program.printed()
        time.sleep(0.01)


def ended_by(program, number):
    """Sends a signal and returns the last line of what was printed, once the program has ended in time."""
    began = time.monotonic()
    program.send(number)
    done = program.finish(60)
    assert time.monotonic() - began < LIMIT
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def newest(run):
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_a_step_saves_it_and_tells_how_to_go_on(folder, number):
    run = folder / f"step-{number}"
    options = ("--max-train-steps", 100_000, "--evaluation-steps", 0, "--checkpointing-steps", 100_000)
    program = start(folder, run.name, *options)
    log = run / "logs" / "metrics.jsonl"
    wait_for(program, lambda: log.exists() and log.read_text().count("\n") > 20)
    line = ended_by(program, number)
    name = signal.Signals(number).name
    step = newest(run)
    assert step >= 20 and not (run / "model").exists()  # a line may be of step 0
    told, command = line.split("; resume with: ")
    assert told == f"python -m keras_sd.train: {name}: ended"
    assert f'"step": {step},' in log.read_text().splitlines()[-1]
    # The line is a command that goes on; with fewer steps, there is nothing left but the model.
    words = shlex.split(command)
    assert words[0] == "KERAS_BACKEND=jax" and words[1] in ("python", sys.executable)
    assert words[2:4] == ["-m", "keras_sd.train"]
    done = Program([*words[2:], "--max-train-steps", step]).finish()
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "unet" / "config.json").is_file()


def test_signal_in_an_evaluation_ends_it_and_the_last_checkpoint_is_kept(folder):
    run = folder / "evaluation"
    options = ("--max-train-steps", 4, "--evaluation-steps", 2, "--checkpointing-steps", 2)
    large = ("--num-inference-steps", 1000, "--resolution", 64)  # which takes a minute
    program = start(folder, run.name, *options, *large, "--no-jit-compile")
    wait_for(program, lambda: "evaluating: samples" in program.printed())
    line = ended_by(program, signal.SIGTERM)
    assert "SIGTERM: ended while evaluating: samples; resume with: KERAS_BACKEND=jax " in line
    assert " -m keras_sd.train ddim" in line
    assert newest(run) == 2 and not (run / "samples").exists()


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.slow)])
def test_signal_while_the_step_is_compiled(folder, backend):
    run = f"compiling-{backend}"
    arguments = arguments_of(folder, run, "--unet-config", folder / "large.json", "--evaluation-steps", 0)
    environment = {**os.environ, "KERAS_BACKEND": backend, "KERAS_SD_CACHE": ""}
    with open(folder / f"{run}.txt", "w+") as errors:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=errors)
        path = folder / f"{run}.txt"
        deadline = time.monotonic() + 240
        while "compiling the training step" not in path.read_text():
            assert process.poll() is None and time.monotonic() < deadline, path.read_text()
            time.sleep(0.1)
        time.sleep(4)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, path.read_text()
        assert time.monotonic() - began < LIMIT
    told = "SIGTERM: ended while compiling the training step; there is no checkpoint yet, start again"
    assert path.read_text().strip().splitlines()[-1].endswith(told)
    assert not (folder / run / "model").exists()


@pytest.mark.parametrize("module", ["keras_sd.train", "keras_sd"])
@pytest.mark.parametrize("seconds", [0.8, 3.0])
def test_signal_before_training_ends_at_once_without_a_traceback(folder, module, seconds):
    started = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        arguments = arguments_of(folder, f"early-{number}", "--unet-config", folder / "unet.json")[2:]
        arguments = [*(["train"] if module == "keras_sd" else []), *arguments]
        program = [sys.executable, "-m", module, *arguments]
        started[number] = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    began = time.monotonic()
    for number, process in started.items():
        process.send_signal(number)
    for number, process in started.items():
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < LIMIT
        assert process.returncode in (128 + number, -number), errors
        assert "Traceback" not in errors, errors


def test_second_interrupt_aborts_at_once(folder):
    run = folder / "twice"
    program = start(folder, run.name, "--max-train-steps", 100_000, "--checkpointing-steps", 50)
    wait_for(program, lambda: newest(run) is not None)
    program.send(signal.SIGINT)
    ended_by(program, signal.SIGINT)


def test_resume_command_replaces_what_was_resumed_and_quotes(tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND")
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(bin_folder))
    command = started_again(
        "keras-sd", ["train", "lora", "--resume-from-checkpoint", "checkpoint-5", "--output-dir", "a b"], True
    )
    assert command == "keras-sd train lora --output-dir 'a b' --resume-from-checkpoint latest"
    command = started_again("keras-sd", ["train", "lora", "--resume-from-checkpoint=x"], True)
    assert command == "keras-sd train lora --resume-from-checkpoint latest"
    assert started_again("python -m keras_sd.train", [], True).startswith("python -m keras_sd.train -")
    # Another environment's programs are the first that a shell finds.
    for program in ("python", "keras-sd"):
        (tmp_path / program).write_text("#!/bin/sh")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{bin_folder}")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    end = "--resume-from-checkpoint latest"
    for program, module in (("python -m keras_sd.train", "keras_sd.train"), ("keras-sd", "keras_sd")):
        command = started_again(program, [], True)
        assert command == f"KERAS_BACKEND=jax {sys.executable} -m {module} {end}"


@pytest.mark.parametrize("is_saved", [False, True])
def test_training_that_is_ended_at_once_frees_its_folder_and_keeps_its_branch(tmp_path, is_saved):
    """Until it saves, a run that has resumed an older checkpoint goes on from that one."""
    code = """if True:
        import os, signal, sys, time
        import click
        from keras_sd import interruption
        from keras_sd.cli.program import run_command
        from keras_sd.training.checkpoints import Checkpoints
        from keras_sd.training.run_folder import claim_output_dir

        @click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
        def main():
            for step in (1, 2):
                Checkpoints("run", {}).save(step, {}, {})
            claim_output_dir("run", "checkpoint-1")
            claim_output_dir("new/run")
            interruption.set_run_folder("run", "checkpoint-1")
            if sys.argv[-1] == "True":
                checkpoints = Checkpoints("run", {})
                checkpoints.resolve("checkpoint-1")
                checkpoints.save(2, {}, {"of": "another branch"})
            import signals_itself  # within an import, where the program ends at once

        run_command(main, "keras-sd")
    """
    signals = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    (tmp_path / "signals_itself.py").write_text(signals)
    arguments = ["--resume-from-checkpoint", "checkpoint-1", str(is_saved)]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    kept = f"{is_saved} --resume-from-checkpoint latest" if is_saved else " ".join(arguments)
    assert line.startswith("keras-sd: SIGTERM: ended; resume with: ") and line.endswith(kept)
    assert not (tmp_path / "new" / "run").exists()
    assert not (tmp_path / "run" / ".lock").exists()


def test_child_processes_keep_their_signals_to_themselves():
    """A child that is told to end must not end its parent."""
    code = """if True:
        import multiprocessing, sys, time
        import click
        from keras_sd.cli.program import run_command

        @click.command()
        def main():
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            time.sleep(0.5)
            process.terminate()
            process.join()
            time.sleep(7)
            print(process.exitcode)

        run_command(main, "program")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "-15\n"), done.stderr
