"""Files of torch.save made by hand, from the operations of a pickle.

A function gives the bytes of an expression, which leaves one value on the stack.
"""

import struct
import zipfile

import numpy as np

WEIGHT = np.arange(6, dtype="float32").reshape(2, 3)
DATA = WEIGHT.tobytes()


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short_bytes(value):
    return b"B" + struct.pack("<I", len(value)) + value


def number(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")


def items(*values):
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def call(module, name, *arguments):
    return name_of(module, name) + items(*arguments) + b"R"


def storage(key="0", kind="FloatStorage", count=6):
    return items(text("storage"), name_of("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), source=None):
    sizes = [items(*map(number, values)) for values in (shape, strides)]
    hooks = call("collections", "OrderedDict")
    arguments = (source or storage(), number(offset), *sizes, b"\x89", hooks)
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def program(**entries):
    """A whole pickle: a dictionary of expressions."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def archive(path, content, data=DATA, compression=zipfile.ZIP_STORED):
    """A file of torch.save with one storage, "0"; returns its path."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", data)
    return path
