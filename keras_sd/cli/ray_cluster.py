"""Runs the tasks of a command on a Ray cluster, again where a worker dies.

Ray runs in a process of its own (`ray_program`), which speaks with this one in JSON lines. So nothing that
Ray prints, and no signal handler of it, reaches the command, and an address that does not answer can be left
after seconds; `ray.init` would try it for two minutes.

A worker is a process of the cluster that opens the data and the model once, as the command does, and then
takes task after task. A task that was begun twice must do no harm.
"""

import collections
import contextlib
import importlib
import json
import os
import platform
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import uuid
from pathlib import Path

import click

from keras_sd import interruption
from keras_sd.cli.command import decorated, refuse_unused
from keras_sd.cli.option_types import COUNT
from keras_sd.cli.program import message_of
from keras_sd.errors import UserError, require
from keras_sd.training.rendezvous import address_in

# Seconds for the cluster to answer. One that is started here may have to load everything from the disk.
_PATIENCE = 12.0
_PATIENCE_LOCAL = 120.0
_PATIENCE_ADDRESS = 3.0
_END_SECONDS = 4.0  # for Ray to end, below `interruption.GRACE`
# Longer names leave no room for Ray's sockets, whose names have at most 107 bytes.
_LONGEST_FOLDER = 40
_LONGEST_LINE = 200  # characters of what Ray says

