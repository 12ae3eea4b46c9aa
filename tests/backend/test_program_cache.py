"""Programs are kept between processes: the second one compiles nothing."""

import os
import subprocess
import sys

import pytest

from keras_sd.files.cache import cache_root

PROGRAM = """if True:
    import sys
    import numpy as np
    import keras
    from keras_sd import backend
    from keras_sd.models.layers import dense
    layer = dense(64, 64, use_bias=False, kernel_initializer="ones")
    def function(x):
        for _ in range(int(sys.argv[1])):
            x = keras.ops.softmax(x @ layer.kernel) * 2 + keras.ops.sin(x)
        return x
    call = backend.jit(function, layer.variables)
    inputs = np.linspace(0, 1, 4096, dtype="float32").reshape(64, 64)
    print(float(keras.ops.sum(call(keras.ops.convert_to_tensor(inputs)))))
    print(backend.cache_folder())
"""


def run(name, layers, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(layers)],
        env={**os.environ, "KERAS_BACKEND": name, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def programs(folder):
    """When each was written; JAX keeps the time of the last use in files beside them."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-atime")]
    return {path: path.stat().st_mtime_ns for path in files}


# JAX keeps no program that is compiled in less than a tenth of a second.
@pytest.mark.parametrize(("name", "layers"), [("tensorflow", 20), ("jax", 200)])
def test_a_second_process_finds_the_program(name, layers, tmp_path):
    first, folder = run(name, layers, KERAS_SD_CACHE=str(tmp_path))
    kept = programs(tmp_path)
    assert kept and all(str(path).startswith(folder) for path in kept)
    assert f"/xla/{name}-" in folder
    second, _ = run(name, layers, KERAS_SD_CACHE=str(tmp_path))
    assert second == first
    # Smaller programs, whose compile time is about the least that is kept, may join it.
    assert kept.items() <= programs(tmp_path).items()


def test_a_program_that_was_cut_off_is_replaced(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "KERAS_SD_CACHE": str(tmp_path)}
    written = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "200"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "persistent compilation cache" not in done.stderr, done.stderr
        written.append(programs(tmp_path))
        if len(written) == 1:
            for path in programs(tmp_path):
                path.write_bytes(path.read_bytes()[:-20])
            cut = programs(tmp_path)
    # The second process writes them anew, and the third one finds them.
    assert cut and all(written[1][path] > cut[path] for path in cut)
    assert cut.keys() <= written[2].keys() and all(written[2][path] == written[1][path] for path in cut)
    assert not list(tmp_path.rglob("*.partial"))


def test_nothing_is_kept_if_told_so_or_impossible(tmp_path):
    assert run("tensorflow", 1, KERAS_SD_CACHE="", XDG_CACHE_HOME=str(tmp_path))[1] == "None"
    (tmp_path / "file").touch()
    run("tensorflow", 1, KERAS_SD_CACHE=str(tmp_path / "file"), XDG_CACHE_HOME=str(tmp_path))
    assert not list(tmp_path.rglob("xla"))


def test_root(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_SD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "keras_sd"
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.setenv("KERAS_SD_CACHE", "")
    assert cache_root() is None
