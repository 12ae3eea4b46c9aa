"""Ctrl-C and SIGTERM: a program ends soon, without a traceback, with exit code 130 or 143.

Python calls signal handlers between two bytecode instructions only, so not while XLA compiles, which may take
minutes. So a thread receives the signals as well (`signal.set_wakeup_fd`) and ends the process after `GRACE`
seconds, unless it is in a section that has to finish: a training step, or the saving of a checkpoint.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds for the process to end by itself
_SECOND_GRACE = 1.0  # ... after a second Ctrl-C
_PRINT_AFTER = 2.0  # seconds after which a phase is printed


class _State:
    """The state of the main thread, shared with the watching thread."""

    def __init__(self):
        self.program = None  # its name, while it is watched
        self.command = None  # returns the command that resumes it
        self.received = None  # the last signal's number
        self.is_lost = False  # whether Python ignored a handler's exception
        self.has_to_finish = False
        self.endable_since = time.monotonic()
        self.phase = None
        self.printed = set()  # phases that have been printed
        self.timer = None
        self.run_folder = None
        self.kept = None  # what stays of a command that is no training, and goes on if it is repeated
        self.checkpoints_before = None  # set if an older checkpoint was resumed


_state = _State()


def received():
    """Return the number of the signal that asked the program to end, or None."""
    return _state.received


def note(number):
    """Remember a signal, for a handler that lets the program continue for a while."""
    _state.received = number


def exit_code(number):
    """Return the exit code of a program ended by a signal, as in shells."""
    return 128 + number


def has_to_finish():
    """Return whether the program is in a section that a signal must not interrupt."""
    return _state.has_to_finish


def set_has_to_finish(has_to_finish):
    """Set whether the program is in a section that a signal must not interrupt."""
    _state.has_to_finish, _state.endable_since = has_to_finish, time.monotonic()


@contextlib.contextmanager
def interruptible():
    """Allow a signal to end the process inside the block, after the grace period."""
    before = _state.has_to_finish
    set_has_to_finish(False)
    try:
        yield
    finally:
        set_has_to_finish(before)


def set_run_folder(folder, resumed=None):
    """Set the run folder whose training can be resumed; None for no training.

    Args:
        resumed: the argument with which this training was resumed, if it was.
    """
    _state.run_folder = None if folder is None else Path(folder)
    _state.checkpoints_before = None if resumed in (None, "latest") else _checkpoints()


def _checkpoints():
    """Return (name, inode) of each checkpoint; a replaced one has another inode."""
    if not _state.run_folder.is_dir():
        return set()
    with os.scandir(_state.run_folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith("checkpoint-")}


def before_abrupt_exit(function):
    """Register a function to call before the process ends without Python's cleanup."""
    _before_abrupt_exit.append(function)


_before_abrupt_exit = []


@contextlib.contextmanager
def phase(name, *, in_commands=False):
    """Print the name of a phase on standard error if it takes more than two seconds.

    In other threads than the main one it does nothing.

    Args:
        in_commands: print it in commands only, not in users' Python programs.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or (in_commands and _state.program is None):
        yield
        return
    before = _state.phase
    _state.printed.discard(name)
    _start_phase(name)
    try:
        yield
    finally:
        _start_phase(before)  # which continues


def first_is_phase(name, elements):
    """Yield from an iterator whose first element takes long; computing that one is a phase of commands."""
    with phase(name, in_commands=True):
        first = next(elements)
    yield first
    yield from elements


def tell(line):
    """Print a line on standard error, in commands only."""
    if _state.program is not None:
        from keras_sd.progress import print_above_bars

        print_above_bars(line)


def _start_phase(name):
    if _state.timer is not None:
        _state.timer.cancel()
    _state.phase, _state.timer = name, None
    if name is not None and name not in _state.printed:
        _state.timer = threading.Timer(_PRINT_AFTER, _print_phase, (name,))
        _state.timer.daemon = True
        _state.timer.start()


def _print_phase(name):
    from keras_sd.progress import print_above_bars

    _state.printed.add(name)
    print_above_bars(name)


def set_kept(kept):
    """Set what stays of a command that goes on when it is repeated, such as "shards in FOLDER stay"."""
    _state.kept = kept


def command_to_resume():
    """Return the command that resumes this program's training; None without a command or a checkpoint."""
    if _state.program is None or _state.run_folder is None:
        return None
    checkpoints = _checkpoints()
    # The latest checkpoint may be of another branch than the resumed one.
    return _state.command(checkpoints != _state.checkpoints_before) if checkpoints else None


