"""Encodings of images and captions on disk, in files ("shards") of the ArrayRecord format, which Grain reads.

A shard holds up to `SHARD_SIZE` arrays of one shape, one in each record, and in its last record a header in
JSON and the keys of its arrays. An array's key is a SHA-256 of all that it depends on, and a shard's name is
one of its keys. So two runs that fill one folder at once write the same bytes under the same name, and a
shard that is there is never written again. Each appears whole, by one rename.

The file `catalogue.npz` repeats the keys of all shards with their sizes and times of change, so that opening
a folder reads one file. A shard that it does not describe is read and checked once. This module imports no
Keras: threads and workers that read data use it.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes  # noqa: F401  (registers bfloat16 in NumPy)
import numpy as np
import numpy.typing as npt
from annotated_types import Interval, Len
from typing_extensions import TypedDict

from keras_sd.errors import FULL_DISK, UserError, os_errors_in_one_line, require
from keras_sd.files.json_files import parse_json
from keras_sd.files.writing import replaced, write_errors_in_one_line

SHARD_SIZE = 64
"""Arrays in a shard. A killed run loses at most one; of 512 px it takes 8 MiB in float32."""

DTYPES = ("float32", "float16", "bfloat16")

_CATALOGUE = "catalogue.npz"
_NAME = re.compile(r"[a-z]+-[0-9a-f]{32}\.arrayrecord")
_VERSION = 1
_KEY = np.dtype("S32")
# Random access reads one record at a time. Noise-like numbers hardly compress: zstd takes off a twelfth, and
# reading takes four times as long.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"
_MOST_READERS = 256  # open files; a process may usually have 1024


class Header(TypedDict):
    """The schema of a shard's header.

    `kind` is "latents", "text" or "masks"; `model` names the weights and the precision that computed the
    arrays, and is empty for masks.
    """

    version: Literal[1]
    kind: Annotated[str, Len(1, 16)]
    model: Annotated[str, Len(0, 256)]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[list[Annotated[int, Interval(ge=1, le=2**24)]], Len(1, 8)]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A whole shard: its file as it was when it was checked, its header and its keys."""

    name: str
    size: int
    changed: int  # modification time in nanoseconds
    header: str
    keys: npt.NDArray[np.bytes_]


