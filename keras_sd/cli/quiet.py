"""Suppression of libraries' log lines in commands. Their exceptions and warnings are kept."""

import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # for TensorFlow and JAX
_QUIET = "3"
# Keras imports them where they are installed, for what no command uses; it takes a fifth of a command's time.
_NOT_FOR_KERAS = ("matplotlib", "pandas", "sklearn")
# C++ log lines below errors (`I0000 00:00:17... file.cc:31] ...`), and the line before the first one.
_LOG_LINES = r"^[IW][0-9]{4} |^WARNING: All log messages before absl::InitializeLog"


def quiet_libraries():
    """Make libraries log errors only, unless another level is set, and import no more than a command needs.

    Call it before they are imported.
    """
    blocks = {"keras": lambda: without_packages(_NOT_FOR_KERAS)}
    if os.environ.setdefault(_LEVEL, _QUIET) == _QUIET:
        handler = logging.StreamHandler()
        handler.setLevel(logging.ERROR)
        logging.basicConfig(handlers=[handler])
        blocks["tensorflow"] = _without_log_lines  # its import logs before it reads the level
    sys.meta_path.insert(0, _ImportsInBlocks(blocks))


class _ImportsInBlocks:
    """An import hook that executes packages in blocks: name -> function that returns a context."""

    def __init__(self, blocks):
        self._blocks = blocks

    def find_spec(self, name, path=None, target=None):
        if name not in self._blocks:
            return None
        sys.meta_path.remove(self)
        try:
            specification = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # this call may only have asked whether it is installed
        if specification is not None and specification.loader is not None:
            execute = specification.loader.exec_module

            def exec_module(module):
                with self._blocks[name]():
                    execute(module)

            specification.loader.exec_module = exec_module
        return specification


@contextlib.contextmanager
def without_packages(names):
    """Let imports of these packages fail inside the block, if they are not yet imported."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextlib.contextmanager
def _without_log_lines():
    """Filter standard error of C++ code by another process, which passes on the output even after a crash."""
    grep = shutil.which("grep")
    if grep is None:
        yield
        return
    sys.stderr.flush()
    filter_ = subprocess.Popen(
        [grep, "--text", "--line-buffered", "--invert-match", "--extended-regexp", _LOG_LINES],
        stdin=subprocess.PIPE,
        stdout=2,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C must not end the filter
    )
    shown = os.dup(2)
    os.dup2(filter_.stdin.fileno(), 2)
    filter_.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child process may keep the pipe open
            filter_.wait(1)
