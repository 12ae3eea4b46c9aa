"""Identities: what Python objects contribute to the trace of a function, as a text.

Tracing reads attributes: numbers, options, layers, tables. The identity of an object is the class and the
attributes of all that it holds, in the end numbers and texts. Values of variables are left out, as they are
inputs of a program. What is not known to be covered, such as a class of a user, has no identity.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_sd.backend import compat

_PACKAGES = ("keras_sd", "keras")
# Endings of attributes that take part in building, not in calling, or that number objects.
_WITHOUT_EFFECT = (
    *(
        "_initializer",
        "_constraint",
        "input_spec",
        "train_function",
        "test_function",
        "history",
        "on_compiled",
    ),
    *compat.NUMBERING,
    *compat.STRATEGIES,
)


class _Unknown(Exception):
    """A value that the identity cannot describe."""


def identity_of(*values: Any) -> str | None:
    """Return the identity of values; None if they hold something that cannot be described."""
    seen: dict[int, int] = {}
    try:
        return json.dumps([_described(value, seen) for value in values])
    except _Unknown:
        return None


@functools.cache
def _of_every_layer():
    """Return the names of attributes that Keras gives every layer and model."""
    return {*vars(keras.layers.Layer()), *vars(keras.Model())}


def _described(value, seen):
    """Return a value as JSON has it; an object that was met before by its number."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum | np.dtype | np.generic | bytes | Path | type):
        return f"{type(value).__name__} {value!r}"
    if id(value) in seen:
        return {"again": seen[id(value)]}
    seen[id(value)] = len(seen)
    if isinstance(value, keras.Variable):
        return ["variable", value.name, list(value.shape), value.dtype, value.trainable]
    if isinstance(value, Mapping):
        return {str(key): _described(value[key], seen) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple | set | frozenset):
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [type(value).__name__, *(_described(one, seen) for one in ordered)]
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(value))
        return ["array", array.shape, array.dtype.name, hashlib.sha256(array.view(np.uint8)).hexdigest()]
    if isinstance(value, functools.partial):
        return ["partial", *(_described(one, seen) for one in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", value.__func__.__qualname__, _described(value.__self__, seen)]
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return _described_function(value, seen)
    return _described_object(value, seen)


def _described_function(function, seen):
    _check_package(function.__module__, function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    defaults = getattr(function, "__defaults__", None)
    names = ["function", function.__module__, function.__qualname__]
    return [*names, _described(cells, seen), _described(defaults, seen)]


def _described_object(value, seen):
    kind, is_layer = type(value), isinstance(value, keras.layers.Layer)
    _check_package(kind.__module__, kind)
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    if dataclasses.is_dataclass(value):
        attributes = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found = {
        name: _described(one, seen)
        for name, one in sorted(attributes.items())
        if not name.endswith(_WITHOUT_EFFECT)
        and not name.startswith("_self_")  # by which TensorFlow tracks what to save
        and not (is_layer and name in _of_every_layer())
    }
    if is_layer:
        found["dtype_policy"] = value.dtype_policy.name
        found["autocast"] = value.autocast
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **found}


def _check_package(module, value):
    if module is None or module.partition(".")[0] not in _PACKAGES:
        raise _Unknown(value)
