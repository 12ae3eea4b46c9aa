"""The wheel is complete: installed where nothing else of the project is, it generates offline."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md", "keras_sd")

# Run by the environment's interpreter as it starts: no network, and no TensorFlow under JAX.
EMPTY_ENVIRONMENT = """
import os
import socket
import sys

if os.environ["KERAS_BACKEND"] == "jax":
    sys.modules["tensorflow"] = None  # importing it raises ImportError

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
def wheel(tmp_path_factory):
    """Builds the wheel by way of the source distribution, away from what lies about in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    # The environment of the tests has the build backend; an isolated one would have to download it.
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel, the third-party packages of this one, and no network; its bin folder."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "empty_environment.py").write_text(EMPTY_ENVIRONMENT)
    # A folder added in this way does not have its own .pth files read: an editable keras_sd stays hidden.
    third_party = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site_packages / "tests.pth").write_text("\n".join([*third_party, "import empty_environment"]) + "\n")
    return folder / "bin"


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


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_installed_wheel_generates_offline(environment, backend, tmp_path):
    variables = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_SD_CACHE": os.environ["KERAS_SD_CACHE"],
    }
    where = run(
        environment / "python", "-c", "import keras_sd; print(keras_sd.__file__)", cwd=tmp_path, env=variables
    )
    assert Path(where.strip()).is_relative_to(environment.parent)
    run(
        *(environment / "keras-sd", "generate", "red heart", "--output", "heart.png"),
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
