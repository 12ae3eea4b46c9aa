"""Checkpoints: exact round trip, damage is found, faults are told, and no kill breaks the newest one."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from keras_sd.data.captions import Captions
from keras_sd.errors import UserError
from keras_sd.training import checkpoints as module
from keras_sd.training.checkpoints import UNNAMED, Checkpoints, check_same_run
from keras_sd.training.diffusion_settings import DiffusionSettings

CONFIG = {"seed": 0, "network": {"channels": [32, 64], "width": 32}}


def small_groups(step: int = 0) -> dict:
    generator = np.random.default_rng(step)
    return {
        "weights": {"b.kernel": generator.normal(size=(3, 4)).astype("float32"), "a": np.float32(step)},
        "optimizer": {"iterations": np.int64(step), "v": generator.normal(size=100).astype("float32")},
    }


def assert_same(actual: dict, expected: dict):
    assert list(actual) == list(expected)
    for group in expected:
        assert list(actual[group]) == list(expected[group])
        for name, tensor in expected[group].items():
            other, tensor = actual[group][name], np.asarray(tensor)
            assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
            assert other.tobytes() == tensor.tobytes(), name


@pytest.mark.filterwarnings("error")
def test_every_dtype_shape_and_order_round_trips_bit_for_bit(tmp_path):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 256, size=(4, 6, 8), dtype=np.uint8)  # NaNs and denormals too
    dtypes = ["float32", "float16", ml_dtypes.bfloat16, "int32", "int64", "uint8", "uint32", "float64"]
    weights = {f"z{i}.{np.dtype(dtype)}": bits.view(dtype) for i, dtype in enumerate(dtypes[::-1])}
    weights |= {
        "bool": bits > 100,
        "scalar": np.float32(-0.0),
        "scalar bfloat16": np.array(1.5, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), "float32"),
        "transposed": bits.view("float32").T,
        "strided": bits.view("int32")[::2, ::-1, 1:],
        "aaa": np.arange(3),
    }
    groups = {"weights": weights, "ema": {}, "optimizer": {"iterations": np.int64(2**62)}}
    position = {"iterator": {"next": 12345678901234567890, "seeds": [1, 2]}, "epoch": 0.1, "text": "é\n"}
    checkpoints = Checkpoints(tmp_path / "new" / "run", CONFIG)
    folder = checkpoints.save(7, groups, position)
    assert folder == tmp_path / "new" / "run" / "checkpoint-7" == checkpoints.latest()
    checkpoint = checkpoints.load(folder)
    assert checkpoint.step == 7 and checkpoint.position == position
    assert_same(checkpoint.groups, groups)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["manifest.json", "config.json", "position.json"] + [f"{name}.safetensors" for name in groups]
    )
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_loading_needs_nothing_else_imported(tmp_path):
    Checkpoints(tmp_path, CONFIG).save(1, {"weights": {"a": np.ones(2, ml_dtypes.bfloat16)}}, {})
    code = (
        "import sys; from keras_sd.training.checkpoints import Checkpoints; c = Checkpoints(sys.argv[1], {});"
        "print(c.load(c.latest()).groups['weights']['a'].dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "bfloat16\n"


def test_newest_is_by_number(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (100, 9, 20):
        checkpoints.save(step, small_groups(step), {})
    assert checkpoints.latest().name == "checkpoint-100"


@pytest.mark.parametrize("file", ["manifest.json", "config.json", "position.json", "weights.safetensors"])
def test_every_damage_of_every_file_is_detected(tmp_path, file):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    good = checkpoints.save(1, small_groups(1), {"next": 1})
    path = checkpoints.save(2, small_groups(2), {"next": 2}) / file
    content = path.read_bytes()
    damages = {
        "truncated": content[:-1],
        "longer": content + b"\n",
        "empty": b"",
        "not UTF-8": b"\xff" + content[1:],
        "brackets": b"[" * 200_000 + b"]" * 200_000,
    }
    for at in range(0, len(content), max(1, len(content) // 40)):
        damages[f"bit flipped at {at}"] = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    for name, damage in damages.items():
        path.write_bytes(damage)
        with pytest.warns(UserWarning, match=f"checkpoint-2: skipped.*{file}|format version") as told:
            assert checkpoints.latest() == good, name
        assert len(told) == 1 and "\n" not in str(told[0].message)
        with pytest.raises(UserError, match="checkpoint-2: not a valid checkpoint"):
            checkpoints.load(path.parent)
    path.unlink()
    with pytest.warns(UserWarning, match=f"{file} is missing"):
        assert checkpoints.latest() == good
    path.mkdir()
    with pytest.warns(UserWarning, match="checkpoint-2: skipped"):
        assert checkpoints.latest() == good
    path.rmdir()
    path.write_bytes(content)
    with warnings.catch_warnings(action="error"):
        assert checkpoints.latest() == path.parent


def test_other_version_and_renamed_folder_are_skipped(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    manifest = checkpoints.save(1, small_groups(), {}) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(module._manifest_text({**content, "version": 3}))
    with pytest.warns(UserWarning, match="format version 3 is not supported"):
        assert checkpoints.latest() is None
    checkpoints.save(3, small_groups(), {}).rename(tmp_path / "checkpoint-4")
    (manifest.parent / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="another step|manifest.json is missing"):
        assert checkpoints.latest() is None


def resealed(folder, change):
    """Changes the manifest of a checkpoint, and makes it whole again, as a writer at fault would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(module._manifest_text(manifest))


