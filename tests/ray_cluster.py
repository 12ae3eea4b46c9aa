"""A Ray cluster of two workers on this machine, for tests of commands on Ray."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 300
OF_THIS_PROCESS = {"RAY_CLUSTER_OF_TEST": str(os.getpid())}


@contextlib.contextmanager
def started_cluster(*options):
    """Starts a cluster as `ray start` does, and gives its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    # Not in pytest's folders, whose names are too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--port", str(port), "--num-cpus", "2", "--object-store-memory", str(80 * 2**20)]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *options],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **OF_THIS_PROCESS, "RAY_AUTH_MODE": "disabled"},
            )
        try:
            end = time.monotonic() + SECONDS
            while b"Ray runtime started" not in log.read_bytes():
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def processes(title="MapWorker"):
    """The ids of the cluster's processes, by the beginning of their title."""
    return [number for number, name in _titles() if name.startswith(f"ray::{title}")]


def kill_a_worker(has_begun):
    """Kills a worker, with a task in its hands, once there are results."""
    end = time.monotonic() + SECONDS
    while not (has_begun() and (found := [number for number in processes() if _is_at_work(number)])):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)


def _is_at_work(number):
    """Whether a worker runs a method, which Ray adds to its title."""
    return dict(_titles()).get(number, "").partition(" ")[0].endswith(".submit")


def _titles():
    """The ids and titles of the processes of clusters that were started here."""
    mark = "=".join(*OF_THIS_PROCESS.items()).encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of another user, or ended
            if mark in (path / "environ").read_bytes().split(b"\0"):
                title = (path / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(path.name), title.decode(errors="replace")
