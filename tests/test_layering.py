"""Imports run one way, and only ``backend`` knows which backend there is."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import keras_sd

PACKAGE = Path(keras_sd.__file__).parent

# From the ground up; a module imports from its own row and the rows above it.
LAYERS = (
    {"errors", "arguments", "interruption"},
    {"files"},
    {"config", "backend"},
    {"kernels"},
    {"models"},
    {"diffusion", "weights"},
    {"presets", "data", "metrics"},
    {"pipeline", "training", "captions", "parity", "keras_cv"},
    {"cli"},
    {"__main__", "train"},
)
LEVEL = {unit: level for level, row in enumerate(LAYERS) for unit in row}
BACKENDS = {"tensorflow", "jax", "torch"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path):
    """All dotted names a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            # "from keras_sd import x" may mean the module x.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_units(path):
    """The modules and sub-packages directly below keras_sd that a file imports."""
    units = {name.split(".")[1] for name in imported_names(path) if name.startswith("keras_sd.")}
    # What is no module is a public name of the package itself.
    return {unit for unit in units if (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    unit = unit_of(path)
    assert unit in LEVEL, f"give {unit} a layer in LAYERS"
    upward = {other for other in imported_units(path) if LEVEL[other] > LEVEL[unit]}
    assert not upward, f"{unit} must not import {sorted(upward)}"
    assert unit != "training" or "pipeline" not in imported_units(path)


def test_no_cycles():
    graph = {}
    for path in modules():
        graph.setdefault(unit_of(path), set()).update(imported_units(path) - {unit_of(path)})
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(graph) <= set(order)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_backends_are_imported_by_backend_only(path):
    roots = {name.split(".")[0] for name in imported_names(path)}
    # What computes the reference of a parity report is a program of its own; captions are torch's models'.
    allowed = {"backend": {"tensorflow", "jax"}, "parity": {"torch"}, "captions": {"torch"}}
    assert roots & BACKENDS <= allowed.get(unit_of(path), set())


def test_everything_imports_under_jax_without_tensorflow_or_torch():
    code = """if True:
        import importlib, pkgutil, sys
        class Absent:  # None in sys.modules would do, but SciPy looks there for torch and takes it as found
            def find_spec(self, name, path, target=None):
                if name in ("tensorflow", "torch"):
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Absent())
        import keras_sd
        # A TFDS builder is a class of TFDS, which needs TensorFlow.
        needs_tensorflow = {"keras_sd.data.emoji.tfds_builder"}
        names = {module.name for module in pkgutil.walk_packages(keras_sd.__path__, "keras_sd.")}
        for name in names - needs_tensorflow:
            importlib.import_module(name)
        import keras
        print(keras.backend.backend(), len(names))
    """
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backend, count = done.stdout.split()
    assert backend == "jax" and int(count) >= len(LAYERS)