def rewritten(name, content):
    def change(folder):
        (folder / name).write_bytes(content)
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        resealed(folder, lambda manifest: manifest["files"].update({name: entry}))

    return change


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: resealed(folder, lambda manifest: manifest.update(step="2")), "step '2'"),
        (lambda folder: resealed(folder, lambda manifest: manifest.pop("files")), "has no files"),
        (
            lambda folder: resealed(folder, lambda manifest: manifest.update(files=[])),
            "not a JSON dictionary",
        ),
        (lambda folder: resealed(folder, lambda manifest: manifest["tensors"].update(ema=["a"])), "ema"),
        (
            lambda folder: resealed(folder, lambda manifest: manifest["tensors"]["weights"].pop()),
            "holds other",
        ),
        (
            lambda folder: resealed(
                folder, lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": ""}})
            ),
            "not in its folder",
        ),
        (rewritten("position.json", b"[" * 100_000), "position.json: not a JSON file"),
        (rewritten("config.json", b"[]"), "config.json: not a JSON dictionary"),
        (rewritten("weights.safetensors", b"no tensors"), "header"),
    ],
)
def test_a_newest_one_that_cannot_be_read_is_skipped_with_a_line(tmp_path, damage, fault):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (1, 2):
        checkpoints.save(step, small_groups(step), {"epoch": step})
    damage(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=f"checkpoint-2: skipped, not a valid checkpoint: .*{fault}"):
        assert Checkpoints(tmp_path, CONFIG).latest() == tmp_path / "checkpoint-1"


def test_rotation_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG, total_limit=2)
    for step in (8, 9, 10, 11):
        checkpoints.save(step, small_groups(step), {})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-11"]
    with pytest.raises(UserError, match="give 1 or more"):
        Checkpoints(tmp_path, CONFIG, total_limit=0)


def test_rotation_never_removes_the_written_nor_the_newest_valid(tmp_path):
    everything = Checkpoints(tmp_path, CONFIG)
    for step in (10, 20, 30, 40):
        everything.save(step, small_groups(step), {})
    (tmp_path / "checkpoint-40" / "weights.safetensors").unlink()
    # Resumed from 10 by name: 15 is older than the newest valid one, 30.
    checkpoints = Checkpoints(tmp_path, CONFIG, total_limit=1)
    checkpoints.save(15, small_groups(15), {})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-15", "checkpoint-30"]
    assert checkpoints.latest().name == "checkpoint-30"


