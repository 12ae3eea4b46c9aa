"""What the package offers as its own: the names, and that they cost nothing before they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keras_sd
from tests.programs import run_python

PACKAGE = Path(keras_sd.__file__).parent


def test_import_waits_for_no_backend():
    heavy = "keras", "tensorflow", "jax", "numpy", "PIL"
    code = f"import sys, keras_sd; dir(keras_sd); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_every_public_name_is_there(backend):
    code = "import keras_sd; print(sum(getattr(keras_sd, name) is not None for name in keras_sd.__all__))"
    assert run_python(["-c", code], backend) == f"{len(keras_sd.__all__)}\n"


def test_public_names_are_listed_and_others_refused():
    assert set(keras_sd.__all__) <= set(dir(keras_sd))
    assert len(set(keras_sd.__all__)) == len(keras_sd.__all__)
    with pytest.raises(AttributeError, match="'keras_sd' has no attribute 'StableDifusion'"):
        _ = keras_sd.StableDifusion


def test_type_checkers_see_the_same_names():
    """The stub imports each name from where `__init__.py` finds it."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname: node.module for node in imports for alias in node.names}
    assert imported == keras_sd._MODULES
    (listed,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed) == keras_sd.__all__
    assert (PACKAGE / "py.typed").is_file()
