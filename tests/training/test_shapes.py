"""Batches of several shapes train as one run, on both backends, with one compiled step for each shape."""

import json

import keras
import numpy as np
import pytest

from tests.programs import run_python
from tests.training import shape_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Backend -> (traces of each run, {run: weights})."""
    results = {}
    for name in ("tensorflow", "jax"):
        folder = tmp_path_factory.mktemp(name)
        if name == keras.backend.backend():
            traces = shape_runs.run_all(folder)
        else:
            printed = run_python(["-m", "tests.training.shape_runs", folder], backend=name)
            traces = json.loads(printed.splitlines()[-1])
        results[name] = traces, {run: dict(np.load(folder / f"{run}.npz")) for run in traces}
    return results


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_one_program_for_each_shape(trained, backend):
    traces, _ = trained[backend]
    assert traces["whole"] == len(shape_runs.SHAPES)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_resumed_run_is_the_same_to_the_bit(trained, backend):
    _, weights = trained[backend]
    for key, array in weights["whole"].items():
        np.testing.assert_array_equal(weights["resumed"][key], array, err_msg=key)


def test_backends_agree(trained):
    for key, array in trained["tensorflow"][1]["whole"].items():
        np.testing.assert_allclose(trained["jax"][1]["whole"][key], array, atol=2e-3, err_msg=key)
