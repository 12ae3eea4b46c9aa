"""Reads torch's `.ckpt`, `.pt`, `.pth` and `.bin` files without torch and without executing anything in them.

Such a file is a pickle, a program for a stack machine, beside the raw bytes of the tensors. The machine here
supports lists, tuples, dictionaries, strings, numbers and tensors. It has no operation that looks up or calls
anything else: a global is only a name, and an object of an unknown class is a dictionary of its attributes.
Tensors are views of the mapped file, so neither they nor false claims about their size take memory.
"""

import io
import math
import pickletools
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.mapping import map_file
from keras_sd.weights.safetensors_files import unreadable
from keras_sd.weights.stored_zip import ZIP_MAGIC, DamagedFile, StoredZip

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # torch before 1.6

_DTYPES = {  # by torch's classes of storages
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}

# The errors that reading a pickle can raise if torch did not write it.
_PICKLE_FAULTS = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
)

# Bounds on the pickle's size: Python needs up to about 100 bytes for each of its operations. The pickle of SD
# 1.5 with its EMA weights has 1,816 tensors, 0.3 MB and 58,000 operations.
_PICKLE_BYTES, _PICKLE_SHARE = 2**22, 8
_OPERATIONS, _OPERATION_SHARE = 100_000, 1024

_LONGEST_NAME = 1000
_COUNT_END = 2**62
_MOST_AXES = 32


def read_torch(path, any_type=False):
    """Read a file of `torch.save`, in today's zip format or in the format before torch 1.6.

    Nothing in the file is executed. Objects that are neither tensors nor containers become dictionaries of
    the attributes and items that the file sets on them.

    Args:
        path: the file.
        any_type: as in `formats.read_safetensors`; only today's format can hold such types.

    Returns:
        The saved object, usually a dictionary: tensors as read-only NumPy arrays whose bytes stay on disk
        until they are used; dictionaries, lists, strings and numbers as they are. Keys other than strings and
        integers are left out.

    Raises:
        UserError: the file is missing, damaged, compressed, not a torch file, or claims more than it holds.
    """
    path = checked_path("path", path)
    if not path.is_file():
        fault = "not a plain file" if path.exists() else "no such file"
        raise UserError(f"{path}: {fault}; give a file of torch.save")
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file; fetch it again")
    data = map_file(path)
    magic = data[: len(LEGACY_MAGIC)].tobytes()
    try:
        if magic.startswith(ZIP_MAGIC):
            return _read_zip(data, any_type)
        if magic == LEGACY_MAGIC:
            return _read_legacy(data)
    except DamagedFile as error:
        raise UserError(f"{path}: not a readable torch file, {error}; fetch it again") from error
    except _PICKLE_FAULTS as error:
        # These errors may quote the file, at any length.
        raise UserError(
            f"{path}: not a readable torch file, its pickle is damaged; fetch it again"
        ) from error
    raise UserError(f"{path}: neither a zip nor a pickle of torch.save; fetch it again")


