"""Compilation ahead: a thread compiles what a function will call, while the main thread does other work.

The thread runs the function itself. Where it calls a program of `backend.jit`, the program is compiled for
the shapes of its inputs, and its results are zeros: nothing is computed, and no value of a variable is read.
So the later call, with the same shapes, finds its program.

TensorFlow compiles a program only where it runs it, which would take the memory of both at once, so this is
for JAX alone.
"""

import threading
from collections.abc import Callable

import keras

from keras_sd.backend import devices


class _Thread(threading.local):
    ahead = None  # the `CompilationAhead` whose thread this is


_thread = _Thread()


class _CancelledError(Exception):
    """Ends the thread between two programs."""


def compiles_ahead() -> bool:
    """Return whether programs can be compiled without running them: on JAX, in one process on one device."""
    is_alone = keras.distribution.distribution() is None and devices.process_count() == 1
    return keras.backend.backend() == "jax" and is_alone


def is_ahead() -> bool:
    """Return whether this thread compiles only; raise an exception that ends it if it was cancelled."""
    ahead = _thread.ahead
    if ahead is not None and ahead.is_cancelled:
        raise _CancelledError
    return ahead is not None


class CompilationAhead:
    """A thread that compiles the programs that a function calls.

    A fault in it is no fault of the program: the later call compiles, and meets the fault itself.

    Args:
        function: has no arguments, and no effect beside its result, which is meaningless.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self.is_cancelled = False
        # Not a daemon: a thread inside XLA would abort the process at its end.
        self._thread = threading.Thread(target=self._run, name="compilation ahead")
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is compiled."""
        self._thread.join()

    def cancel(self) -> None:
        """Let the thread end after the program that it is compiling."""
        self.is_cancelled = True

    def _run(self):
        _thread.ahead = self
        try:
            self._function()
        except Exception:
            pass
