"""`--plan`: what a run would take, of the devices at hand and of TPUs that are not there."""

import json
import os
import re
import subprocess
import sys

import pytest

from keras_sd.backend.chips import TPUS, chip_of
from keras_sd.cli.train import plan
from keras_sd.cli.train.main import main
from tests import tiny
from tests.programs import Program

BAD = [
    (
        ["--plan", "v7:2x2"],
        "--plan v7:2x2: neither `here` nor a known layout of TPUs; give one",
    ),
    (["--plan", "v5e:2x2x2"], "--plan v5e:2x2x2: neither"),
    (["--plan", "v5p:2x2"], "--plan v5p:2x2: neither"),
    (["--plan", "v5e:0x4"], "--plan v5e:0x4: neither"),
    (
        ["--plan", "v5e:2x4", "--num-processes", "3"],
        "--num-processes 3: the 8 chips of v5e:2x4 do not",
    ),
    (["--plan", "here", "--num-processes", "2"], "--num-processes: has no effect with --plan here"),
    (["--plan", "here", "--resume-from-checkpoint", "latest"], "--resume-from-checkpoint: has no effect"),
    (["--plan", "v5e:2x4", "--process-id", "0"], "--process-id: has no effect with --plan"),
]


@pytest.mark.parametrize(("options", "line"), BAD)
def test_bad_options_are_told_in_one_line(options, line, run_program, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    code, printed, errors = run_program(main, "lora", *options)
    assert (code, printed) == (2, "")
    assert line in errors
    assert errors.count("\n") == 1


def test_the_backend_must_be_jax(run_program, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    code, _, errors = run_program(main, "lora", "--plan", "here")
    assert code == 2
    assert "--plan here: needs JAX; set KERAS_BACKEND=jax" in errors


def test_tpus_need_libtpu(run_program, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setitem(sys.modules, "libtpu", None)
    code, _, errors = run_program(main, "lora", "--plan", "v5e:2x4")
    assert code == 2
    assert "libtpu: not installed; pip install 'keras_sd[tpu-plan]'" in errors


def test_chips_are_known_by_the_names_that_jax_gives_them():
    assert chip_of("TPU v5 lite") is TPUS["v5e"]
    assert chip_of("TPU v5p") is chip_of("TPU v5") is TPUS["v5p"]
    assert chip_of("TPU v6 lite") is TPUS["v6e"]
    assert chip_of("NVIDIA H100 80GB HBM3").operations == 989e12
    assert chip_of("cpu") is None


def test_topologies_are_counted():
    assert plan.chip_count("v5e:2x4") == 8
    assert plan.chip_count("v5p:2x2x4") == 16
    assert plan.chip_count("v5e") is None


FOUND = {
    "batch_size": 8,
    "sample_shape": [64, 64, 4],
    "mixed_precision": "bf16",
    "device_kind": "TPU v5 lite",
    "devices": 4,
    "memory": None,
    "programs": [
        {
            "title": "training step",
            "batch": 8,
            "memory": {"arguments": 3 * 2**30, "results": 2**20, "temporaries": 2**30},
            "needed": None,
            "available": None,
            "operations": 197e10,
            "traffic": 819e7,
            "sent": {"all-reduce": 5 * 2**20},
            "seconds": 61.2,
        },
        {
            "title": "VAE decoder",
            "batch": 4,
            "memory": None,
            "needed": 17 * 2**30,
            "available": 15.75 * 2**30,
            "operations": 2e12,
            "traffic": 0,
            "sent": {},
            "seconds": 9.0,
        },
    ],
}


def test_the_table_tells_memory_operations_and_bounds():
    lines = plan.as_text(FOUND, "lora", "v5e:2x2").splitlines()
    assert lines[0].startswith(
        "lora, batch size 8, samples 64 x 64 x 4, mixed precision bf16, on 4 x TPU v5 lite"
    )
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line[:1] == "|"]
    assert cells[0] == [
        *("program", "batch", "arguments", "temporaries", "outputs", "sum", "TFLOP", "all-reduce"),
        "compiled in",
    ]
    assert cells[2] == [
        *("training step", "8", "3.00 GiB", "1.00 GiB", "1.00 MiB", "4.00 GiB", "1.97", "5.00 MiB", "61 s"),
    ]
    assert cells[3] == ["VAE decoder", "4", "-", "-", "-", "17.00 GiB", "2", "0.00 MiB", "9 s"]
    rest = "\n".join(lines[-4:])
    assert "the VAE decoder does not fit: the compiler finds 17.00 GiB needed and 15.75 GiB there" in rest
    assert "the training step fits: 4.00 GiB of 15.75 GiB" in rest
    assert "at most 800 images/s on all devices by the 197 TFLOP/s" in rest
    assert "at most 800 images/s by its 819 GB/s" in rest


def test_what_changes_a_plan_changes_the_name_of_what_is_kept(tmp_path, monkeypatch):
    config = tmp_path / "unet.json"
    tiny.ONE_LEVEL_PIXEL_UNET.save(config)
    options = {"plan": "v5e:2x2", "unet_config": str(config), "output_dir": "a", "train_batch_size": 4}
    name = plan._key("ddim", options)
    assert plan._key("ddim", options | {"output_dir": "b"}) == name
    others = [plan._key("ddim", options | {"train_batch_size": 8}), plan._key("vae", options)]
    others.append(plan._key("ddim", options | {"plan": "v5e:2x4"}))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other")
    others.append(plan._key("ddim", options))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    config.write_text(config.read_text() + " ")
    others.append(plan._key("ddim", options))
    assert len({name, *others}) == 6


def plan_here(folder, cache, batch_size, devices):
    """Plans a small run on so many devices of the processor."""
    arguments = [
        *("-m", "keras_sd.train", "ddim", "--plan", "here", "--resolution", "8"),
        *("--unet-config", folder / "unet.json", "--dataset-name", "emoji", "--max-train-samples", "16"),
        *("--train-batch-size", batch_size, "--kid-images", "0", "--output-dir", folder / "run"),
        *(("--distribution", "data") if devices > 1 else ()),
    ]
    cache.mkdir(exist_ok=True)
    flags = f"--xla_force_host_platform_device_count={devices}"
    return Program(arguments, XLA_FLAGS=flags, KERAS_SD_CACHE=str(cache))


def test_linked_and_listed_folders_change_the_name_of_what_is_kept(tmp_path):
    """The parts of a model may be links, here one that leads back as well, and a file may list folders."""
    for name in ("model", "parts", "images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/unet").symlink_to(tmp_path / "parts")
    (tmp_path / "parts/back").symlink_to(tmp_path / "model")
    config = tmp_path / "sets.toml"
    folders = f'image_dir = "{tmp_path / "images"}"\nconditioning_data_dir = "{tmp_path / "masks"}"'
    config.write_text(f"[[datasets]]\n[[datasets.subsets]]\n{folders}\n")
    model = {"plan": "v5e:2x2", "pretrained_model_name_or_path": str(tmp_path / "model")}
    options = model | {"dataset_config": str(config)}
    names = [plan._key("lora", options)]
    for path in ("parts/config.json", "images/1.png", "masks/1.png"):
        (tmp_path / path).write_text("{}")
        names.append(plan._key("lora", options))
    assert len(set(names)) == 4


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The folder of a plan on eight devices that was asked for twice, and both answers."""
    folder = tmp_path_factory.mktemp("plan")
    tiny.ONE_LEVEL_PIXEL_UNET.save(folder / "unet.json")
    return folder, *(plan_here(folder, folder / "cache", 16, 8).finish() for _ in range(2))


def kept_programs(cache):
    """The programs of the one plan that a cache keeps, by title."""
    found = (json.loads(path.read_bytes()[32:]) for path in (cache / "plans").iterdir())
    (programs,) = [each["programs"] for each in found if "programs" in each]
    return {program["title"]: program for program in programs}


def test_a_plan_tells_what_the_step_takes_and_sends(planned):
    folder, first, _ = planned
    assert first.returncode == 0, first.stderr
    assert "plan: compiling the training step" in first.stderr
    rows = re.findall(r"^\| ([a-z ]*?) +\| (\d+) .* ([\d.]+) MiB +\| \d+ s", first.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("training step", "16"), ("sampling step", "16")]
    from keras_sd import UNet

    weights = sum(
        4 * variable.numpy().size for variable in UNet(tiny.ONE_LEVEL_PIXEL_UNET).trainable_variables
    )
    # The gradients, and a few sums of the loss and its norm.
    assert float(rows[0][2]) == pytest.approx(weights / 2**20, abs=0.02)
    assert not (folder / "run").exists()


def test_a_device_of_eight_computes_what_one_does_at_an_eighth_of_the_batch(planned):
    folder, *_ = planned
    done = plan_here(folder, folder / "alone", 2, 1).finish()
    assert done.returncode == 0, done.stderr
    eight, one = (kept_programs(folder / name)["training step"] for name in ("cache", "alone"))
    assert one["sent"] == {} and set(eight["sent"]) == {"all-reduce"}
    assert eight["operations"] == pytest.approx(one["operations"], rel=0.02)


def test_a_plan_is_kept(planned):
    _, first, second = planned
    assert second.stdout == first.stdout
    assert "compiling" not in second.stderr


@pytest.mark.slow
def test_a_plan_for_tpus_compiles_for_them(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "KERAS_SD_CACHE": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "keras_sd.train",
            "text-to-image",
            "--plan",
            "v5e:2x2",
            "--evaluation-steps",
            "0",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "on 4 x TPU v5 lite (v5e:2x2); compiled, not run" in done.stdout
    step = kept_programs(tmp_path)["training step"]
    from keras_sd import UNet
    from keras_sd.data.emoji.architecture import EMOJI_UNET

    weights = sum(variable.numpy().size for variable in UNet(EMOJI_UNET).trainable_variables)
    # The gradients are bfloat16, as the layers are.
    assert step["sent"]["all-reduce"] == pytest.approx(2 * weights, rel=0.02)
    # Weights, two moments and the average, in whole tiles.
    assert 1 < step["memory"]["arguments"] / (16 * weights) < 1.4
