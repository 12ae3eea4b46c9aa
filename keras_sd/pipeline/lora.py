"""Low-rank updates (LoRA) at work: added to the kernels of a model, several at once, and taken off again."""

import contextlib
import itertools
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np

from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.files.json_files import shown
from keras_sd.models.parameters import parameter_paths
from keras_sd.weights.lora import lora_file, read_lora
from keras_sd.weights.rules import from_torch

# What ends a name in a prompt's tag, <lora:name:0.8>.
_NO_NAME = re.compile(r"[<>:]")


class Adapters:
    """The LoRAs of a model. Kernels are their base plus the weighted updates, so sampling costs no more.

    The base of every kernel that has been touched is kept on the host: without updates the model is again,
    bit for bit, what it was.

    Args:
        models: part ("unet", "text_encoder") -> the model.

    Attributes:
        weights: name -> how much of it is in the model, of those that are.
        files: name -> the file that it came from.
    """

    def __init__(self, models):
        self._models = models
        self._loaded = {}
        self.files = {}
        self._bases = {}
        self.weights = {}

    @property
    def names(self):
        """The names of what is loaded."""
        return tuple(self._loaded)

    def load(self, path, name=None, weight=1.0):
        """Loads a LoRA and adds it, times `weight`, to the model.

        Args:
            path: as `read_lora` takes it.
            name: what it is called; by default as its file or its folder, and with a number behind it, which
                a warning tells, where another one is called so.

        Returns:
            The name.

        Raises:
            UserError: another one has the name that is given; or as `read_lora` and `set`. Nothing has
                changed then.
        """
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"LoRA {path!r}: no path; give that of a file or a folder")
        if name is not None and (not isinstance(name, str) or not name or _NO_NAME.search(name)):
            raise UserError(f"LoRA {name!r}: prompts cannot call it so; use a text without <, > and :")
        if name in self._loaded:
            raise UserError(f"LoRA {name!r}: loaded already; give another name, or unload it first")
        weight = _checked_weight(name or path, weight)
        with os_errors_in_one_line(path):
            lora = read_lora(path, self._models)
            name = name or self._free_name(path)
            self._loaded[name], self.files[name] = lora, lora_file(path)
        try:
            self.set(self.weights | {name: weight})
        except BaseException:
            del self._loaded[name], self.files[name]
            raise
        return name

    def _free_name(self, path):
        path = Path(os.path.abspath(path))  # ".", and no links: the names in a cache are hashes
        usual = _NO_NAME.sub("_", path.name if path.is_dir() else path.stem)
        numbered = (f"{usual}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([usual], numbered) if name not in self._loaded)
        if name != usual:
            warnings.warn(
                f"{path}: another LoRA is called {usual!r}, so prompts call this one {name!r}", stacklevel=4
            )
        return name

    def unload(self, name=None):
        """Takes a LoRA off the model and forgets it; all of them without a name."""
        gone = self.names if name is None else (name,)
        for one in gone:
            self._known(one)
        self.set({one: weight for one, weight in self.weights.items() if one not in gone})
        for one in gone:
            del self._loaded[one], self.files[one]

    def set(self, weights):
        """Sets the weight of each LoRA by its name; those not named are taken off.

        Raises:
            UserError: a name is unknown, the line lists those known; or a weight is not a finite number, or
                makes the model's so. Nothing has changed then.
        """
        if not isinstance(weights, dict):
            raise UserError(f"LoRA weights {weights!r}: no dictionary; give one from names to numbers")
        for name in weights:
            self._known(name)
        checked = {name: _checked_weight(name, weight) for name, weight in weights.items()}
        weights = {name: weight for name, weight in checked.items() if weight}
        try:
            self._apply(weights)
        except BaseException:
            self._apply(self.weights)
            raise
        self.weights = weights

    @contextlib.contextmanager
    def temporarily(self, weights):
        """Adds LoRAs for the time of a block."""
        before = self.weights
        self.set(before | weights)
        try:
            yield
        finally:
            self.set(before)

    def _known(self, name):
        if not isinstance(name, str) or name not in self._loaded:
            known = f"use {', '.join(self._loaded)}" if self._loaded else "load it first"
            raise UserError(f"LoRA {name!r}: not loaded; {known}")

    def _apply(self, weights):
        """Gives every kernel that is, or has been, touched its base plus the updates."""
        updates = {}
        for name, weight in weights.items():
            for part, layers in self._loaded[name].items():
                for layer, update in layers.items():
                    updates.setdefault((part, layer), {})[name] = weight, update
        for part, model in self._models.items():
            for parameter in parameter_paths(model):
                key = part, parameter.name.removesuffix(".weight")
                if parameter.variable.name == "kernel" and (key in updates or key in self._bases):
                    self._assign(parameter, key, updates.get(key, {}))

    def _assign(self, parameter, key, updates):
        base = self._bases.setdefault(key, np.array(parameter.variable))
        if updates:
            with np.errstate(over="ignore", invalid="ignore"):  # told below
                total = sum(np.float32(weight) * update.scaled_product for weight, update in updates.values())
                kernel = (np.asarray(base, "float32") + from_torch(parameter, total)).astype(base.dtype)
            if not np.isfinite(kernel).all():
                raise UserError(
                    f"LoRA {', '.join(map(repr, updates))}: makes {'.'.join(key)} infinite in {base.dtype}; "
                    "use a smaller weight, or an undamaged file"
                )
            parameter.variable.assign(kernel)
        else:
            parameter.variable.assign(base)
            del self._bases[key]


def _checked_weight(name, weight):
    is_number = isinstance(weight, int | float | np.integer | np.floating) and not isinstance(weight, bool)
    try:
        number = float(weight) if is_number else math.nan
    except OverflowError:  # an integer of too many digits
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"LoRA {str(name)!r}: its weight {shown(weight)} is not a finite number; use another")
    return number