def test_resuming_an_older_one_sets_the_newer_ones_aside_at_the_first_save(tmp_path):
    everything = Checkpoints(tmp_path, CONFIG)
    for step in (10, 20, 30, 40):
        everything.save(step, small_groups(step), {})
    (tmp_path / "checkpoint-40" / "weights.safetensors").unlink()
    (tmp_path / "abandoned-checkpoint-30").mkdir()
    checkpoints = Checkpoints(tmp_path, CONFIG)
    folder = checkpoints.resolve("checkpoint-10")
    assert checkpoints.last_good() == folder
    with pytest.warns(UserWarning) as told:
        checkpoints.save(20, small_groups(21), {})  # at the place of an abandoned one
    assert [str(warning.message).split(": ", 1)[1] for warning in told] == [
        "is newer than what was resumed, checkpoint-10; set aside as abandoned-checkpoint-20",
        "is newer than what was resumed, checkpoint-10; set aside as abandoned-checkpoint-30-2",
    ]
    assert_same(checkpoints.load(tmp_path / "abandoned-checkpoint-20").groups, small_groups(20))
    assert_same(checkpoints.load(tmp_path / "abandoned-checkpoint-30-2").groups, small_groups(30))
    with pytest.warns(UserWarning, match="checkpoint-40: skipped"):
        assert checkpoints.last_good().name == "checkpoint-20"
    with warnings.catch_warnings(action="error"):
        checkpoints.save(50, small_groups(50), {})  # the branch goes on
        assert checkpoints.latest().name == "checkpoint-50"


