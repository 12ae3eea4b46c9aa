"""Imports run one way, and only ``backend`` and ``kernels`` know which backend there is."""

import ast
import dis
import graphlib
import importlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_sd
from keras_sd.backend import compat
from keras_sd.errors import UserError

PACKAGE = Path(keras_sd.__file__).parent

# From the ground up; a module imports from its own row and the rows above it.
LAYERS = (
    {"errors", "arguments", "interruption", "progress"},
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
def test_backends_are_imported_by_backend_and_kernels_only(path):
    roots = {name.split(".")[0] for name in imported_names(path)}
    # What computes the reference of a parity report is a program of its own; captions are torch's models'.
    allowed = {
        "backend": {"tensorflow", "jax"},
        "kernels": {"jax"},
        "parity": {"torch"},
        "captions": {"torch"},
    }
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


# Of Python's own library: public all the same.
PUBLIC = {"_asdict", "_exit", "_replace"}


def privates(tree, own):
    """Private and experimental things of Keras, TensorFlow and JAX in a syntax tree.

    Args:
        own: private names that the package itself defines; a class may have those of its bases. All other
            objects may be asked only for private names that the same file defines.
    """
    defined = set(own_names([tree]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and node.value in compat_names():  # of `getattr`
            yield node.value
            continue
        else:
            continue
        for name in names:
            parts = name.split(".")
            root = {"tf": "tensorflow"}.get(parts[0], parts[0])
            is_theirs = root in {"keras", "tensorflow", "jax"}
            if is_theirs and {"src", "_src", "python", "experimental"} & set(parts[1:]):
                yield name
            elif parts[-1] == "jax_state_sync":
                yield name
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                is_of_itself = ast.unparse(node.value) in ("self", "cls", "super()")
                if (
                    node.attr not in (own if is_of_itself else defined) | PUBLIC
                    or node.attr in compat_names()
                ):
                    yield name


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def compat_names():
    entries = compat._KERAS + sum(compat._BACKENDS.values(), ())
    return {name for entry in entries for name in entry[2:] if name.startswith("_")}


def own_names(trees):
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_functions_are_used_by_compat_only():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    own = set(own_names(trees.values()))
    del trees[PACKAGE / "backend" / "compat.py"]
    found = {str(path.relative_to(PACKAGE)): sorted(set(privates(tree, own))) for path, tree in trees.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "value = variable._value",
        "layer._tracker.unlock()",
        "layers = model._flatten_layers()",
        "model.jax_state_sync()",
        "from jax.experimental import multihost_utils",
        "import jax._src.lru_cache",
        "from tensorflow.python.ops import control_flow_util",
        "tf.experimental.dlpack.from_dlpack(array)",
        "from keras.src import tree",
        "layer._something()",
        "model.layers[0]._ours_elsewhere()",
        "getattr(variable, '_value')",
    ],
)
def test_a_private_function_is_found(line):
    assert list(privates(ast.parse(line), {"_ours_elsewhere"}))


def names_of(cls):
    """Private names that a class defines, or that its methods assign to."""
    functions = [inspect.unwrap(getattr(value, "__func__", value)) for value in vars(cls).values()]
    functions += [value.fget for value in vars(cls).values() if isinstance(value, property)]
    codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
    stored = {
        step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"
    }
    return {name for name in {*vars(cls), *stored} if is_private(name)}


def private_overrides(cls):
    """Private names of Keras, TensorFlow or JAX that a class defines anew, as a method or as an attribute."""
    theirs = (base for base in cls.__mro__ if base.__module__.split(".")[0] in {"keras", "tensorflow", "jax"})
    return names_of(cls) & {name for base in theirs for name in names_of(base)}


def test_private_methods_are_overridden_by_compat_only():
    files = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in modules()]
    names = {".".join(parts).removesuffix(".__init__") for parts in files} - {
        "keras_sd.data.emoji.tfds_builder"
    }
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    classes = {value for value in found if isinstance(value, type) and value.__module__ in names}
    overriding = {cls.__qualname__: private_overrides(cls) for cls in classes if private_overrides(cls)}
    assert overriding == {
        "JointOptimizer": {"_apply_weight_decay", "_backend_update_step", "_clip_gradients"}
    }


def test_an_overridden_private_method_is_found():
    class Mine(keras.layers.Dense):
        def __init__(self):
            super().__init__(1)
            self._inbound_nodes = []

        def _assert_input_compatibility(self, *inputs):
            pass

    assert private_overrides(Mine) == {"_inbound_nodes", "_assert_input_compatibility"}


def test_a_version_without_a_private_function_is_one_line():
    with pytest.raises(UserError, match=r"^keras [0-9.]+: has no keras.Variable._gone.*'keras>=.*,<.*'$"):
        compat.check((("keras", "Variable", "_value", "_gone"),))


ABSENT = """if True:
    import sys
    class Absent:
        def find_spec(self, name, path, target=None):
            if name == "tensorflow":
                raise ModuleNotFoundError(name, name=name)
    sys.meta_path.insert(0, Absent())
"""


def run_without_tensorflow(code, backend=None):
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment |= {"KERAS_BACKEND": backend} if backend else {}
    command = [sys.executable, "-c", ABSENT + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_commands_choose_jax_where_tensorflow_is_not_installed(tmp_path):
    image = tmp_path / "cat.png"
    arguments = ["generate", "cat face", "--num-inference-steps", "1", "--output", str(image)]
    code = f"    sys.argv = ['keras-sd', *{arguments}]\n    from keras_sd.__main__ import main\n    main()\n"
    done = run_without_tensorflow(code)
    assert done.returncode == 0, done.stderr
    assert image.is_file()


@pytest.mark.parametrize(
    "line",
    [
        "import keras_sd; keras_sd.StableDiffusion",
        "from keras_sd.models.unet import UNet",
        "from keras_sd.keras_cv.models import StableDiffusion",
        "import keras_sd.backend",
    ],
)
def test_bare_use_without_tensorflow_names_the_variable(line):
    done = run_without_tensorflow(f"    {line}\n")
    last = done.stderr.splitlines()[-1]
    assert "UserError: tensorflow: not installed" in last and "KERAS_BACKEND=jax" in last


def test_a_missing_package_of_an_extra_is_one_line_at_import():
    done = run_without_tensorflow("    sys.modules['jax'] = None\n    import keras_sd.models.vae\n", "jax")
    last = done.stderr.splitlines()[-1]
    assert "UserError: jax: not installed; pip install 'keras_sd[jax]'" in last
    assert "KERAS_BACKEND=tensorflow where TensorFlow is installed" in last


def test_installed_distributions_are_listed_once():
    """The finder that names missing packages leaves other imports, and the list of packages, alone."""
    assert len(list(importlib.metadata.distributions(name="keras"))) == 1


def test_import_leaves_environment_and_cache_alone(tmp_path):
    code = """if True:
        import os
        before = dict(os.environ)
        from keras_sd import StableDiffusion
        # These are of Keras, TensorFlow and the like.
        assert before.get("TF_XLA_FLAGS") == os.environ.get("TF_XLA_FLAGS")
    """
    environment = {**os.environ, "KERAS_SD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()
