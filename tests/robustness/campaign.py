"""Has damaged files read in a process that can be killed, and says which ones the readers did not stand."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans

from tests.robustness.mutations import DIRECTORY, damaged
from tests.robustness.readers import READERS

LONGEST = 10.0
"""Seconds that an input may take."""

MOST_MEMORY = 500.0
"""MiB by which an input may make the process grow."""

_START = 300.0  # seconds in which a worker has loaded its libraries
ROOT = Path(__file__).parents[2]


class Worker:
    """A process that reads with the readers, started when needed and again after it was killed.

    Args:
        folder: for what the process prints.
        longest: seconds that an input may take.
    """

    def __init__(self, folder, longest=LONGEST):
        self.longest = longest
        self._errors = Path(folder) / "errors.txt"
        self._process = None

    @property
    def is_alive(self):
        """Whether there is a process; none before the first reading, and after one that ended it."""
        return self._process is not None

    def read(self, name, folder, file=None):
        """What came of a reader: a dictionary of fault (None or text), message, seconds, growth in MiB."""
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps([name, str(folder), file, file is None]) + "\n")
        self._process.stdin.flush()
        began, limit = time.monotonic(), _START if file is None else self.longest
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        seconds = time.monotonic() - began
        fault = "ended the process" if ready else f"took more than {limit:.0f} s"
        code = self.close()
        told = self._errors.read_text(errors="replace")[-1500:]
        return {"fault": f"{fault} ({code}) {told}", "message": "", "seconds": seconds, "growth": 0.0}

    def _start(self):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
        }
        environment["MALLOC_ARENA_MAX"] = "2"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            env=environment,
            cwd=ROOT,
            text=True,
        )

    def close(self):
        """Ends the process; returns its exit code."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.kill()
        process.stdin.close()
        process.stdout.close()
        return process.wait()


def run(name, worker, folder, count):
    """Reads `count` damaged inputs, or the reader's share of them.

    Returns:
        A dictionary: inputs, taken (without a fault), refused (in one line), the most seconds and MiB of an
        input, and failures, a list of (file, content, what).
    """
    reader = READERS[name]
    files = reader.make()
    folder = Path(folder)
    for file, content in files.items():
        _put(folder / file, content)
    good = worker.read(name, folder)
    assert good["fault"] is None, good["fault"]
    _restore(folder, files)
    counts = {"inputs": 0, "taken": 0, "refused": 0, "failures": [], "seconds": 0.0, "growth": 0.0}

    def read_damaged(file, content, seals):
        _put(folder / file, content)
        if seals and reader.seal is not None:
            reader.seal(folder, file)
        answer = worker.read(name, folder, file)
        _restore(folder, files)
        if not worker.is_alive:
            worker.read(name, folder)  # which loads the reader's libraries again
        return answer

    @settings(
        max_examples=max(1, int(count * reader.share)),
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(files, reader.others()), booleans())
    def read_one(case, seals):
        file, content = case
        answer = read_damaged(file, content, seals)
        if answer["seconds"] >= LONGEST:  # the machine may have been busy with other things
            answer = read_damaged(file, content, seals)
        fault = fault_of(answer)
        counts["inputs"] += 1
        counts["seconds"] = max(counts["seconds"], answer["seconds"])
        counts["growth"] = max(counts["growth"], answer["growth"])
        if fault is not None:
            counts["failures"].append((file, content, fault))
        else:
            counts["refused" if answer["message"] else "taken"] += 1

    read_one()
    return counts


def fault_of(answer):
    """What is wrong with an answer of `Worker.read`, or None."""
    if answer["fault"] is None and answer["seconds"] > LONGEST:
        return f"took {answer['seconds']:.1f} s"
    if answer["fault"] is None and answer["growth"] > MOST_MEMORY:
        return f"took {answer['growth']:.0f} MiB"
    return answer["fault"]


def _put(path, content):
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)  # a mapped file keeps its content
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is DIRECTORY:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


def _restore(folder, files):
    """Makes a folder hold the good files, and nothing else."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            _put(path, content)
