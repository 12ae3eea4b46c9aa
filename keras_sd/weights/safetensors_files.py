"""Safetensors files: reads them by memory mapping, with all checks, and writes them atomically."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.json_files import shown
from keras_sd.files.mapping import map_file
from keras_sd.files.writing import replaced

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_LARGEST_HEADER = 32 * 2**20  # the header of a whole Stable Diffusion has 0.2 MiB

_NUMPY_DTYPES = {  # by safetensors' names
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: str | Path, any_type: bool = False) -> dict[str, npt.NDArray[Any]]:
    """Read a safetensors file by mapping it into memory.

    Args:
        any_type: return tensors of unsupported types, such as fp8, as `unreadable` arrays. Another program
            may use them; a model that needs one raises a UserError.

    Returns:
        A dictionary of read-only NumPy arrays; their bytes stay on disk until they are used.

    Raises:
        UserError: the file is missing, truncated, no safetensors file or, without `any_type`, holds a tensor
            of an unsupported type.
    """
    path = checked_path("path", path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a safetensors file")
    with _opened(path):
        pass  # opening checks the header: its size, and that the offsets fill the file exactly
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > _LARGEST_HEADER:
        raise UserError(f"{path}: a header of {start} bytes, more than {_LARGEST_HEADER}; fetch it again")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(data[start:], name, entry, path, any_type) for name, entry in header.items()}


def unreadable(dtype, shape):
    """Return a placeholder for a tensor of an unsupported type: it has the shape, but no values.

    Args:
        dtype: the name of the type; `type_name` returns it.
        shape: the shape of the tensor.

    Returns:
        An array that takes no memory and whose values cannot be used.
    """
    return np.broadcast_to(np.zeros((), np.dtype([(dtype, "V1")])), shape)


def type_name(array):
    """Return the name of an array's type, also of an `unreadable` array."""
    return array.dtype.names[0] if array.dtype.names else array.dtype.name


def is_weight(array):
    """Return whether an array has a type of weights: a float of 16 bits or more."""
    return array.dtype in (np.float64, *DTYPES.values())


def read_metadata(path):
    """Return the metadata in the header of a safetensors file, a dictionary of strings."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        fault = shown(str(error))  # the error quotes the file, at any length
        raise UserError(f"{path}: truncated or no safetensors file ({fault}); fetch it again") from error


def file_in(path, names):
    """Return the path itself or, if it is a folder, that of the first of `names` which is a file in it.

    If a folder has none of these files, the result is the path of the first name.
    """
    path = checked_path("path", path)
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).is_file()), path / names[0])


def _view(data, name, entry, path, any_type):
    if entry["dtype"] not in _NUMPY_DTYPES and not any_type:
        raise UserError(f"{path}: {name} is of type {entry['dtype']}; convert the file to F32, F16 or BF16")
    begin, end = entry["data_offsets"]
    try:
        if entry["dtype"] not in _NUMPY_DTYPES:
            return unreadable(entry["dtype"], entry["shape"])
        return data[begin:end].view(_NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except ValueError as error:  # more axes than NumPy allows, or an axis that is too large
        raise UserError(f"{path}: {name[:200]} has no shape of an array; fetch it again") from error


def write_safetensors(path, tensors, dtype=None, metadata=None):
    """Write arrays atomically as a safetensors file that torch libraries accept.

    Args:
        path: the file; an existing one is replaced by a rename once the new one is on disk.
        tensors: a dictionary of NumPy arrays.
        dtype: "float32", "float16" or "bfloat16" for all of them; None keeps their types.
        metadata: further entries of the header, a dictionary of texts.

    Raises:
        UserError: `dtype` is unknown or cannot hold a value, or the file cannot be written.
    """
    check_dtype(dtype)
    path = checked_path("path", path)
    arrays = {name: converted(name, array, dtype) for name, array in tensors.items()}
    with replaced(path) as staging:
        try:
            save_file(arrays, staging, metadata={"format": "pt"} | (metadata or {}))
            if metadata:
                _sort_metadata(staging)
        except SafetensorError as error:
            # The library gives the operating system's error number in its text only.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise UserError(f"{path}: cannot be written ({error}); choose another place") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _sort_metadata(path):
    """Sort the texts of a header, which the library writes in any order, so that bytes are reproducible."""
    written = memoryview(Path(path).read_bytes())
    start = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(bytes(written[8:start]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.writelines((len(text).to_bytes(8, "little"), text, written[start:]))


def check_dtype(dtype):
    """Raise a UserError unless `dtype` is None or names a type that weights can be written in."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: unknown; use one of {', '.join(DTYPES)}")


def converted(name, array, dtype):
    """Return an array as it is written: in this type, or its own, and contiguous.

    Raises:
        UserError: the type cannot hold a value.
    """
    # Contiguous, as the library writes the memory of a transposed view without regard to its strides.
    with np.errstate(over="ignore"):  # the check below reports it
        converted = np.asarray(array if dtype is None else array.astype(DTYPES[dtype]), order="C")
    if not np.isfinite(converted).all():
        raise UserError(f"{name}: holds values that are no finite {converted.dtype}; save as float32")
    return converted