def how_to_resume():
    """Return one line on how to go on with an interrupted command; None if it has to begin anew."""
    name = signal.Signals(_state.received).name
    during = f" while {_state.phase}" if _state.phase else ""
    if _state.run_folder is None:
        if _state.kept is None:
            return None
        return f"{name}: ended{during}; {_state.kept}; go on with: {_state.command(False)}"
    command = command_to_resume()
    if command is None:
        return f"{name}: ended{during}; there is no checkpoint yet, start again"
    model = _state.run_folder / "model"
    if model.is_dir():
        return f"{name}: ended{during}; the model is in {model}; finish what is left with: {command}"
    return f"{name}: ended{during}; resume with: {command}"


@contextlib.contextmanager
def watching(program, command):
    """Raise `KeyboardInterrupt` on Ctrl-C and `SystemExit` on SIGTERM inside the block.

    If such an exception cannot be raised in time, the watching thread ends the process. This works in the
    main thread only.

    Args:
        program: the program's name as typed.
        command: `command(from_latest)` returns a command that resumes this training: from the latest
            checkpoint, or in the same way as this process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.__init__()
    _state.program, _state.command = program, command
    _begin()
    try:
        yield
    finally:
        _end()
        _state.program = None


_undo = None  # ends the watching


def _begin():
    """Begin to watch: set the handlers and start the thread."""
    global _undo
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_hook, sys.unraisablehook = sys.unraisablehook, _show_or_raise_again
    handlers = {number: signal.signal(number, _raise) for number in SIGNALS}
    old_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader,), daemon=True)
    thread.start()

    def undo():
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = old_hook
        os.close(writer)  # which ends the thread
        thread.join()

    _undo = undo


def _end():
    global _undo
    if _undo is not None:
        _undo()
    _undo = None


def is_watching():
    """Return whether this is a program inside `watching`."""
    return _undo is not None


def program():
    """Return the name of the program inside `watching`, as typed; otherwise None."""
    return _state.program


def fork():
    """Fork a program inside `watching`: a copy goes on as this program, and this process can wait for it.

    Ctrl-C and SIGTERM that this process receives are passed on to the copy. It has a process group of its
    own, so that Ctrl-C reaches it once, and ends with this process, however that ends.

    Returns:
        The process id of the copy; in the copy None.
    """
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _end()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no other thread is running now, whatever a library supposes
        child = os.fork()
    if child:
        os.close(reader)  # and the other end stays open as long as this process lives

        def pass_on(number, frame):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                raise SystemExit(exit_code(number)) from None

        for number in SIGNALS:
            signal.signal(number, pass_on)
    else:
        os.close(writer)
        os.setpgid(0, 0)
        threading.Thread(target=_end_with, args=(reader,), daemon=True).start()
        _begin()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return child or None


def _end_with(reader):
    """End this process and its own children when the other end of a pipe is closed."""
    os.read(reader, 1)
    os.killpg(0, signal.SIGKILL)


def end_abruptly(code):
    """End the process without Python's cleanup, in which libraries may wait for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _exit(code)


def _raise(number, frame):
    _state.received = number
    if _is_importing(frame):
        # Compiled modules abort the process with a traceback at an unexpected exception.
        _end_at_once(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def _is_importing(frame):
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _show_or_raise_again(unraisable, show=sys.unraisablehook):
    """Raise a handler's exception again if it was lost in a callback of the garbage collector."""
    if _state.received is not None and isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
        _state.is_lost = True
    else:
        show(unraisable)


def _watch(reader):
    """Run the watching thread: wait for signals, and end the process after the grace period."""
    first = second = None  # (number, time) of the first signal, and the time of a second Ctrl-C
    repeated = 0  # signals sent by this thread
    while True:
        # A closed pipe is ready to read, too.
        if select.select([reader], [], [], None if first is None else 0.1)[0]:
            numbers = os.read(reader, 64)
            if not numbers:
                os.close(reader)
                return
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if repeated:
                    repeated -= 1
                    continue
                if first is not None and number == signal.SIGINT:
                    second = time.monotonic()
                first = first or (number, time.monotonic())
        if first is not None:
            number, since = first
            if _state.is_lost:
                _state.is_lost, repeated = False, repeated + 1
                os.kill(os.getpid(), number)
            waited = 0 if _state.has_to_finish else time.monotonic() - max(since, _state.endable_since)
            if waited > GRACE or (second is not None and time.monotonic() - second > _SECOND_GRACE):
                _end_at_once(number)


def _end_at_once(number):
    _state.received = number
    words = how_to_resume()
    if words is not None:
        # Not `sys.stderr`, which the main thread may be using.
        os.write(2, f"\n{_state.program}: {words}\n".encode())
    _exit(exit_code(number))


def _exit(code):
    for function in _before_abrupt_exit:
        with contextlib.suppress(Exception):
            function()
    os._exit(code)


def _forget_in_child():
    # A child process has no watching thread, and must not write its signals into the parent's pipe.
    if _state.program is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number, handler in zip(SIGNALS, (signal.default_int_handler, signal.SIG_DFL), strict=True):
                signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget_in_child)