def test_folder_of_that_name_that_is_no_checkpoint_is_never_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG, total_limit=1)
    for name in ("checkpoint-1", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    checkpoints.save(2, small_groups(2), {})
    with pytest.warns(
        UserWarning, match="checkpoint-3: is no checkpoint; set aside as abandoned-checkpoint-3"
    ):
        checkpoints.save(3, small_groups(3), {})
    assert sorted(os.listdir(tmp_path)) == ["abandoned-checkpoint-3", "checkpoint-1", "checkpoint-3"]
    for name in ("abandoned-checkpoint-3", "checkpoint-1"):
        assert os.listdir(tmp_path / name) == ["model.safetensors"]


def test_leftovers_of_a_killed_save_are_removed_and_strangers_are_not(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(1, small_groups(), {})
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.staging-77")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-0.removed")
    for stranger in ("logs", ".git", "checkpoint-best", ".checkpoint-mine"):
        (tmp_path / stranger).mkdir()
    assert checkpoints.latest().name == "checkpoint-1"
    checkpoints.save(3, small_groups(), {})
    names = [".checkpoint-mine", ".git", "checkpoint-1", "checkpoint-3", "checkpoint-best", "logs"]
    assert sorted(os.listdir(tmp_path)) == names


def test_same_step_is_kept_when_equal_and_replaced_when_not(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    folder = checkpoints.save(1, small_groups(1), {})
    identity = folder.stat().st_ino
    assert checkpoints.save(1, small_groups(1), {}).stat().st_ino == identity
    assert checkpoints.save(1, small_groups(2), {}).stat().st_ino != identity
    assert_same(checkpoints.load(folder).groups, small_groups(2))
    (folder / "position.json").write_text("{}")
    checkpoints.save(1, small_groups(2), {})
    assert_same(checkpoints.load(checkpoints.latest()).groups, small_groups(2))
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_resolve(tmp_path):
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, CONFIG)
    with pytest.raises(UserError, match="run: no valid checkpoint to resume from; check"):
        checkpoints.resolve("latest")
    folder = checkpoints.save(5, small_groups(5), {})
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert checkpoints.resolve("latest") == folder
    assert checkpoints.resolve(str(folder)) == folder
    assert checkpoints.resolve("checkpoint-5") == folder
    assert checkpoints.resolve(str(copy)) == copy
    with pytest.raises(UserError, match="checkpoint-6: no such checkpoint folder; give"):
        checkpoints.resolve("checkpoint-6")
    (copy / "position.json").unlink()
    with pytest.raises(UserError, match="copy: not a valid checkpoint: position.json is missing; give"):
        checkpoints.resolve(str(copy))


@pytest.mark.parametrize(
    "config, told",
    [
        ({"seed": 1, "network": CONFIG["network"]}, r"another seed \(0 there and 1 here\)"),
        (
            {"seed": 0, "network": {"channels": [9], "width": 32}},
            r"network \(channels\) \(\[32, 64\] there",
        ),
        ({"seed": 0, "network": {"channels": [32, 64]}}, r"network \(width\) \(32 there and absent here\)"),
        ({"seed": 0, "network": None}, r"network \({.*} there and null here\)"),
        ({"seed": 0}, r"another network \({.*} there and absent here\)"),
        (
            {"seed": 0, "network": CONFIG["network"], "vae": "12"},
            r"other weights of the VAE \(of another",
        ),
        (
            {"seed": 0, "network": CONFIG["network"], "data": "12"},
            "other images, masks or captions, or another part",
        ),
    ],
)
def test_checkpoint_of_another_config_is_refused(tmp_path, config, told):
    hashes = {name: "34" for name in ("vae", "data") if name in config}
    folder = Checkpoints(tmp_path, CONFIG | hashes).save(5, small_groups(5), {})
    for request in ("latest", str(folder)):
        with pytest.raises(UserError, match=told) as error:
            Checkpoints(tmp_path, config).resolve(request)
        assert "\n" not in str(error.value)
    # Order and tuples do not count.
    same = {"network": {"width": 32, "channels": (32, 64)}, "seed": 0, **hashes}
    assert Checkpoints(tmp_path, same).resolve("latest") == folder


def test_config_may_change_in_what_is_allowed_and_grow(tmp_path):
    folder = Checkpoints(tmp_path, CONFIG).save(5, small_groups(5), {})
    assert Checkpoints(tmp_path, CONFIG | {"seed": 7}, may_change=["seed"]).resolve("latest") == folder
    with pytest.warns(UserWarning, match="cannot be compared with this run in: adam_epsilon, noise schedule"):
        Checkpoints(tmp_path, CONFIG | {"schedule": {}, "adam_epsilon": 1}).resolve("latest")


def test_what_a_config_leaves_out_has_its_usual_value(tmp_path):
    """A run that was begun without an option is not resumed with it, nor the other way round."""
    folder = Checkpoints(tmp_path, CONFIG).save(5, small_groups(5), {})
    assert Checkpoints(tmp_path, CONFIG | {"noise_offset": 0.0}).resolve("latest") == folder
    with pytest.raises(UserError, match=r"made with another clip_skip \(1 there and 2 here\)"):
        Checkpoints(tmp_path, CONFIG | {"clip_skip": 2}).resolve("latest")
    with pytest.raises(UserError, match=r"made with another noise_offset \(0.0 there and 0.1 here\)"):
        check_same_run(folder, {"noise_offset": 0.1})
    Checkpoints(tmp_path / "skipped", CONFIG | {"clip_skip": 2}).save(5, small_groups(5), {})
    with pytest.raises(UserError, match=r"made with another clip_skip \(2 there and 1 here\)"):
        Checkpoints(tmp_path / "skipped", CONFIG).resolve("latest")


def test_usual_values_are_those_of_the_settings():
    fields = [*dataclasses.fields(Captions), *dataclasses.fields(DiffusionSettings)]
    usual = {field.name: field.default for field in fields if field.name != "snr_gamma"}  # always named
    assert usual.items() <= UNNAMED.items()


LARGE = 200_000


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The limit on a file's size stands for the full disk: both end a write with an OSError in its middle."""
    code = f"""
import resource, sys, numpy as np
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.errors import UserError
checkpoints = Checkpoints(sys.argv[1], {{}})
checkpoints.save(1, {{"weights": {{"a": np.arange(1000)}}}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, ({LARGE}, {LARGE}))
for length, text in [({LARGE}, ""), (1, "x" * 2 * {LARGE})]:
    try:
        checkpoints.save(2, {{"weights": {{"a": np.zeros(length)}}}}, {{"text": text}})
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    line = (
        f"{tmp_path}/checkpoint-2: cannot be saved: {os.strerror(27)}; "
        f"free some space or choose another folder; the last good checkpoint is {tmp_path}/checkpoint-1\n"
    )
    assert done.stdout == line * 2
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    checkpoints = Checkpoints(tmp_path, {})
    assert_same(checkpoints.load(checkpoints.latest()).groups, {"weights": {"a": np.arange(1000)}})


def test_unwritable_run_folder_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot be saved: .*; make the folder writable.*no earlier"):
        Checkpoints(tmp_path / "run", {}).save(1, small_groups(), {})


def test_a_fault_that_is_no_disk_fault_leaves_no_staging(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(TypeError):
        checkpoints.save(1, small_groups(), {"not JSON": object()})
    assert os.listdir(tmp_path) == []


# Kill tests. A child process does nothing but save, starting with the step that its killed predecessor saved
# last; `lap` makes that step's state differ, so that the folder is replaced.


def state_of(step: int, lap: int, size: int) -> dict:
    weights = np.random.default_rng([step, lap]).integers(0, 2**31, size, dtype=np.int32)
    return {"weights": {"w": weights.view("float32")}, "ema": {"w": weights[::-1]}, "optimizer": {"i": step}}


def assert_whole(checkpoints: Checkpoints, size: int) -> int:
    with warnings.catch_warnings(action="error"):
        folder = checkpoints.latest()
    checkpoint = checkpoints.load(folder)
    assert_same(checkpoint.groups, state_of(checkpoint.step, checkpoint.position["lap"], size))
    return checkpoint.step


def save_forever(checkpoints: Checkpoints, step: int, lap: int, size: int) -> None:
    while True:
        checkpoints.save(step, state_of(step, lap, size), {"lap": lap})
        step += 1


def kill_at_random_moments(run_folder: str, kills: int) -> None:
    size = 1_000_000
    inside_a_save = 0
    step = 0
    for lap in range(kills):
        checkpoints = Checkpoints(run_folder, CONFIG, total_limit=1 + lap % 2)
        if lap == 0:
            checkpoints.save(0, state_of(0, 0, size), {"lap": 0})
        child = os.fork()
        if child == 0:
            save_forever(checkpoints, step, lap, size)
        time.sleep(random.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside_a_save += any(name.startswith(".") for name in os.listdir(run_folder))
        newest = assert_whole(checkpoints, size)
        assert newest >= step
        step = newest
    print(f"{kills} kills, {inside_a_save} of them inside a save, {step} steps")
    assert inside_a_save >= kills // 4


def killer(moment: int):
    """An audit hook that kills the process at its operation number `moment` on files."""
    operations = itertools.count(1)

    def hook(event, arguments):
        if event == "open" or event.startswith(("os.", "shutil.")):
            if next(operations) == moment:
                signal.raise_signal(signal.SIGKILL)

    return hook


def kill_at_every_file_operation(run_folder: str, limit: int) -> None:
    """The child kills itself at its n-th operation on files, as audit events count, for every n."""
    size = 10
    setup = Checkpoints(run_folder, CONFIG)
    for moment in itertools.count(1):
        shutil.rmtree(run_folder, ignore_errors=True)
        for step in (1, 2):
            setup.save(step, state_of(step, 0, size), {"lap": 0})
        child = os.fork()
        if child == 0:
            checkpoints = Checkpoints(run_folder, CONFIG, total_limit=limit)
            sys.addaudithook(killer(moment))
            checkpoints.save(2, state_of(2, 1, size), {"lap": 1})  # replaces
            checkpoints.save(3, state_of(3, 1, size), {"lap": 1})  # rotates
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert assert_whole(Checkpoints(run_folder, CONFIG), size) >= 2
        after = Checkpoints(run_folder, CONFIG, total_limit=limit)
        after.save(4, state_of(4, 2, size), {"lap": 2})
        assert assert_whole(after, size) == 4
        assert len(os.listdir(run_folder)) == limit
        if status == 0:
            print(f"{moment - 1} moments")
            assert moment > 30
            return


def run_in_a_fresh_process(call: str) -> str:
    """Forking is safe only where nothing has started threads."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.training import test_checkpoints as t; t.{call}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_at_random_moments(tmp_path):
    kills = int(os.environ.get("KERAS_SD_KILLS", 12))
    print(run_in_a_fresh_process(f"kill_at_random_moments({str(tmp_path)!r}, {kills})"))


@pytest.mark.parametrize("limit", [1, 2])
def test_kill_at_every_file_operation(tmp_path, limit):
    print(run_in_a_fresh_process(f"kill_at_every_file_operation({str(tmp_path / 'run')!r}, {limit})"))
