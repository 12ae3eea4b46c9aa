"""What has been done so far, a line for each image, safe against a kill at any moment."""

import json
import os
import warnings

import filelock

from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, parse_json, read_bytes
from keras_sd.files.writing import utf8

# What a run that was killed has left running notices it within a batch.
_PATIENCE = 60
_LARGEST_FILE = 512 * MIB  # captions of some millions of images


class Journal:
    """A file of JSON lines that one process appends to. Use it in a `with` statement.

    A line that was cut off by a kill is taken away; all others were synced to disk.

    Raises:
        UserError: another process has it open.
    """

    def __init__(self, path):
        self.path = path
        self._lock = filelock.FileLock(f"{path}.lock")

    def __enter__(self):
        try:
            try:
                self._lock.acquire(timeout=min(_PATIENCE, 1))
            except filelock.Timeout:
                line = f"{self.path}: another run is at work on this shard; waiting {_PATIENCE} s for its end"
                warnings.warn(line, stacklevel=2)
                self._lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout as error:
            raise UserError(
                f"{self.path}: another run is at work on this shard; wait for it, or choose another shard"
            ) from error
        self._file = open(self.path, "ab")
        end = len(_whole_lines(self.path))
        if end < self._file.tell():
            self._file.truncate(end)
        return self

    def __exit__(self, *_):
        self._file.close()
        self._lock.release()

    def append(self, entries):
        """Adds dictionaries, and returns once they are on disk."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self._file.write(utf8(lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_journal(path, shape=dict):
    """The entries, in order; nothing if there is no such file. The last line may be just being written.

    Lines that are no entries of the shape are left out with a warning: what they said is said again.
    """
    entries, faults = [], []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], start=1):
        try:
            entries.append(parse_json(line, f"line {number}", shape, remedy="", file_names=True))
        except UserError as error:
            faults.append(str(error).removesuffix("; "))
    if faults:
        warnings.warn(
            f"{path}: {len(faults)} damaged lines are left out, the first is {faults[0]}", stacklevel=2
        )
    return entries


def count_lines(folder):
    """How many lines the journals of captions in a folder have, which costs less than reading them."""
    return sum(_whole_lines(path).count(b"\n") for path in folder.glob("captions-*.jsonl"))


def _whole_lines(path):
    try:
        text = read_bytes(path, _LARGEST_FILE, "move it away; what it says is said again")
    except FileNotFoundError:
        text = b""
    return text[: text.rfind(b"\n") + 1]