def keys_of(common: object, parts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return the keys of arrays, one SHA-256 each.

    Args:
        common: JSON value of what all arrays depend on.
        parts: what each of them depends on besides.

    Returns:
        Array of 32 bytes each, `(n,)`.
    """
    start = hashlib.sha256(json.dumps([_VERSION, common], sort_keys=True).encode() + b"\n")
    digests = bytearray()
    for part in parts:
        one = start.copy()
        one.update(part.encode("utf-8", "surrogatepass"))
        digests += one.digest()
    return np.frombuffer(bytes(digests), _KEY)


class EncodingStore:
    """A folder of shards.

    Args:
        folder: created if necessary, private to the user.

    Raises:
        UserError: the folder cannot be read or created, or the package array_record is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        require("array_record")
        self.folder = Path(folder)
        with os_errors_in_one_line(self.folder):
            if not self.folder.is_dir():
                # The other processes of a run may make it at the same time.
                self.folder.mkdir(0o700, parents=True, exist_ok=True)
        self._shards: dict[str, _Shard] = {}
        self._lock = threading.Lock()
        self._readers: dict[str, Any] = {}
        self._is_saved = True
        self._index()
        self.refresh()

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._keys)

    def check_writable(self) -> None:
        """Raise a UserError if no file can be created in the folder."""
        with write_errors_in_one_line(self.folder), tempfile.TemporaryFile(dir=self.folder):
            pass

    def refresh(self) -> None:
        """Look for shards that other processes have written or removed."""
        known = self._shards or self._read_catalogue()
        found, unknown = {}, []
        with os_errors_in_one_line(self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                if not _NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    state, shard = entry.stat(), known.get(entry.name)
                    if shard and (shard.size, shard.changed) == (state.st_size, state.st_mtime_ns):
                        found[entry.name] = shard
                    else:
                        unknown.append(entry.name)
        damaged = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for name, shard in zip(unknown, pool.map(self._checked, unknown), strict=True):
                if isinstance(shard, _Shard):
                    found[name] = shard
                elif shard is not None:
                    damaged.append(f"{name} ({shard})")
        if damaged:
            warnings.warn(
                f"{self.folder}: {len(damaged)} damaged {'shard is' if len(damaged) == 1 else 'shards are'} "
                f"encoded anew, the first is {damaged[0]}",
                stacklevel=2,
            )
        self._is_saved = self._is_saved and found.keys() == known.keys() and not unknown
        if found.keys() != self._shards.keys() or unknown:
            self._shards, self._readers = found, {}
            self._index()

    def _checked(self, name: str) -> _Shard | str | None:
        """Read a shard as a whole; remove it, and return its fault, if it is damaged; None if it is gone.

        Raises:
            UserError: the system cannot read it, or another version of this package has written it.
        """
        path = self.folder / name
        try:
            return _read_shard(path)
        except FileNotFoundError:
            return None
        except (_Damage, RuntimeError):
            # The reader's exceptions do not tell damage from a fault of the system.
            _read_bytes(path)
        try:
            return _read_shard(path)
        except (_Damage, RuntimeError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            return str(error).partition(";")[0].partition(" (computed")[0].removeprefix(f"{path}: ")

    def _index(self) -> None:
        """Sort the keys of all shards for `find`."""
        self._names = sorted(self._shards)
        shards = [self._shards[name] for name in self._names]
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self._keys = np.concatenate([np.empty(0, _KEY), *(shard.keys for shard in shards)])
        self._order = np.argsort(self._keys, kind="stable")
        self._sorted = self._keys[self._order]

    def find(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """Return the number of each key's array, for `read`; -1 for keys that are not there."""
        if len(self._names) != len(self._shards):
            self._index()
        if not len(self._sorted):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[places] == keys, self._order[places], -1)

    def read(self, number: int) -> npt.NDArray[np.float32]:
        """Return an array in float32; several threads may call this.

        Raises:
            UserError: its shard was damaged or removed since it was checked.
        """
        place = int(np.searchsorted(self._starts, number, "right")) - 1
        name = self._names[place]
        dtype, shape = _layout(self._shards[name].header)
        position, path = int(number - self._starts[place]), self.folder / name
        try:
            array = np.frombuffer(self._reader(name).read([position])[0], dtype).reshape(shape)
        except (RuntimeError, ValueError, OSError) as error:
            array = np.frombuffer(self._read_again(path, position, error), dtype).reshape(shape)
        return array.astype(np.float32, copy=dtype != np.float32)

    def _read_again(self, path: Path, position: int, error: Exception) -> bytes:
        """Return a record by a new reader; remove the shard if that fails and the system can read the file.

        Raises:
            UserError: the shard is damaged or gone, or the system cannot read it.
        """
        with self._lock:
            self._readers.pop(path.name, None)
        if not path.exists():
            raise UserError(f"{path}: no longer there; start again, and it is encoded anew") from error
        _read_bytes(path)
        try:
            record: bytes = _open(path).read([position])[0]
        except (RuntimeError, OSError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise UserError(f"{path}: damaged; start again, and it is encoded anew") from error
        return record

    def _reader(self, name: str) -> Any:
        """Return the reader of a shard; those that were used last stay open."""
        with self._lock:
            reader = self._readers.pop(name, None)
            if reader is not None:
                self._readers[name] = reader
                return reader
        reader = _open(self.folder / name)
        with self._lock:
            self._readers[name] = reader
            if len(self._readers) > _MOST_READERS:
                # A thread that is reading from it keeps it open until it has done.
                del self._readers[next(iter(self._readers))]
        return reader

    def write(
        self,
        kind: str,
        model: str,
        keys: npt.NDArray[np.bytes_],
        arrays: Sequence[npt.NDArray[Any]],
        dtype: str = "float32",
    ) -> None:
        """Write one shard, unless it is there.

        Args:
            kind, model, dtype: as in `Header`.
            keys: at most `SHARD_SIZE`.
            arrays: one for each key, all of one shape.

        Raises:
            UserError: it cannot be written, or a number is too large for the data type.
        """
        name = _name_of(kind, keys.tobytes())
        if name in self._shards:
            return
        with np.errstate(over="ignore"):
            stored = [np.asarray(array).astype(dtype) for array in arrays]
        if not all(np.isfinite(array).all() for array in stored):
            raise UserError(f"encodings: a number is too large for {dtype}; use float32 or bfloat16")
        header = Header(version=_VERSION, kind=kind, model=model, dtype=dtype, shape=list(stored[0].shape))
        head = json.dumps(header, sort_keys=True)
        path = self.folder / name
        with replaced(path) as staging, _writer_faults_as_os_errors():
            last = head.encode() + b"\n" + keys.tobytes()
            _write_records(staging, [*(array.tobytes() for array in stored), last])
        state = path.stat()
        self._shards[name] = _Shard(name, state.st_size, state.st_mtime_ns, head, keys.copy())
        self._is_saved = False

    def models(self, kind: str) -> dict[str, int]:
        """Return how many bytes the shards of one kind take, by the model that computed them."""
        sizes: dict[str, int] = {}
        for shard in self._shards.values():
            header = json.loads(shard.header)
            if header["kind"] == kind:
                sizes[header["model"]] = sizes.get(header["model"], 0) + shard.size
        return sizes

    def save_catalogue(self) -> None:
        """Write `catalogue.npz` if it has changed. A folder that cannot be written to is left as it is."""
        if self._is_saved:
            return
        if len(self._names) != len(self._shards):
            self._index()
        shards = [self._shards[name] for name in self._names]
        # Each distinct header once.
        headers = {header: number for number, header in enumerate(sorted({shard.header for shard in shards}))}
        with contextlib.suppress(UserError), replaced(self.folder / _CATALOGUE) as staging:
            with staging.open("wb") as file:
                np.savez(
                    file,
                    names=np.array([shard.name for shard in shards], "S"),
                    sizes=np.array([(shard.size, shard.changed) for shard in shards], np.int64),
                    headers=np.array(list(headers), "S"),
                    header_of=np.array([headers[shard.header] for shard in shards], np.int32),
                    starts=self._starts,
                    keys=self._keys,
                )
            self._is_saved = True

    def _read_catalogue(self) -> dict[str, _Shard]:
        """Return the shards that the catalogue describes; none if it is missing or damaged."""
        path = self.folder / _CATALOGUE
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a plain file; remove it, or choose another folder")
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                names, headers = ([text.decode() for text in file[name]] for name in ("names", "headers"))
                sizes, header_of = file["sizes"].tolist(), file["header_of"].tolist()
                starts, keys = file["starts"], file["keys"]
            shards = {}
            for place, (name, (size, changed)) in enumerate(zip(names, sizes, strict=True)):
                part = keys[starts[place] : starts[place + 1]]
                header: Header = parse_json(headers[header_of[place]], _CATALOGUE, Header)
                if name != _name_of(header["kind"], part.tobytes()):
                    raise ValueError(name)
                shards[name] = _Shard(name, size, changed, headers[header_of[place]], part)
            return shards
        except FileNotFoundError:
            return {}
        except (
            *(OSError, ValueError, LookupError, TypeError, EOFError),
            *(zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError),
        ):
            return {}  # the shards themselves are read instead


@functools.cache
def _layout(header: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the data type and the shape of the arrays of a shard."""
    values: Header = json.loads(header)
    return np.dtype(values["dtype"]), tuple(values["shape"])


def _name_of(kind: str, keys: bytes) -> str:
    return f"{kind}-{hashlib.sha256(keys).hexdigest()[:32]}.arrayrecord"


class _Damage(Exception):
    """The content of a shard is not what was written."""


def _read_shard(path: Path) -> _Shard:
    """Read a shard as a whole.

    Raises:
        FileNotFoundError: it is gone.
        _Damage, RuntimeError: it is damaged, or the system cannot read it.
        UserError: it is no plain file, or another version of this package has written it.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"{path}: not a plain file; remove it, or choose another folder")
    try:
        reader = _open(path)
        count = reader.num_records() - 1
        head, _, keys = reader.read([count])[0].partition(b"\n")
    except (OSError, IndexError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _Damage(str(error)) from error
    version = re.search(rb'"version": *([0-9]+)', head)
    if version is not None and int(version[1]) != 1:
        raise UserError(
            f"{path}: was written by another version of keras_sd ({version[1].decode()}); choose another "
            "folder"
        )
    try:
        header: Header = parse_json(head, path, Header)
    except UserError as error:
        raise _Damage(str(error)) from error
    if len(keys) != count * _KEY.itemsize or path.name != _name_of(header["kind"], keys):
        raise _Damage("its keys do not fit its name")
    size = math.prod(header["shape"]) * np.dtype(header["dtype"]).itemsize
    if any(len(reader.read([position])[0]) != size for position in range(count)):
        raise _Damage("a record has another length than its header says")
    return _Shard(path.name, state.st_size, state.st_mtime_ns, head.decode(), np.frombuffer(keys, _KEY))


def _read_bytes(path: Path) -> None:
    """Read a file to its end.

    Raises:
        UserError: the system cannot; the file itself may be sound.
    """
    try:
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); nothing is removed, start again when it can"
        ) from error


def _open(path: Path) -> Any:
    """Return the reader of a shard.

    Raises:
        RuntimeError: it is damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader  # here, as it takes time to import

    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    reader = ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=32768)
    # The reader of a truncated file may be empty in place of an exception.
    if not reader.ok() or reader.num_records() < 2:
        raise RuntimeError("truncated")
    return reader


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


@contextlib.contextmanager
def _writer_faults_as_os_errors():
    """Turn the writer's exceptions, which carry the system's error as text, into `OSError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        code = next((code for code in FULL_DISK if os.strerror(code) in text), None)
        raise OSError(code or errno.EIO, os.strerror(code) if code else text.partition(";")[0]) from error
