"""What a measurement was taken on: the head of the JSON files under `benchmarks/`."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

# The makers' figures for dense products in half precision, by what the device's name holds.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L4": 121, "V100": 125, "T4": 65}


def description(packages):
    """Date, processor, cores, accelerator, and the versions of Python and of those of these packages that are
    installed, as a dictionary."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
        **({"accelerator": accelerator()} if accelerator() else {}),
    }


@functools.cache
def accelerator():
    """Return the name of the first NVIDIA GPU; None without any."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True)
    return listed.stdout.splitlines()[0].strip() if listed.returncode == 0 and listed.stdout else None


def peak_gflops():
    """What the accelerator's maker promises for products in half precision, in GFLOP/s; None if unknown."""
    names = [name for name in PEAK_TFLOPS if name in (accelerator() or "")]
    return 1000.0 * PEAK_TFLOPS[names[0]] if names else None


def processor():
    """Return the processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
