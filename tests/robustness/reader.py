"""Readers of the campaign: how their good files are made, and what is done with them.

A reader is a function of a folder that has the files, one of them damaged. These modules are imported by the
process that makes the files, and by the workers that read them, whose imports are inside of the functions.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

READERS = {}
"""Name -> `Reader`."""


class Reader(NamedTuple):
    """How files are made and read.

    Attributes:
        make: gives the good files, contents by name.
        read: reads those of a folder; told the name of the damaged one, it may leave out others.
        loads_keras: whether that loads Keras.
        others: gives contents that any file may get.
        seal: makes a digest of a damaged file right again, or None.
        share: of the inputs, for what takes long.
    """

    make: Callable
    read: Callable
    loads_keras: bool
    others: Callable
    seal: Callable | None
    share: float


EMOJI = Path(__file__).parents[2] / "keras_sd" / "bundled" / "emoji"
PARTS = ("unet", "vae", "text_encoder", "image_encoder")


def reader(make, loads_keras=False, others=tuple, seal=None, share=1.0):
    """Registers a function as the `read` of a `Reader`."""

    def register(read):
        READERS[read.__name__] = Reader(make, read, loads_keras, others, seal, share)
        return read

    return register


def emoji(*names):
    return {name: (EMOJI / name).read_bytes() for name in names}


def json_bytes(value):
    return json.dumps(value, ensure_ascii=False).encode()


def json_lines(*values):
    return b"\n".join(map(json_bytes, values)) + b"\n"


def safetensors_bytes(tensors, metadata=None):
    from safetensors.numpy import save

    return save(tensors, metadata)


def temporary():
    return tempfile.mkdtemp(prefix="keras_sd_robustness_")
