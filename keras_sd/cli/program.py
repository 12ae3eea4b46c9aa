"""Running a command as a program: exit codes, errors and warnings in one line, Ctrl-C."""

import copy
import functools
import gc
import os
import re
import shlex
import shutil
import sys
import warnings

from keras_sd import __version__, interruption
from keras_sd.cli.quiet import quiet_libraries
from keras_sd.errors import UserError, check_backend, is_installed, missing_package, os_fault

_RESUME = "--resume-from-checkpoint"
# TensorFlow does not go on without a cache that it was given.
_UNWRITTEN_PROGRAM = re.compile(
    r"xla_compile_cache\S*; (No space left on device|Disk quota exceeded|Permission denied|Read-only [a-z ]+)"
)
_MOST_FAULTS = 20  # of a data set, that are named


def run_command(command, program):
    """Run a click command as a program, and exit. It gets an option --version.

    Exit codes: 0 done; 2 bad input (`UserError`, wrong usage, insufficient memory), one line on stderr; 130
    and 143 ended by Ctrl-C and SIGTERM. Any other exception is a bug and keeps its traceback. A `UserWarning`
    is one line on stderr. Of processes that train together each has the exit code of the first that failed
    (`training.watcher`).

    Args:
        command: the `click.Command`.
        program: its name as typed, for messages and help.
    """
    with interruption.watching(program, functools.partial(started_again, program, sys.argv[1:])):
        try:
            sys.exit(_run(command, program))
        except BaseException as error:
            # A library may turn the exception of a signal into any other.
            bad_input = isinstance(error, SystemExit) and error.code == 2
            if interruption.received() is None or bad_input:
                _leave_peers(error)
                raise
            words = interruption.how_to_resume()
            if words is not None:
                print(f"{program}: {words}", file=sys.stderr)
            sys.exit(interruption.exit_code(interruption.received()))


def _leave_peers(error):
    """End this process at once if it has failed and trained with others, which JAX would wait for."""
    if "keras_sd.backend" not in sys.modules:
        return
    from keras_sd import backend

    is_exit = isinstance(error, SystemExit)
    if not backend.is_joined() or (is_exit and not error.code):
        return
    if not is_exit:
        sys.excepthook(type(error), error, error.__traceback__)
    interruption.end_abruptly(error.code if is_exit and isinstance(error.code, int) else 1)


def _run(command, program):
    """Run the command and return the exit code; raise `SystemExit` or the exception of a bug."""
    import click  # here, so that the library's exceptions need no command line

    if not any(parameter.name == "version" for parameter in command.params):
        command = copy.copy(command)  # within another program it has none
        command.params = list(command.params)
        click.version_option(__version__, prog_name=program)(command)

    warnings.showwarning = functools.partial(_warn, program, warnings.showwarning)
    if hasattr(sys.stdout, "reconfigure"):  # file names that are not UTF-8 are printed as their bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    quiet_libraries()
    collect_garbage_less_often()
    if not is_installed("tensorflow") and is_installed("jax"):
        os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        check_backend(os.environ.get("KERAS_BACKEND", "tensorflow"))
        code = command.main(prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        _leave(program, f"{error.format_message().rstrip('.')}; see {path} --help")
    except (UserError, click.ClickException) as error:
        at_once = error.__cause__ is not None and is_out_of_memory(error.__cause__)
        _leave(program, str(error), at_once=at_once, faults=getattr(error, "faults", ()))
    except click.Abort:
        return 130
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        _leave(program, message, at_once=is_out_of_memory(error))
    return code if isinstance(code, int) else 0


def collect_garbage_less_often():
    """Let Python look for cycles of unused objects after 50,000 new objects, not after 700.

    Importing and tracing make millions of objects that stay. Looking through them took 5 to 20 % of the
    processor time of `generate` and `train`; the memory that they need at most was the same.
    """
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


def message_of(error):
    """Return the line for an exception that the user can correct, or None for a bug.

    A `UserError` is no concern of it.
    """
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error.name)
    if isinstance(error, OSError) and error.errno is not None:
        return os_fault(error)
    unwritten = _UNWRITTEN_PROGRAM.search(str(error))
    if unwritten is not None:
        return (
            f"KERAS_SD_CACHE: TensorFlow cannot keep a compiled program ({unwritten[1]}); free space, name "
            "another folder, or off"
        )
    if is_out_of_memory(error):
        return (
            "out of memory; use half precision (--dtype bfloat16, in training --mixed-precision bf16), a "
            "smaller batch size or smaller images (in training a smaller --resolution)"
        )
    return None


def started_again(program, arguments, from_latest):
    """Return a command line that resumes this command's training, with its interpreter and its backend.

    Args:
        program, arguments: of this command.
        from_latest: resume from the latest checkpoint, or as this command did.
    """
    if from_latest:
        arguments = [*_without_resumption(arguments), _RESUME, "latest"]
    backend = os.environ.get("KERAS_BACKEND")
    words = [f"KERAS_BACKEND={shlex.quote(backend)}"] if backend else []
    name, _, rest = program.partition(" ")
    if not _is_of_this_environment(name):
        rest = rest if name == "python" else "-m keras_sd"  # which is what the other program is
        name = "python" if _is_of_this_environment("python") else shlex.quote(sys.executable)
    return " ".join([*words, name, *([rest] if rest else []), shlex.join(arguments)])


def _without_resumption(arguments):
    skip = False
    for argument in arguments:
        if not skip and argument != _RESUME and not argument.startswith(f"{_RESUME}="):
            yield argument
        skip = not skip and argument == _RESUME


def _is_of_this_environment(program):
    """Return whether a shell finds a program of that name in the folder of this interpreter.

    Links are not resolved: the interpreters of all environments may be links to the same file.
    """
    found = shutil.which(program)
    return found is not None and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)


def is_out_of_memory(error):
    """Return whether an exception means a failed allocation, without importing a backend."""
    if "keras_sd.backend" in sys.modules:
        from keras_sd import backend

        return backend.is_out_of_memory(error)
    return isinstance(error, MemoryError)


def _warn(program, show, message, category, *place):
    """Print a `UserWarning` in one line, and other warnings as Python does."""
    if issubclass(category, UserWarning):
        from keras_sd.cli.command import in_flags

        print(f"{program}: warning: {_line(in_flags(str(message)))}", file=sys.stderr)
    else:
        show(message, category, *place)


def _leave(program, message, at_once=False, faults=()):
    """Print the first of several faults, each in a line, and an error; exit with code 2.

    `at_once` skips all cleanup: after a failed allocation TensorFlow frees some memory twice, which would
    abort the program.
    """
    for fault in faults[:_MOST_FAULTS]:
        print(f"{program}: {_line(fault)}", file=sys.stderr)
    if len(faults) > _MOST_FAULTS:
        print(f"{program}: ... and {len(faults) - _MOST_FAULTS} more", file=sys.stderr)
    print(f"{program}: error: {_line(message)}", file=sys.stderr)
    if at_once and "tensorflow" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def _line(text):
    """Return a message in one line. Names of files may hold control characters, which terminals obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], " ".join(text.split()))
