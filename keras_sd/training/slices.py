"""Tensors that several processes hold in slices, and their files in a checkpoint.

Each process writes its slices of a group into one safetensors file, `GROUP-00000-of-00002.safetensors`. The
manifest of the checkpoint says of each tensor which slices make it, so any number of processes can read it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from typing_extensions import TypedDict


@dataclass(frozen=True)
class Sliced:
    """The slices of a tensor that this process writes.

    Attributes:
        shape: of the whole tensor.
        parts: (start along each axis, array) of each slice.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], np.ndarray], ...]


class Slice(TypedDict):
    """A slice: the file, the key in it, and where it begins along each axis."""

    file: str
    key: str
    start: list[int]


class SlicedTensor(TypedDict):
    """A tensor in the manifest."""

    shape: list[int]
    slices: list[Slice]


def is_sliced(groups: Mapping[str, Mapping]) -> bool:
    """Return whether several processes hold the tensors of a state in slices."""
    return any(isinstance(tensor, Sliced) for tensors in groups.values() for tensor in tensors.values())


def arrays_of(tensor) -> list[np.ndarray]:
    """Return the arrays of a tensor that this process holds: its slices, or the whole one."""
    return [array for _, array in tensor.parts] if isinstance(tensor, Sliced) else [tensor]


def file_of(group: str, process: int, processes: int) -> str:
    """Return the name of the file of a process' slices."""
    return f"{group}-{process:05}-of-{processes:05}.safetensors"


def listed(tensors: Mapping[str, Sliced], file: str) -> tuple[dict[str, np.ndarray], dict[str, SlicedTensor]]:
    """Return what a process writes into a file, as key -> array, and its part of the manifest."""
    arrays: dict[str, np.ndarray] = {}
    entries: dict[str, SlicedTensor] = {}
    for name, tensor in tensors.items():
        entries[name] = {"shape": list(tensor.shape), "slices": []}
        for place, (start, array) in enumerate(tensor.parts):
            arrays[f"{name}#{place}"] = array
            entries[name]["slices"].append({"file": file, "key": f"{name}#{place}", "start": list(start)})
    return arrays, entries


def joined(parts: Iterable[Mapping[str, Mapping[str, SlicedTensor]]]) -> dict[str, dict[str, SlicedTensor]]:
    """Return the parts of all processes as group -> tensor -> all of its slices."""
    whole: dict[str, dict[str, SlicedTensor]] = {}
    for part in parts:
        for group, tensors in part.items():
            for name, entry in tensors.items():
                empty: SlicedTensor = {"shape": entry["shape"], "slices": []}
                whole.setdefault(group, {}).setdefault(name, empty)["slices"].extend(entry["slices"])
    return whole


def read(folder: Path, tensors: Mapping[str, SlicedTensor]) -> dict[str, np.ndarray]:
    """Read tensors and put their slices together; raises ValueError if they do not make a whole tensor."""
    names = {one["file"] for entry in tensors.values() for one in entry["slices"]}
    files = {name: safe_open(folder / name, framework="np") for name in names}
    whole = {}
    for name, entry in tensors.items():
        shape, numbers, array = tuple(entry["shape"]), 0, None
        for one in entry["slices"]:
            part = files[one["file"]].get_tensor(one["key"])
            array = np.empty(shape, part.dtype) if array is None else array
            stop = [start + length for start, length in zip(one["start"], part.shape, strict=True)]
            place = tuple(slice(start, end) for start, end in zip(one["start"], stop, strict=True))
            if array[place].shape != part.shape or min(one["start"], default=0) < 0:
                raise ValueError(f"a slice of {name} is not inside of it")
            array[place] = part
            numbers += part.size
        if array is None or numbers != array.size:
            raise ValueError(f"slices of {name} are missing")
        whole[name] = array
    return whole
