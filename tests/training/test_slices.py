"""Weights split among processes train as on one device; any number of devices reads their checkpoints."""

import contextlib
import json
import shutil
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.errors import UserError
from keras_sd.training import slices
from keras_sd.training.checkpoints import Checkpoints
from tests import tiny
from tests.programs import Program

STEPS, HALF = 4, 2


def start(folder, run, *more, devices=1, place=None):
    """Starts a run in a folder of `place`, which is `folder` if it is not given."""
    arguments = ["-m", "keras_sd.train", "ddim", "--train-data-dir", folder / "images"]
    arguments += [
        "--unet-config",
        folder / "unet.json",
        "--output-dir",
        (folder if place is None else place) / run,
    ]
    arguments += ["--train-batch-size", 4, "--lr-warmup-steps", 1, "--evaluation-steps", 0, "--post-hoc-ema"]
    arguments += ["--checkpointing-steps", HALF, "--max-train-steps", STEPS, "--ema-decay", 0.9, *more]
    return Program(arguments, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")


def finish(*programs):
    for done in [program.finish() for program in programs]:
        assert done.returncode == 0, done.stderr


def two_processes():
    """The flags of each of two processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    together = ("--distribution", "fsdp", "--coordinator", address, "--num-processes", 2, "--process-id")
    return [(*together, index) for index in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on one device, one of two processes with two devices each, and how that goes on elsewhere."""
    folder = tmp_path_factory.mktemp("slices")
    tiny.pixel_folder(folder, 8)
    finish(*(start(folder, folder / "together", *together, devices=2) for together in two_processes()))
    for run in ("on-four", "on-one"):
        half = f"checkpoint-{HALF}"
        shutil.copytree(folder / "together" / half, folder / run / half)
    resumed = ("--resume-from-checkpoint", "latest")
    finish(
        start(folder, folder / "alone"),
        start(folder, folder / "on-four", *resumed, "--distribution", "fsdp", devices=4),
    )
    finish(start(folder, folder / "on-one", *resumed))
    return folder


def losses(folder):
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.parametrize("run", ["together", "on-four", "on-one"])
def test_losses_and_weights_are_those_of_one_device(runs, run):
    expected, found = losses(runs / "alone"), losses(runs / run)
    assert sorted(found) == ([1, 2, 3, 4] if run == "together" else [3, 4])
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    one, other = (
        Checkpoints(runs / name, {}).load(runs / name / f"checkpoint-{STEPS}") for name in ("alone", run)
    )
    assert one.groups.keys() == other.groups.keys()
    for group in ("weights", "ema", "post_hoc_0.1"):
        assert list(one.groups[group]) == list(other.groups[group])
        for name, array in one.groups[group].items():
            np.testing.assert_allclose(other.groups[group][name], array, rtol=1e-3, atol=1e-5)
    alone, exported = (
        load_file(runs / name / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("alone", run)
    )
    assert alone.keys() == exported.keys()
    for name, array in alone.items():
        np.testing.assert_allclose(exported[name], array, rtol=1e-3, atol=1e-5)


def test_each_process_writes_its_slices(runs):
    folder = runs / "together" / f"checkpoint-{HALF}"
    manifest = json.loads((folder / "manifest.json").read_text())
    sliced = manifest["slices"]["weights"]
    assert sliced and manifest["version"] == 2
    files = [slices.file_of("weights", process, 2) for process in range(2)]
    for entry in sliced.values():
        assert sorted(one["file"] for one in entry["slices"]) == sorted(files * 2)
    whole = set(load_file(folder / "weights.safetensors"))
    assert whole and whole | sliced.keys() == set(manifest["tensors"]["weights"])
    assert not whole & sliced.keys()
    snapshot = json.loads(
        (runs / "together" / "post-hoc-ema" / f"checkpoint-{STEPS}" / "manifest.json").read_text()
    )
    assert snapshot["slices"]["post_hoc_0.1"].keys() == sliced.keys()


def test_a_missing_slice_is_one_line(runs, tmp_path):
    shutil.copytree(runs / "together", tmp_path / "run")
    name = slices.file_of("ema", 1, 2)
    (tmp_path / "run" / f"checkpoint-{STEPS}" / name).unlink()
    checkpoints = Checkpoints(tmp_path / "run", {})
    with pytest.raises(UserError, match=rf"not a valid checkpoint: {name} is missing; give another folder"):
        checkpoints.load(tmp_path / "run" / f"checkpoint-{STEPS}")
    with pytest.warns(UserWarning, match=f"{name} is missing"):
        assert checkpoints.latest().name == f"checkpoint-{HALF}"


@pytest.mark.slow
def test_hosts_without_a_common_run_folder_are_told_before_the_first_step(runs, tmp_path):
    """The path of the run folder is relative, and each process is started elsewhere."""
    programs = []
    for index, together in enumerate(two_processes()):
        (tmp_path / str(index)).mkdir()
        with contextlib.chdir(tmp_path / str(index)):
            programs.append(start(runs, "run", *together, devices=2))
    for program in programs:
        done = program.finish()
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert "error: run: process 1 does not see what process 0 wrote; choose an --output-dir on " in line
    assert not list(tmp_path.glob("*/run/*checkpoint*"))


def test_slices_that_do_not_make_a_tensor(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w#0": np.arange(4.0).reshape(2, 2)}, tmp_path / "part")
    first, second = ({"file": "part", "key": "w#0", "start": [row, 0]} for row in (0, 2))
    whole = slices.read(tmp_path, {"w": {"shape": [4, 2], "slices": [first, second]}})["w"]
    np.testing.assert_array_equal(whole, [[0, 1], [2, 3], [0, 1], [2, 3]])
    for entry in (
        {"shape": [4, 2], "slices": [first]},
        {"shape": [4, 2], "slices": []},
        {"shape": [3, 2], "slices": [first, second]},
        {"shape": [4], "slices": [first, second]},
    ):
        with pytest.raises((ValueError, IndexError)):
            slices.read(tmp_path, {"w": entry})
