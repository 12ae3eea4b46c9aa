"""The folder of a training run: its lock, its records, and atomic writing of sub-folders."""

import atexit
import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from keras_sd import interruption
from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json, read_json
from keras_sd.files.writing import replaced, sync, write_json

LOCK = ".lock"
MODEL = "model"
DESCRIPTION = "run.json"
OPTIONS = "options.toml"
RECORD = Path("logs") / "record.json"
_CHECKPOINT = re.compile(r"checkpoint-\d+")

_locks = {}  # folder -> file descriptor of the lock that this process holds


def claim_output_dir(output_dir, resume_from_checkpoint=None, *, lock=True):
    """Create and lock a run folder for this process, before any long work; imports no backend.

    A command calls this at its very start, and `Trainer` calls it again, which is harmless.

    Args:
        output_dir: the run folder.
        resume_from_checkpoint: None for a new run, "latest", or the path or name of a checkpoint; only its
            manifest is read here.
        lock: False only checks the folder: of several processes only the first one locks it.

    Returns:
        The folder of the checkpoint to resume from, or None.

    Raises:
        UserError: another process uses the folder, it is not writable, it holds an earlier run although
            `resume_from_checkpoint` is None, or there is nothing to resume.
    """
    if resume_from_checkpoint is not None and not str(resume_from_checkpoint).strip():
        raise UserError(
            "resume_from_checkpoint: is empty; give 'latest' or a checkpoint's path, or leave it out"
        )
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another `output_dir`")
    checkpoint = None
    if resume_from_checkpoint is None:
        _check_new(folder)
    else:
        checkpoint = find_checkpoint(folder, resume_from_checkpoint)
    if lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to: {error.strerror}; choose another `output_dir`"
            ) from error
    return checkpoint


def is_checkpoint_name(name):
    """Return whether a name in a run folder is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


def release_output_dir(output_dir):
    """Unlock a run folder, and remove it if it is empty."""
    folder = Path(output_dir).resolve()
    descriptor = _locks.pop(folder, None)
    if descriptor is None:
        return
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()  # fails unless the folder is empty
    os.close(descriptor)


@atexit.register
def _release_all():
    for folder in list(_locks):
        release_output_dir(folder)


interruption.before_abrupt_exit(_release_all)


def _check_new(folder):
    if any(_CHECKPOINT.fullmatch(path.name) for path in children(folder)):
        raise UserError(
            f"{folder}: holds checkpoints of an earlier run; "
            "continue with `resume_from_checkpoint='latest'` or choose another `output_dir`"
        )
    if (folder / MODEL).exists():
        raise UserError(
            f"{folder / MODEL}: is the model of an earlier run; choose another `output_dir` or move it away"
        )


def find_checkpoint(output_dir, request):
    """Return the checkpoint folder that `resume_from_checkpoint` means; only manifests are read.

    Raises:
        UserError: there is none.
    """
    from keras_sd.training.checkpoints import check_manifest

    folder = Path(output_dir)
    if request == "latest":
        found = []
        for path in children(folder):
            name = path.name.removeprefix(".").removesuffix(".replaced")
            if _CHECKPOINT.fullmatch(name):
                with contextlib.suppress(UserError):
                    check_manifest(path)
                    found.append((int(name.rpartition("-")[2]), path))
        if found:
            return max(found)[1]
        raise UserError(
            f"{folder}: no valid checkpoint to resume from; "
            "check `output_dir` or start without `resume_from_checkpoint`"
        )
    for place in (Path(request), folder / request):
        if place.is_dir():
            check_manifest(place)
            return place
    raise UserError(f"{request}: no such checkpoint folder; give its path or 'latest'")


def children(folder):
    """Return the paths in a folder; none if there is no such folder."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _lock(folder):
    """Lock the folder's lock file and write this process id into it; the lock ends with the process."""
    place = folder.resolve()
    if place in _locks:
        return
    while True:
        descriptor = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "another one"
            os.close(descriptor)
            raise UserError(
                f"{folder}: in use by process {owner}; wait for it or choose another `output_dir`"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            # The previous owner may have removed the file between our two calls.
            if os.fstat(descriptor).st_ino == os.stat(place / LOCK).st_ino:
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _locks[place] = descriptor


_description = None  # description of the run that this process' command starts
_given = ""  # the options that it was given, as TOML


@contextlib.contextmanager
def described(method, options, given):
    """Inside the block, a run that starts or resumes records its command in `run.json` and `options.toml`.

    Args:
        method: the training command's name.
        options: the command's options, as JSON values and tuples.
        given: those that the user has given, as TOML.
    """
    global _description, _given
    _given = given
    _description = {"version": 1, "method": method, "directory": os.getcwd(), "options": options}
    try:
        yield
    finally:
        _description = None


def is_described():
    """Return whether a training command of this process has described its run."""
    return _description is not None


def changed_options(run_folder, names):
    """Return which options of this process' command differ from those that the run was started with.

    Args:
        run_folder: the run folder; without a description, by an older version, nothing is known.
        names: of the options.

    Returns:
        A dictionary of name -> (value before, value now), both as JSON values; None is an option not given.
    """
    if _description is None:
        return {}
    try:
        before = read_json(Path(run_folder) / DESCRIPTION)["options"]
    except (UserError, OSError, KeyError, TypeError):  # a user may have edited it
        return {}
    now = parse_json(json.dumps(_description["options"], default=str), "options")
    return {
        name: (before[name], now[name])
        for name in names
        if name in before and name in now and before[name] != now[name]
    }


def write_description(run_folder):
    """Write the description of the run, if a command started it."""
    if _description is not None:
        write_json(Path(run_folder) / DESCRIPTION, _description)
        with replaced(Path(run_folder) / OPTIONS) as staging:
            # Names of files may hold bytes that are no text.
            staging.write_text(_given, encoding="utf-8", errors="backslashreplace")


class RunRecord:
    """Records the step at which a run was last evaluated and exported; a resumed run does what is missing.

    Args:
        run_folder: the run folder.
        initial_step: the step to resume from; later records are ignored. With 0 all records are.
    """

    def __init__(self, run_folder, initial_step=0):
        self._path = Path(run_folder) / RECORD
        self._steps = {}
        with contextlib.suppress(UserError):  # without a record everything is done again
            if initial_step:
                written = read_json(self._path, dict[str, int])
                self._steps = {name: min(step, initial_step) for name, step in written.items()}

    def last(self, name):
        """Return the last step at which something was done, -1 for none."""
        return self._steps.get(name, -1)

    def write(self, name, step):
        """Record that something was done at a step."""
        self._steps[name] = step
        write_json(self._path, self._steps)


def write_whole_folder(target, write):
    """Create a folder atomically by `write(folder)`, replacing an existing one."""
    target = Path(target)
    restore_folder(target)
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
    try:
        staging.mkdir(parents=True)
        write(staging)
        for path in staging.rglob("*"):
            sync(path)
        replaced = _replaced(target)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        restore_folder(target)
        raise


def restore_folder(target):
    """Restore a folder whose replacement was interrupted by a kill."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).rename(target)


def _replaced(target):
    return target.with_name(f".{target.name}.replaced")
