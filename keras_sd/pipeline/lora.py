"""LoRA in sampling: several updates are added to a model's kernels, and removed again."""

import contextlib
import itertools
import math
import numbers
import os
import re
import warnings
from pathlib import Path

import numpy as np

from keras_sd.arguments import checked_path, shown
from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.models.parameters import parameter_paths
from keras_sd.weights.lora import read_lora
from keras_sd.weights.lora_files import FOLDER_FILES, lora_file
from keras_sd.weights.lora_updates import change_of
from keras_sd.weights.rules import from_torch, to_torch

# Characters that cannot be in the name of a prompt's tag, <lora:name:0.8>.
_NO_NAME = re.compile(r"[<>:]")


class Adapters:
    """The LoRAs of a model. Each kernel is its base plus the weighted updates, so sampling stays as fast.

    What DoRA adds depends on the kernel; it is computed from the base, so the order of LoRAs has no effect.

    The base of every changed kernel is kept in host memory. Without updates the model is again exactly what
    it was. Methods take no lock: call them while no other thread uses the model.

    Args:
        models: part ("unet", "text_encoder") -> the model.

    Attributes:
        weights: name -> weight of the LoRAs that are in the model.
        files: name -> file of all loaded LoRAs.
    """

    def __init__(self, models):
        self._models = models
        self._loaded = {}
        self.files = {}
        self._bases = {}
        self.weights = {}

    @property
    def names(self):
        """The names of the loaded LoRAs."""
        return tuple(self._loaded)

    def load(self, path, name=None, weight=1.0):
        """Load a LoRA and add it, times `weight`, to the model.

        Args:
            path: as `read_lora` takes it.
            name: its name; by default that of its file or folder, of a run's result that of the run. If
                another LoRA has this default name, a number is appended, with a warning.

        Returns:
            The name.

        Raises:
            UserError: another LoRA has the given name; or as `read_lora` and `set`. Then nothing has changed.
        """
        checked_path("LoRA", path)
        if name is not None and (not isinstance(name, str) or not name or _NO_NAME.search(name)):
            raise UserError(f"LoRA {shown(name)}: prompts cannot call it so; use a text without <, > and :")
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
        # This resolves ".", but no links: file names in the hub's cache are hashes.
        path = Path(os.path.abspath(path))
        if not path.is_dir() and path.name in FOLDER_FILES:
            path = path.parent
        # A run's result is RUN/model.
        path = path.parent if path.is_dir() and path.name == "model" and path.parent.name else path
        usual = _NO_NAME.sub("_", path.name if path.is_dir() else path.stem)
        numbered = (f"{usual}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([usual], numbered) if name not in self._loaded)
        if name != usual:
            warnings.warn(
                f"{path}: another LoRA is called {usual!r}, so prompts call this one {name!r}", stacklevel=4
            )
        return name

    def unload(self, name=None):
        """Remove a LoRA from the model and from memory; without a name, all of them."""
        gone = self.names if name is None else (name,)
        for one in gone:
            self._known(one)
        self.set({one: weight for one, weight in self.weights.items() if one not in gone})
        for one in gone:
            del self._loaded[one], self.files[one]

    def set(self, weights):
        """Set the weights of LoRAs, name -> weight; those not named are removed from the model.

        Raises:
            UserError: a name is unknown, or a weight or the resulting kernel is not finite. Then nothing has
                changed.
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
        """Add LoRAs inside the block."""
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
        """Assign base plus updates to every kernel that has, or had, updates."""
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
        base = self._bases.setdefault(key, parameter.layer.stored_kernel())
        if updates:
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                own = base.decoded()
                plain = to_torch(parameter, own)
                total = sum(change_of(update, plain, weight) for weight, update in updates.values())
                kernel = base.encoded(own + from_torch(parameter, total))
            if not kernel.is_finite():
                raise UserError(
                    f"LoRA {', '.join(map(repr, updates))}: makes {'.'.join(key)} infinite in "
                    f"{base.values.dtype}; use a smaller weight, or an undamaged file"
                )
            parameter.layer.assign_kernel(kernel)
        else:
            parameter.layer.assign_kernel(base)
            del self._bases[key]


def _checked_weight(name, weight):
    is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    try:
        number = float(weight) if is_number else math.nan
    except OverflowError:  # an integer of too many digits
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"LoRA {str(name)!r}: its weight {shown(weight)} is not a finite number; use another")
    return number
