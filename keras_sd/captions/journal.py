"""An append-only file of results, one JSON line for each image, safe against a kill at any moment."""

import json
import os
import warnings
from typing import NotRequired

import filelock
from typing_extensions import TypedDict

from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, parse_json, read_bytes
from keras_sd.files.writing import utf8

# Seconds to wait for a lock: a worker whose parent was killed ends within one batch.
_PATIENCE = 60
_LARGEST_FILE = 512 * MIB  # captions of some millions of images


class Entry(TypedDict):
    """The shape of a line in a journal of captions: the caption of an image, or why it has none."""

    file_name: str
    text: NotRequired[str]
    fault: NotRequired[str]


class Journal:
    """A JSON Lines file that one process appends to. Use it in a `with` statement.

    Opening removes a last line that a kill has cut off. All other lines were synced to disk.

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
                line = f"{self.path}: another run is working on this shard; waiting {_PATIENCE} s for its end"
                warnings.warn(line, stacklevel=2)
                self._lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout as error:
            raise UserError(
                f"{self.path}: another run is working on this shard; wait for it, or choose another shard"
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
        """Add dictionaries, and return once they are on disk."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self._file.write(utf8(lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_journal(path, shape=dict):
    """Return the entries in order; an empty list if there is no such file.

    An incomplete last line is ignored, as another process may be writing it. Damaged lines are left out with
    a warning, and their images are captioned again.
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
    """Return the number of lines in a folder's journals of captions, without parsing them."""
    return sum(_whole_lines(path).count(b"\n") for path in folder.glob("captions-*.jsonl"))


def _whole_lines(path):
    try:
        text = read_bytes(path, _LARGEST_FILE, "move it away; its images are then captioned again")
    except FileNotFoundError:
        text = b""
    return text[: text.rfind(b"\n") + 1]
