"""What a measurement was taken on: the head of the JSON files under `benchmarks/`."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def description(packages):
    """Date, processor, cores, and the versions of Python and of these packages, as a dictionary."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def processor():
    """The processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
