"""Flags that save memory or time change no number of a run: three steps of `fit()` with and without each."""

import keras
import numpy as np
import pytest

from tests.programs import run_python
from tests.training import flag_runs


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def trained(request, tmp_path_factory):
    """What each of `flag_runs.RUNS` has trained, as {run: {"weights/NAME": array}}."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == keras.backend.backend():
        for name in flag_runs.RUNS:
            flag_runs.run(folder, name)
        keras.config.set_dtype_policy("float32")
    else:
        run_python(["-m", "tests.training.flag_runs", folder], backend=request.param)
    return {name: dict(np.load(folder / f"{name}.npz")) for name in flag_runs.RUNS}


def group(arrays, name):
    return {
        key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")
    }


def has_no_gradient(name):
    """A key's bias moves all scores of a query alike."""
    return name.endswith("k_proj.bias")


FLAGS = [name for name in flag_runs.RUNS if name not in ("full", "LoRA") and "bf16" not in name]


@pytest.mark.parametrize("name", FLAGS)
def test_flag_changes_no_weight_and_no_average(trained, name):
    plain, flagged = trained[name.split(",")[0]], trained[name]
    assert plain.keys() == flagged.keys()
    for key, array in plain.items():
        # Every weight has moved by about 0.01 in each step. What has no gradient moves by a rounding error,
        # which Adam divides by its own size.
        tolerance = 3e-2 if has_no_gradient(key) else 1e-4
        np.testing.assert_allclose(flagged[key], array, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", flag_runs.RUNS)
def test_every_trained_weight_moves(trained, name):
    start, weights, averages = (group(trained[name], part) for part in ("start", "weights", "ema"))
    for key, array in start.items():
        if has_no_gradient(key):
            continue
        assert np.abs(weights[key] - array).max() > 5e-3, key
        assert np.abs(averages[key] - array).max() > 1e-3, key


def test_recomputation_in_half_precision_differs_by_rounding(trained):
    plain, recomputed = (trained[name] for name in ("LoRA, bf16", "LoRA, bf16, recomputed"))
    moved, apart = (
        np.concatenate([np.ravel(one[f"weights/{key}"] - other) for key, other in against.items()])
        for one, against in ((plain, group(plain, "start")), (recomputed, group(plain, "weights")))
    )
    # Adam turns gradients into their signs, and rounding changes those of the smallest.
    assert np.linalg.norm(apart) < 0.2 * np.linalg.norm(moved)