def _read_zip(data, any_type):
    archive = StoredZip(data)
    pickles = [name for name in archive.names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedFile(f"a zip with {len(pickles)} entries data.pkl in place of one")
    folder = pickles[0].removesuffix("data.pkl")
    byte_order = f"{folder}byteorder"
    if byte_order in archive.names and archive.content(byte_order).tobytes() == b"big":
        raise DamagedFile("it was saved by a big-endian machine")

    def open_storage(key, dtype, count):
        content = archive.content(f"{folder}data/{key}")
        if count * dtype.itemsize > len(content):
            raise DamagedFile(f"its storage {key!r:.40} has {len(content)} bytes, its pickle says more")
        return _Storage(content[: count * dtype.itemsize], dtype)

    program = archive.content(pickles[0])
    if len(program) > _largest_pickle(data):
        raise DamagedFile(f"its pickle of {len(program)} bytes is too large for what it describes")
    return _Machine(open_storage, len(data), any_type).run(io.BytesIO(program.tobytes()))


def _read_legacy(data):
    """Read torch's format before 1.6: five pickles, then the bytes of the storages.

    The pickles hold a magic number, the version, facts about the machine, the content and the storages' keys.
    """
    stream = io.BytesIO(data[: _largest_pickle(data)].tobytes())
    dtypes = {}

    def note_dtype(key, dtype, count):
        dtypes[key] = dtype

    for _ in range(3):
        _Machine(note_dtype, len(data)).run(stream)
    start = stream.tell()
    # The list of storages comes after the content that refers to them, so the content is read twice.
    _Machine(note_dtype, len(data)).run(stream)
    keys = _Machine(note_dtype, len(data)).run(stream)
    storages, begin = {}, stream.tell()
    for key in keys:
        (count,) = struct.unpack_from("<q", data, begin)
        end = begin + 8 + count * dtypes[key].itemsize
        if not begin + 8 <= end <= len(data):
            raise DamagedFile("it is truncated")
        storages[key] = _Storage(data[begin + 8 : end], dtypes[key])
        begin = end
    stream.seek(start)
    return _Machine(lambda key, dtype, count: storages[key], len(data)).run(stream)


def _largest_pickle(data):
    return _PICKLE_BYTES + len(data) // _PICKLE_SHARE


class _Global(NamedTuple):
    """A class or function that the pickle names. It is never imported."""

    name: str


class _Storage(NamedTuple):
    """The bytes that tensors are views of."""

    data: np.ndarray
    dtype: np.dtype


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset(["PROTO", "FRAME", "STOP"])


class _Machine:
    """The stack machine of one pickle (opcodes of `pickletools`), which cannot call anything.

    Args:
        open_storage: returns the `_Storage` for (key, dtype, number of elements); None makes its tensors
            None.
        file_size: bytes of the whole file, which limit the work and the tensors' total size.
        any_type: as in `read_torch`.
    """

    def __init__(self, open_storage, file_size, any_type=False):
        self._open_storage = open_storage
        self._any_type = any_type
        self._operations_left = _OPERATIONS + file_size // _OPERATION_SHARE
        self._bytes_left = 2 * file_size
        self._stack, self._marks, self._memo = [], [], {}

    def run(self, stream):
        """Run the pickle at the stream's position and return its result."""
        for opcode, argument, _ in pickletools.genops(stream):
            self._spend(1)
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _spend(self, operations):
        self._operations_left -= operations
        if self._operations_left < 0:
            raise DamagedFile("its pickle holds far more than weights")

    def _step(self, name, argument):
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name in _FROM_MARK:
            items = self._take_marked()
            self._stack.append(_FROM_MARK[name](items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name not in _IGNORED:
            operation = getattr(self, f"_do_{name.lower()}", None)
            if operation is None:
                raise DamagedFile(f"its pickle uses {name}, which torch never does")
            operation(argument)

    def _take(self, count):
        if count > len(self._stack):
            raise IndexError("the stack is too short")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self):
        items, self._stack = self._stack, self._marks.pop()
        return items

    # The other operations, each a method with its name that takes the operation's argument.

    def _do_mark(self, _):
        self._marks.append(self._stack)
        self._stack = []

    def _do_pop(self, _):
        if self._stack:
            self._stack.pop()
        else:
            self._take_marked()

    def _do_pop_mark(self, _):
        self._take_marked()

    def _do_dup(self, _):
        self._stack.append(self._stack[-1])

    def _do_memoize(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_append(self, _):
        (item,) = self._take(1)
        _extend(self._stack[-1], [item])

    def _do_appends(self, _):
        items = self._take_marked()
        _extend(self._stack[-1], items)

    _do_additems = _do_appends

    def _do_setitem(self, _):
        items = self._take(2)
        _set_items(self._stack[-1], items)

    def _do_setitems(self, _):
        items = self._take_marked()
        _set_items(self._stack[-1], items)

    def _do_build(self, _):
        (state,) = self._take(1)
        for attributes in state if isinstance(state, tuple) else (state,):
            self._spend(1)
            if isinstance(attributes, dict) and isinstance(self._stack[-1], dict):
                self._spend(len(attributes))
                self._stack[-1].update(attributes)

    def _do_global(self, argument):
        self._stack.append(_global(*argument.split(" ", 1)))

    def _do_stack_global(self, _):
        self._stack.append(_global(*self._take(2)))

    def _do_reduce(self, _):
        function, arguments = self._take(2)
        self._stack.append(self._make(function, arguments))

    _do_newobj = _do_reduce

    def _do_newobj_ex(self, _):
        function, arguments, _ = self._take(3)
        self._stack.append(self._make(function, arguments))

    def _do_inst(self, argument):
        arguments = self._take_marked()
        self._stack.append(self._make(_global(*argument.split(" ", 1)), tuple(arguments)))

    def _do_obj(self, _):
        function, *arguments = self._take_marked()
        self._stack.append(self._make(function, tuple(arguments)))

    def _do_binpersid(self, _):
        (reference,) = self._take(1)
        if reference[0] == "module":  # a class and its source code, in files before torch 1.6
            self._stack.append(reference[1])
        else:
            self._stack.append(self._storage(*reference))

    def _storage(self, kind, storage_type, key, location, count, view=None):
        if kind != "storage" or not isinstance(storage_type, _Global) or not isinstance(key, str) or view:
            raise DamagedFile("it refers to something that is not a storage")
        dtype = _DTYPES.get(storage_type.name.rpartition(".")[2])
        if dtype is None and self._any_type:
            return storage_type
        if dtype is None:
            raise DamagedFile(f"its {storage_type.name[:60]!r} is of a type that no weights have")
        return self._open_storage(key, np.dtype(dtype), _count(count))

    def _make(self, function, arguments):
        """Return the result of a call or a new object: a tensor, a container, or else an empty dictionary."""
        name = function.name if isinstance(function, _Global) else None
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_tensor_v3":  # for types without a storage class
            if self._any_type:
                return _unreadable(arguments[6], arguments[2])
            raise DamagedFile(f"a tensor of {arguments[6].name[:60]!r}, a type that no weights have")
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name == "collections.OrderedDict" and arguments:
            self._spend(len(arguments[0]))
            return _dictionary([item for key, value in arguments[0] for item in (key, value)])
        return {}

    def _tensor(self, storage, offset, shape, strides):
        if storage is None:
            return None
        if isinstance(storage, _Global):
            return _unreadable(storage, shape)
        if not isinstance(storage, _Storage) or not len(shape) == len(strides) <= _MOST_AXES:
            raise DamagedFile("a tensor without a storage or a shape")
        dtype = storage.dtype
        offset, shape, strides = _count(offset), tuple(map(_count, shape)), tuple(map(_count, strides))
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return np.broadcast_to(np.zeros((), dtype), shape)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > len(storage.data) or size > len(storage.data):
            raise DamagedFile(f"a tensor of {size} bytes in a storage of {len(storage.data)}")
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise DamagedFile("its tensors claim more than twice the file")
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, steps)


def _global(module, name):
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
        raise DamagedFile("its pickle names no class")
    return _Global(f"{module}.{name}")


def _unreadable(kind, shape):
    """Return an `unreadable` tensor, whose type a class of torch names."""
    shape = tuple(map(_count, shape))
    if len(shape) > _MOST_AXES or math.prod(shape) >= _COUNT_END:
        raise DamagedFile("a tensor with an invalid shape")
    return unreadable(kind.name.rpartition(".")[2][:60], shape)


def _count(value):
    """Return a number of elements, small enough that products of them stay cheap."""
    if not isinstance(value, int) or not 0 <= value < _COUNT_END:
        raise DamagedFile("a tensor with an invalid shape")
    return value


def _extend(target, items):
    """Append items to a list; ignore them for other objects."""
    if isinstance(target, list):
        target.extend(items)


def _set_items(target, items):
    """Set items of a dictionary, given as alternating keys and values; ignore them for other objects."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A nested tuple would be hashed by recursion in C, as deep as the file likes.
            if isinstance(key, str | int):
                target[key] = value


def _dictionary(items):
    made = {}
    _set_items(made, items)
    return made


_FROM_MARK = {"LIST": list, "TUPLE": tuple, "FROZENSET": list, "DICT": _dictionary}
