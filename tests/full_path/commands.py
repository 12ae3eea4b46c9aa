"""The training commands on the model and the photographs of the full path, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.programs import run_python

STEPS = 6
KILLED_AFTER = 2
# The backends add up the same numbers in another order. A step of Adam divides a gradient by its own size, so
# a weight whose gradient is next to nothing may take another step: most tensors are within 5e-5, the worst
# that was seen 8e-4, and in distillation 1.9e-2, for updates that had hardly begun.
LARGEST_DIFFERENCE = 5e-2
LARGEST_DIFFERENCE_OVER_ALL = 1e-2
# The bias of keys adds one number to all scores of a query, which softmax takes out again: the exact gradient
# is zero. What a backend has is rounding, of which Adam makes whole steps.
WITHOUT_GRADIENT = ("to_k.bias", "k_proj.bias")


class Runs:
    """The runs of one method, each in a run folder beside the model and the photographs.

    Args:
        folder: gets the run folders.
        method: the command's name.
        options: of the method, beside those that all runs have here.
    """

    def __init__(self, folder, method, *options):
        self.folder = folder
        self._command = ["-m", "keras_sd.train", method, *options]
        self._command += ["--max-train-steps", STEPS, "--checkpointing-steps", KILLED_AFTER]
        self._command += ["--checkpoints-total-limit", STEPS, "--lr-warmup-steps", 0, "--evaluation-steps", 0]

    def arguments(self, run, *more):
        return [*self._command, "--output-dir", self.folder / run, *more]

    def train(self, run, backend, *more):
        """Trains to the end; returns the run folder."""
        run_python(self.arguments(run, *more), backend)
        return self.folder / run

    def train_killed(self, run, backend):
        """Is killed by SIGKILL after the first checkpoint, and goes on from it; returns the run folder."""
        command = [sys.executable, *map(str, self.arguments(run))]
        log = self.folder / f"{run}.txt"
        with log.open("wb") as file:
            environment = {**os.environ, "KERAS_BACKEND": backend}
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            first = self.folder / run / f"checkpoint-{KILLED_AFTER}"
            while process.poll() is None and not first.exists():
                time.sleep(0.005)
            process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text(encoding="utf-8")
        assert not (self.folder / run / f"checkpoint-{STEPS}").exists(), "the signal came too late"
        return self.train(run, backend, "--resume-from-checkpoint", "latest")


def checkpoint(run, group="weights", step=STEPS):
    """The tensors of a checkpoint: name -> array."""
    return load_file(run / f"checkpoint-{step}" / f"{group}.safetensors")


def losses(run):
    records = map(json.loads, (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_all_trained(run, start):
    """Every trained tensor has become another, and all numbers are finite.

    Args:
        start: name -> array before that; the trained ones.
    """
    trained = checkpoint(run)
    assert trained.keys() == start.keys()
    for name, array in trained.items():
        assert np.isfinite(array).all(), name
        assert not np.array_equal(array, start[name]), name


def assert_backends_agree(left, right, start):
    """What two runs have added to each tensor, and to all of them, differs by a small share of its length."""
    left, right = checkpoint(left), checkpoint(right)
    assert left.keys() == right.keys()
    updates, differences = [], []
    for name, array in left.items():
        if name.endswith(WITHOUT_GRADIENT):
            continue
        updates.append(np.linalg.norm(array - start[name]))
        differences.append(np.linalg.norm(array - right[name]))
        assert differences[-1] <= LARGEST_DIFFERENCE * updates[-1], name
    assert np.linalg.norm(differences) <= LARGEST_DIFFERENCE_OVER_ALL * np.linalg.norm(updates)


def assert_same_run(left, right):
    """Two runs ended with the same bits everywhere: state, losses and the exported model."""
    for group in ("weights", "ema", "optimizer"):
        expected, found = checkpoint(left, group), checkpoint(right, group)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(array, found[name], err_msg=f"{group}/{name}")
    assert losses(left) == losses(right) and sorted(losses(left)) == list(range(1, STEPS + 1))
    exported = [path.relative_to(left) for path in (left / "model").rglob("*") if path.is_file()]
    assert exported
    for path in exported:
        expected, found = (_without_names(run / path) for run in (left, right))
        assert expected == found, path


def _without_names(path):
    """The content of a file, without the name of its run in the header of a LoRA."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    for name in ("ss_output_name", "modelspec.title"):
        metadata.pop(name, None)
    return metadata, {name: array.tobytes() for name, array in load_file(path).items()}


def assert_images_differ(before, after):
    """Two images by diffusers are images, and training has changed one into the other."""
    for image in (before, after):
        assert np.isfinite(image).all() and image.std() > 0.01
    assert before.shape == after.shape == (1, 3, 128, 128)
    assert np.abs(after - before).max() > 1e-3