# Variables of this process that the workers get: whatever affects the results, and where modules and caches
# are. An empty OMP_NUM_THREADS keeps Ray from setting it to 1.
_VARIABLES = (
    *("KERAS_BACKEND", "KERAS_SD_CACHE", "HF_HOME", "PYTHONPATH", "TF_CPP_MIN_LOG_LEVEL"),
    *("XLA_FLAGS", "TF_XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS"),
    *("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)

ray_options = decorated(
    click.option(
        "--ray",
        "ray_address",
        metavar="ADDRESS",
        help="Run on a Ray cluster: HOST:PORT of its head, `auto` for the one on this machine, or `local` to "
        "start one here. All its machines have to see the same folders and packages.",
    ),
    click.option(
        "--ray-workers",
        type=COUNT,
        show_default="one for each GPU of the cluster, or else for each machine",
        help="Processes on the Ray cluster. Each opens the model, and has a GPU if the cluster has any.",
    ),
)


def check_ray(options):
    """Raise UserError for an option without effect, or if Ray is not installed."""
    refuse_unused(["ray_workers"], options["ray_address"] is not None, "without --ray")
    if options["ray_address"] is not None:
        require("ray")


class RayCluster:
    """A connection to a Ray cluster. Use it in a `with` statement: leaving it, or a fault, ends the work.

    Args:
        address: `HOST:PORT`, "auto" or "local".
        workers: number of processes; None for one on each GPU, or on each machine if there is no GPU.

    Attributes:
        workers: number of processes.
        has_gpus: whether each of them has a GPU.

    Raises:
        UserError: the cluster does not answer, or cannot be used.
    """

    def __init__(self, address, workers=None):
        self._address = address
        _check_address(address)
        self._folder = Path(tempfile.mkdtemp(prefix="keras_sd_ray_"))
        self._messages = collections.deque()
        self._partial = b""
        self._process = None
        try:
            with interruption.phase("starting Ray" if address == "local" else "connecting with Ray"):
                self._start(workers)
        except BaseException:
            self.close()
            raise

    def _start(self, workers):
        short = len(str(self._folder)) <= _LONGEST_FOLDER
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "keras_sd.cli.ray_program"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process
            )
        settings = {"address": self._address, "workers": workers, "variables": _variables()}
        settings["folder"] = str(self._folder) if short else None
        self._send(settings)
        try:
            self._receive()  # once Ray is imported
            found = self._receive(_PATIENCE_LOCAL if self._address == "local" else _PATIENCE)
        except UserError as error:
            if self._address == "local":
                raise
            raise UserError(_no_answer(self._address, str(error).partition(". ")[0])) from error
        if found is None:
            self._process.kill()  # it would not end by itself
            raise UserError(_no_answer(self._address, self._last_line()))
        self.workers, self.has_gpus = found["workers"], found["has_gpus"]
        if not self.workers:
            raise UserError(
                f"ray_address {self._address}: the cluster has neither CPUs nor GPUs; add a machine"
            )
        print(f"Ray: {found['described']}", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the work; workers that were started end as well, and so does a cluster that was started."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, function):
        """Return the result of a function without arguments, computed by one worker.

        Args:
            function: its module and name, `module:name`.
        """
        self._send({"request": "call", "function": function})
        return self._receive()["result"]

    def run(self, opener, arguments, tasks, folder):
        """Run tasks, and yield what they return as they end.

        Args:
            opener: `module:name` of a function that each worker calls once, with `arguments`. It returns the
                function of a task.
            arguments, tasks: JSON values.
            folder: the folder that the tasks write to. Each worker makes sure that it sees it.

        Raises:
            UserError: of a worker, or a worker died again and again.
        """
        if not tasks:
            return
        marker = Path(folder).absolute() / f".ray-{uuid.uuid4().hex}"
        marker.touch()
        message = None
        try:
            request = {"opener": opener, "arguments": arguments, "marker": str(marker)}
            request["directory"] = os.getcwd()
            self._send({"request": "run", "open": request, "tasks": tasks})
            with interruption.phase("starting the Ray workers"):
                message = self._receive()
            while "result" in message:
                yield message["result"]
                message = self._receive()
        finally:
            if message is None or "result" in message:
                self.close()  # the workers are still at it
            marker.unlink(missing_ok=True)

    def _send(self, message):
        with contextlib.suppress(BrokenPipeError):  # it ended; the next message says why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, seconds=None):
        """Return the next message; None if it takes longer.

        Raises:
            UserError: the message is a fault, or Ray ended.
            RuntimeError: a worker has a bug.
        """
        descriptor = self._process.stdout.fileno()
        while not self._messages:
            if not select.select([descriptor], [], [], seconds)[0]:
                return None
            read = os.read(descriptor, 2**16)
            if not read:
                reason = self._last_line() or "it said nothing"
                raise UserError(
                    f"ray_address {self._address}: Ray ended unexpectedly ({reason}); start again"
                )
            *lines, self._partial = (self._partial + read).split(b"\n")
            self._messages += map(json.loads, lines)
        message = self._messages.popleft()
        if "bug" in message:
            raise RuntimeError(f"on a Ray worker:\n{message['bug']}")
        if "fault" in message:
            error = UserError(message["fault"])
            error.faults = message.get("faults", ())
            raise error
        return message

    def _last_line(self):
        """Return the last line that Ray has printed, without its time and place; empty if there is none."""
        lines = (self._folder / "log").read_text(errors="replace").split("\n")
        line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return re.sub(r"^\[[^]]*\] \S+: ", "", line)[:_LONGEST_LINE]


def _check_address(address):
    """Raise UserError if an address has another form, or nothing answers there."""
    if address in ("auto", "local"):
        return
    place = address_in(address)
    if place is None:
        raise UserError(
            f"ray_address {address}: no address of a cluster; give HOST:PORT of its head, auto or local"
        )
    try:
        socket.create_connection(place, _PATIENCE_ADDRESS).close()
    except OSError as error:
        raise UserError(_no_answer(address)) from error


def _no_answer(address, reason=""):
    told = f" ({reason})" if reason else ""
    return (
        f"ray_address {address}: no Ray cluster answers{told}; start one by `ray start --head`, run this "
        "command on one of its machines, or use `ray_address='local'`"
    )


def _variables():
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""), **variables}


def hide_accelerators():
    """Leave this machine's GPUs to the workers; call it before a backend is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"


# What follows runs in workers.


def open_worker(request):
    """Return the function of a task; the request is that of `RayCluster.run`.

    Raises:
        UserError: this machine does not see the folders, or what the opener raises.
    """
    if os.environ.get("OMP_NUM_THREADS") == "":
        del os.environ["OMP_NUM_THREADS"]
    name = platform.node()
    try:
        os.chdir(request["directory"])
    except OSError as error:
        raise UserError(_unseen(request["directory"], name)) from error
    if not os.path.exists(request["marker"]):
        raise UserError(_unseen(os.path.dirname(request["marker"]), name))
    return function_of(request["opener"])(request["arguments"])


def _unseen(folder, machine):
    return f"{folder}: not seen by the Ray worker on {machine}; use a folder that all machines share"


def function_of(name):
    """Return the function of a `module:name`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def failure_of(error):
    """Return the message for the command of an exception in a worker."""
    if isinstance(error, UserError):
        return {"fault": str(error), "faults": list(getattr(error, "faults", ()))}
    line = message_of(error)
    if line is not None:
        return {"fault": f"Ray worker on {platform.node()}: {line}"}
    return {"bug": "".join(traceback.format_exception(error))}
