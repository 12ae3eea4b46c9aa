"""Averages made after a run against the true ones, from the weights of every step."""

import shutil

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.training.pixel_ddim import train_pixel_ddim
from keras_sd.training.post_hoc_ema import (
    SIGMAS,
    Profile,
    Snapshots,
    coefficients,
    gamma_of,
    group_of,
    inner_product,
    narrowed,
)
from keras_sd.training.settings import Settings
from tests import tiny

SCHEDULER = SchedulerConfig(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
IMAGES = [
    {"image": np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype="uint8")} for index in range(12)
]
STEPS, EVERY = 60, 3


def train(folder, steps=STEPS, every=EVERY, **options):
    settings = Settings(
        **{
            "output_dir": folder,
            "max_train_steps": steps,
            "train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "checkpointing_steps": every,
            "checkpoints_total_limit": None,
            "evaluation_steps": 0,
            "jit_compile": False,
            "post_hoc_ema": "float32",
            **options,
        }
    )
    keras.utils.set_random_seed(0)
    assert train_pixel_ddim(settings, tiny.ONE_LEVEL_PIXEL_UNET, SCHEDULER, IMAGES)
    keras.config.set_dtype_policy("float32")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with snapshots at every third step."""
    return train(tmp_path_factory.mktemp("post-hoc"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights after each step of the same run, which keeps no averages."""
    folder = train(tmp_path_factory.mktemp("every-step"), every=1, post_hoc_ema=None)
    return [load_file(folder / f"checkpoint-{step}" / "weights.safetensors") for step in range(1, STEPS + 1)]


def true_average(weights, gamma):
    """Of the weights so far: each step counts as the power function's integral over it."""
    ends = (np.arange(len(weights) + 1) / len(weights)) ** (gamma + 1)
    return {
        name: np.tensordot(np.diff(ends), [one[name].astype("float64") for one in weights], 1)
        for name in weights[0]
    }


def relative_error(found, expected):
    apart, whole = (
        np.concatenate([np.ravel(part) for part in parts])
        for parts in ([found[name] - expected[name] for name in expected], expected.values())
    )
    return np.linalg.norm(apart) / np.linalg.norm(whole)


def test_averages_of_the_step_are_power_functions(run, weights):
    for step in (EVERY, STEPS):
        for sigma in SIGMAS:
            file = run / f"checkpoint-{step}" / f"{group_of(sigma)}.safetensors"
            expected = true_average(weights[:step], gamma_of(sigma))
            assert relative_error(load_file(file), expected) < 1e-6
    snapshots = Snapshots(run)
    assert snapshots.steps == list(range(EVERY, STEPS + 1, EVERY))


@pytest.mark.parametrize("step", [None, 36])
@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.075, 0.1, 0.15, 0.2])
def test_any_length_is_made_after_the_run(run, weights, sigma, step):
    found, distance = Snapshots(run).average(sigma, step)
    last = weights[: step or STEPS]
    expected = true_average(last, gamma_of(sigma))
    error = relative_error(found, expected)
    assert error < 0.01
    assert error < 0.3 * relative_error(last[-1], expected)  # the weights are further away
    assert distance < (1e-5 if sigma in SIGMAS else 0.1)


def test_a_length_that_the_snapshots_do_not_give_is_told(run):
    assert Snapshots(run).average(0.25)[1] > 0.05


def test_killed_and_resumed_run_has_the_same_averages(run, tmp_path):
    ignored = shutil.ignore_patterns("checkpoint-60", "model")
    killed = shutil.copytree(run, tmp_path / "killed", ignore=ignored)
    for step in range(36, STEPS, EVERY):
        shutil.rmtree(killed / f"checkpoint-{step}")
    shutil.copytree(run / "post-hoc-ema/checkpoint-60", killed / "post-hoc-ema/checkpoint-60")
    # What was written after the checkpoint is of the same run, and is written again.
    with pytest.warns(UserWarning, match="set aside as abandoned"):
        train(killed, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-60"]
    for path in run.glob("post-hoc-ema/checkpoint-*/post_hoc_*"):
        again = killed / path.relative_to(run)
        assert path.read_bytes() == again.read_bytes()
    with pytest.raises(UserError, match="has no averages for `post_hoc_ema`"):
        bare = train(tmp_path / "bare", steps=2, every=2, post_hoc_ema=None)
        train(bare, steps=4, every=2, resume_from_checkpoint="latest")


def test_accumulated_batches_are_one_update(tmp_path):
    folder = train(tmp_path, steps=3, every=1, gradient_accumulation_steps=2, post_hoc_ema="float16")
    steps = [load_file(folder / f"checkpoint-{step}/weights.safetensors") for step in (1, 2, 3)]
    found, _ = Snapshots(folder).average(0.05)
    assert relative_error(found, true_average(steps, gamma_of(0.05))) < 1e-3  # of float16


def test_lengths_and_products_are_those_of_the_paper():
    # Table 4 of the paper's appendix: sigma_rel 0.05 and 0.10.
    assert [gamma_of(sigma) for sigma in SIGMAS] == pytest.approx([16.97, 6.94], abs=0.005)
    for sigma in (0.02, 0.1, 0.25):
        gamma = gamma_of(sigma)
        assert ((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5) == pytest.approx(sigma)
    first, second = Profile(3.0, 2.5), Profile(5.0, 7.0)
    times = (np.arange(300_000) + 0.5) / 1e5
    powers = [(one.gamma + 1) / one.updates * (times / one.updates) ** one.gamma for one in (first, second)]
    expected = (powers[0] * powers[1]).sum() / 1e5
    assert inner_product(first, second) == pytest.approx(expected, rel=1e-6)
    assert inner_product(second, first) == pytest.approx(expected, rel=1e-6)
    kept = [Profile(step * 1e6, gamma_of(sigma)) for step in range(1, 65) for sigma in SIGMAS]
    found, distance = coefficients(kept, Profile(64e6, gamma_of(0.15)))
    assert distance < 0.01 and np.isfinite(found).all() and found.sum() == pytest.approx(1, abs=0.01)


def test_bad_input_is_named(run, tmp_path):
    for sigma in (0.001, 0.3):
        with pytest.raises(UserError, match=f"sigma_rel {sigma}: out of range"):
            gamma_of(sigma)
    with pytest.raises(UserError, match="step 7: has no snapshot; choose one of the last ones, 39, 42"):
        Snapshots(run).folder(7)
    with pytest.raises(UserError, match="has no snapshots"):
        Snapshots(tmp_path)
    with pytest.raises(UserError, match="post_hoc_ema float16: w has a number too large"):
        narrowed({"w": np.array([1e5], "float32")}, "float16")
    with pytest.raises(UserError, match="post_hoc_ema float16: its averages are kept in the device"):
        Settings(tmp_path, post_hoc_ema="float16", offload_ema=True)
    damaged = shutil.copytree(run / "post-hoc-ema", tmp_path / "run" / "post-hoc-ema")
    file = damaged / "checkpoint-12" / "post_hoc_0.05.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checkpoint-12: not a valid checkpoint: post_hoc_0.05"):
        Snapshots(tmp_path / "run").average(0.1)
