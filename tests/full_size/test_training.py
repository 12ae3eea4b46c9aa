"""Two LoRA steps of Stable Diffusion 1.5 at its true size: 512 pixels, by the real command, within 24 GiB.

Weights are random ones in a diffusers folder of float16, 2 GB. What is measured goes to
`benchmarks/full-size-training.json`.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.full_path.commands import checkpoint
from tests.full_path.photographs import make_photographs

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "full-size-training.json"
LIBRARIES = ("keras", "tensorflow", "jax")
LARGEST = 24 * 2**30  # bytes in memory

# Runs a command and prints what it had in memory at the most, in KiB.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `model` and `photographs`."""
    folder = tmp_path_factory.mktemp("full_size")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    command = [sys.executable, "-m", "benchmark.random_models", "sd15", folder / "model", "float16"]
    subprocess.run(command, check=True, env=environment)
    make_photographs(folder / "photographs", 2)
    return folder


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_steps_of_lora(backend, folder):
    run = folder / backend
    command = [sys.executable, "-c", MEASURED, "-m", "keras_sd.train", "lora"]
    command += [
        "--pretrained-model-name-or-path",
        folder / "model",
        "--train-data-dir",
        folder / "photographs",
    ]
    command += ["--train-batch-size", 1, "--max-train-steps", 2, "--evaluation-steps", 0, "--output-dir", run]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-3000:]
    peak = 1024 * int(done.stdout.splitlines()[-1])
    record(backend, round(seconds), round(peak / 2**30, 2))
    assert peak < LARGEST
    updates = {name: array for name, array in checkpoint(run, step=2).items() if ".lora_B." in name}
    assert len(updates) == 128
    assert all(np.isfinite(array).all() and array.any() for array in updates.values())
    assert (run / "model" / "pytorch_lora_weights.safetensors").is_file()


def record(backend, seconds, peak_gigabytes):
    """Puts what was measured into the record, in place of an older one of the same backend."""
    known = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else {}
    known[backend] = {
        "seconds": seconds,
        "peak_gibibytes": peak_gigabytes,
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }
    what = "sd-1.5 with random weights in float16, 2 photographs, 512 pixels: two steps of LoRA, batch of 1"
    values = {"command": "make test-full ARGS=tests/full_size/test_training.py", "what": what, "runs": known}
    RECORD.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
