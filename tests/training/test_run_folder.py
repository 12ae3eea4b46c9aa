"""A run folder belongs to one process; what is written into it is whole or absent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from keras_sd.errors import UserError
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.training.run_folder import (
    RunRecord,
    claim_output_dir,
    release_output_dir,
    restore_folder,
    write_whole_folder,
)

HOLD = (
    "import sys, time; from keras_sd.training.run_folder import claim_output_dir;"
    "claim_output_dir(sys.argv[1]); assert 'keras' not in sys.modules; print('held', flush=True); "
    "time.sleep(float(sys.argv[2]))"
)


def hold(folder, seconds):
    """Starts a process that takes a run folder, and waits until it has."""
    command = [sys.executable, "-c", HOLD, folder, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_folder_in_use_names_the_process_and_a_dead_one_holds_nothing(tmp_path):
    run = tmp_path / "runs" / "x"
    process = hold(run, 60)
    try:
        with pytest.raises(UserError) as raised:
            claim_output_dir(run)
        expected = f"{run}: in use by process {process.pid}; wait for it or choose another `output_dir`"
        assert str(raised.value) == expected
        claim_output_dir(run, lock=False)  # one of several processes
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    claim_output_dir(run)
    claim_output_dir(run)  # once more by the same process
    release_output_dir(run)
    assert not run.exists()  # as nothing was written


def test_process_that_ends_leaves_no_empty_folder(tmp_path):
    process = hold(tmp_path / "new", 0)
    assert process.wait() == 0
    assert not (tmp_path / "new").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    hold(tmp_path / "used", 0).wait()
    assert os.listdir(tmp_path / "used") == ["file"]


def test_folder_that_cannot_be_used_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    Checkpoints(tmp_path / "run", {}).save(5, {}, {})
    (tmp_path / "damaged" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "damaged" / "checkpoint-5" / "manifest.json").write_text("[" * 200_000)
    (tmp_path / "exported" / "model").mkdir(parents=True)
    cases = {
        ("file", None): "file: is a file; choose another `output_dir`",
        ("file/below", None): "below: cannot be written to: Not a directory; choose another `output_dir`",
        (
            "run",
            None,
        ): "run: holds checkpoints of an earlier run; continue with `resume_from_checkpoint='latest'`",
        ("exported", None): "model: is the model of an earlier run; choose another `output_dir`",
        (
            "run",
            "",
        ): "resume_from_checkpoint: is empty; give 'latest' or a checkpoint's path, or leave it out",
        ("none", " "): "resume_from_checkpoint: is empty",
        ("run", str(tmp_path)): "not a valid checkpoint: manifest.json is missing; give another folder or",
        ("damaged", "latest"): "damaged: no valid checkpoint to resume from; check `output_dir`",
        ("damaged", "checkpoint-5"): "checkpoint-5: not a valid checkpoint: manifest.json is damaged",
        ("none", "latest"): "none: no valid checkpoint to resume from; check `output_dir` or start without",
        ("run", "checkpoint-6"): "checkpoint-6: no such checkpoint folder; give its path or 'latest'",
    }
    for (name, request), told in cases.items():
        with pytest.raises(UserError, match=told):
            claim_output_dir(tmp_path / name, request)
    for request in ("latest", "checkpoint-5", str(tmp_path / "run" / "checkpoint-5")):
        claim_output_dir(tmp_path / "run", request)
    release_output_dir(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["checkpoint-5"]


def test_real_command_refuses_a_folder_in_use_before_it_loads_a_backend(tmp_path):
    process = hold(tmp_path / "run", 60)
    began = time.monotonic()
    try:
        command = [sys.executable, "-m", "keras_sd.train", "lora", "--output-dir", tmp_path / "run"]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"run: in use by process {process.pid}; wait" in line
    assert time.monotonic() - began < 5


def test_record_forgets_what_came_after_the_resumed_step(tmp_path):
    record = RunRecord(tmp_path)
    assert record.last("evaluated") == -1
    record.write("evaluated", 30)
    record.write("exported", 10)
    resumed = RunRecord(tmp_path, 20)
    assert (resumed.last("evaluated"), resumed.last("exported")) == (20, 10)
    assert RunRecord(tmp_path).last("evaluated") == -1
    (tmp_path / "logs" / "record.json").write_text("{damaged")
    assert RunRecord(tmp_path, 20).last("evaluated") == -1
    for damage in ("[" * 200_000, '{"evaluated": []}', '{"evaluated": Infinity}'):
        (tmp_path / "logs" / "record.json").write_text(damage)
        assert RunRecord(tmp_path, 20).last("evaluated") == -1


def test_folder_is_replaced_as_a_whole_or_stays(tmp_path):
    target = tmp_path / "model"

    def write(text):
        def to(folder):
            (folder / "part").mkdir()
            (folder / "part" / "file").write_text(text)
            if text == "broken":
                raise UserError("no space")

        return to

    write_whole_folder(target, write("first"))
    (target / "stranger").touch()
    with pytest.raises(UserError, match="no space"):
        write_whole_folder(target, write("broken"))
    assert (target / "part" / "file").read_text() == "first"
    target.rename(tmp_path / ".model.replaced")  # as a kill between the two renames leaves it
    restore_folder(target)
    write_whole_folder(target, write("second"))
    assert (target / "part" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["part"]
