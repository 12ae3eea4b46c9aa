"""What the package offers as its own: the names, and that they cost nothing before they are used."""

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import keras_sd
from keras_sd import Method, Sampler
from keras_sd.diffusion.rows import NOISE, SAMPLE, Row
from keras_sd.diffusion.spacing import ddim_steps
from keras_sd.pipeline.stable_diffusion import SamplingOptions
from tests import tiny
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
    with pytest.raises(AttributeError, match="No keras_sd attribute StableDifusion"):
        _ = keras_sd.StableDifusion


def test_type_checkers_see_the_same_names():
    """A stub offers what it imports under the same name, and the package reads its names from the stub."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in imported)
    assert {"__version__", *(alias.name for alias in imported)} == set(keras_sd.__all__)
    assert (PACKAGE / "py.typed").is_file()


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, "progress": False}


def test_sampler_of_ones_own_is_computed(pipeline):
    """As CONTRIBUTING.md shows it: DDIM, defined outside of the package."""

    def rows(steps, run):
        for timestep, level, end in steps:
            yield Row(timestep, level, end, end.signal_rate * SAMPLE + end.noise_rate * NOISE)

    mine = Sampler("Mine", "DDIM without fresh noise", method=Method(ddim_steps, rows, clips=True))
    made, expected = (
        pipeline.text_to_image("red heart", sampler=sampler, **OPTIONS) for sampler in (mine, "ddim")
    )
    np.testing.assert_array_equal(made, expected)
    assert (made != pipeline.text_to_image("red heart", sampler="euler", **OPTIONS)).any()


def test_former_names_still_work_and_warn_at_the_callers_line(pipeline):
    former = {**OPTIONS, "num_steps": 4}
    del former["num_inference_steps"]
    with pytest.warns(DeprecationWarning, match="num_steps is now called num_inference_steps") as told:
        image = pipeline.text_to_image("red heart", **former)
    assert told[0].filename == __file__
    np.testing.assert_array_equal(image, pipeline.text_to_image("red heart", **OPTIONS))
    for function in (pipeline.reconstruct, pipeline.encode_image):
        with pytest.warns(DeprecationWarning, match="images is now called image") as told:
            by_former_name = function(images=image)
        assert told[0].filename == __file__
        np.testing.assert_array_equal(by_former_name, function(image))
    with pytest.raises(TypeError, match="former name"):
        pipeline.encode_image(image=image, images=image)


def public_callables():
    """Title -> function, of the public functions and of the public methods and properties of the classes."""
    found = {}
    for value in (getattr(keras_sd, name) for name in keras_sd.__all__):
        if inspect.isfunction(value):
            found[f"{value.__module__}.{value.__name__}"] = value
        own = [c for c in getattr(value, "__mro__", ()) if c.__module__.startswith("keras_sd")]
        for class_, (name, member) in ((c, item) for c in own for item in vars(c).items()):
            for wrapper in ("__func__", "fget", "func"):
                member = getattr(member, wrapper, member)
            is_ours = inspect.isfunction(member) and member.__module__.startswith("keras_sd")
            if is_ours and (not name.startswith("_") or name in ("__init__", "__call__")):
                found[f"{class_.__module__}.{class_.__name__}.{name}"] = member
    return found


def test_every_public_callable_has_all_hints():
    without = {}
    for title, function in public_callables().items():
        signature = inspect.signature(function)
        hints = {name: each.annotation for name, each in signature.parameters.items()}
        hints["return"] = signature.return_annotation
        missing = [name for name in hints if hints[name] is signature.empty and name not in ("self", "cls")]
        if missing:
            without[title] = missing
    assert len(public_callables()) > 150 and not without


@pytest.mark.parametrize("task", ["image_to_image", "inpaint", "upscale", "random_walk"])
def test_help_names_every_argument_of_a_task(task):
    """What a task passes on is what the others have too, with the same default."""
    shared = inspect.signature(keras_sd.StableDiffusion.text_to_image).parameters
    signature = inspect.signature(getattr(keras_sd.StableDiffusion, task))
    for name in SamplingOptions.__annotations__:
        assert signature.parameters[name].default == shared[name].default
    assert not any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    assert set(shared) <= {*signature.parameters, "height", "width", "prompt", "num_images"}


def test_names_that_users_meet_first_show_an_example():
    sd = keras_sd.StableDiffusion
    first = [sd, sd.text_to_image, sd.load, sd.save, sd.load_lora, keras_sd.UNet, keras_sd.Upscaler]
    first += [keras_sd.KernelInceptionDistance, keras_sd.EMACallback, keras_sd.Trainer, keras_sd.Sampler]
    for shown in first:
        code = re.search(r"Example:\n    ```python\n(.*?)    ```", inspect.getdoc(shown), re.DOTALL)[1]
        compile(textwrap.dedent(code), shown.__name__, "exec")


@pytest.mark.parametrize("backend", ["foo", "JAX", "torch", "numpy"])
def test_unsupported_backend_is_one_line(backend):
    """Keras would import some of them without a word."""
    code = """if True:
        import keras_sd
        try:
            keras_sd.UNet
        except keras_sd.UserError as error:
            print(error)
    """
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    line = f"KERAS_BACKEND {backend!r}: unknown; use tensorflow or jax\n"
    assert (done.returncode, done.stdout) == (0, line), done.stderr
