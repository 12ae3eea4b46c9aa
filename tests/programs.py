"""Python programs in processes of their own, as a shell would start them.

Those on JAX are forked from a process that has imported Keras, which takes seconds of each otherwise. What
is the matter of a test that looks at imports, such a test starts itself.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.reference import SECONDS, exit_code, start_process


class Program:
    """A running `python ...` on JAX, with the interpreter's options `-c` and `-m`.

    Args:
        arguments: what would follow `python`.
        environment: variables beside this process' own.
    """

    def __init__(self, arguments, **environment):
        self._arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [Path(self._folder.name, name) for name in ("output", "errors")]
        environment = {**os.environ, "KERAS_BACKEND": "jax", **environment}
        self._process = start_process(_run, self._arguments, environment, os.getcwd(), self._printed)

    @property
    def pid(self):
        """The id of the process."""
        return self._process.pid

    def is_running(self):
        return self._process.is_alive()

    def send(self, number):
        """Sends a signal."""
        os.kill(self._process.pid, number)

    def printed(self):
        """What has come to standard error so far."""
        return self._printed[1].read_text(encoding="utf-8") if self._printed[1].exists() else ""

    def kill(self):
        """Sends SIGKILL and waits for the end."""
        self._process.kill()
        self._process.join()

    def finish(self, seconds=SECONDS):
        """Waits for the end; returns what `subprocess.run` would."""
        code = exit_code(self._process, seconds)
        printed = [path.read_text(encoding="utf-8") for path in self._printed]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self._arguments, code, *printed)


def run_python(arguments, backend="jax", **environment):
    """Runs a program to its end, which has to be a good one; returns what it printed to standard output."""
    if backend == "jax":
        done = Program(arguments, **environment).finish()
    else:
        environment = {**os.environ, "KERAS_BACKEND": backend, **environment}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def _run(arguments, environment, folder, printed):
    """What the forked process does; `multiprocessing` turns its exception or SystemExit into an exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in enumerate(printed, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    option, program, *others = arguments
    try:
        if option == "-c":
            sys.argv = ["-c", *others]
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [program, *others]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
