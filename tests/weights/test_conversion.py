"""Converted weights are kept for the next opening: equal, private, and never needed."""

import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest

from keras_sd.config import VAEConfig
from keras_sd.errors import UserError
from keras_sd.files import cache
from keras_sd.files.cache import private_folder
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights import conversion, rules
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors

CONFIG = VAEConfig(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "SMALLEST", 0)  # of models as large as Stable Diffusion
    monkeypatch.setattr(conversion, "_FREE_BYTES", 0)


@pytest.fixture
def file(tmp_path):
    keras.utils.set_random_seed(0)
    write_safetensors(tmp_path / "vae.safetensors", rules.torch_state(AutoencoderKL(CONFIG)))
    return tmp_path / "vae.safetensors"


def opened(file, dtype="float32"):
    model = rules.open_model(AutoencoderKL, CONFIG, read_safetensors(file), dtype=dtype)
    for thread in threading.enumerate():
        if thread.name == conversion.THREAD:
            thread.join()
    return model


def entries():
    return sorted(private_folder("weights").iterdir())


def values(model):
    return [keras.ops.convert_to_numpy(variable) for variable in model.variables]


def messages(recwarn):
    return [str(warning.message) for warning in recwarn.list if warning.category is UserWarning]


def assert_equal(first, second):
    for one, other in zip(values(first), values(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_second_opening_has_the_same_weights(file, dtype):
    first = opened(file, dtype)
    (entry,) = entries()
    assert entry.stat().st_mode & 0o777 == 0o600 and entry.parent.stat().st_mode & 0o777 == 0o700
    os.utime(entry, (0, 0))
    second = opened(file, dtype)
    assert entries() == [entry] and entry.stat().st_mtime > 0  # it was used
    assert_equal(first, second)


def test_the_second_opening_reads_the_entry(file):
    opened(file)
    (entry,) = entries()
    content = bytearray(entry.read_bytes())
    content[:4] = np.float32(7).tobytes()
    entry.write_bytes(content)
    assert any((array == 7).any() for array in values(opened(file)))


def test_training_leaves_the_entry_alone(file):
    first = opened(file)
    content = entries()[0].read_bytes()
    for model in (first, opened(file)):
        for variable in model.variables:
            variable.assign_add(keras.ops.ones_like(variable))
    assert entries()[0].read_bytes() == content
    for one, other in zip(values(opened(file)), values(first), strict=True):
        np.testing.assert_allclose(one + 1, other)


def test_each_file_place_and_precision_has_its_entry(file, tmp_path):
    opened(file)
    opened(file, "float16")
    assert len(entries()) == 2
    tensors = dict(read_safetensors(file))
    write_safetensors(tmp_path / "other.safetensors", {name: array + 1 for name, array in tensors.items()})
    os.replace(tmp_path / "other.safetensors", file)
    changed = opened(file)
    assert len(entries()) == 3
    in_memory = {name: np.array(array) for name, array in read_safetensors(file).items()}
    assert_equal(changed, rules.open_model(AutoencoderKL, CONFIG, in_memory))
    assert len(entries()) == 3  # nothing is kept of arrays that are in no file


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "another", "link", "folder"])
def test_a_damaged_entry_is_made_anew(file, tmp_path, damage, recwarn):
    first = opened(file)
    (entry,) = entries()
    content = entry.read_bytes()
    entry.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        entry.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        entry.mkdir()
    else:
        entry.write_bytes(
            {"cut": content[:-1], "longer": content + b"0", "empty": b"", "another": bytes(len(content))}[
                damage
            ]
        )
    assert_equal(first, opened(file))
    if damage != "folder":
        assert not entry.is_symlink() and entry.read_bytes() == content
    assert not messages(recwarn) and not list(entry.parent.glob("*.partial"))


def test_values_that_are_not_finite_are_never_kept(tmp_path):
    tensors = rules.torch_state(AutoencoderKL(CONFIG))
    tensors = {name: np.array(array) for name, array in tensors.items()}
    tensors["decoder.conv_out.bias"][1] = 1e30
    write_safetensors(tmp_path / "large.safetensors", tensors)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"1 tensors hold NaN or infinity, the first is decoder.conv_out.bias"
        ):
            opened(tmp_path / "large.safetensors", "float16")
        assert not entries()
    opened(tmp_path / "large.safetensors")
    assert len(entries()) == 1


def test_without_space_or_a_place_weights_are_converted(file, tmp_path, monkeypatch, recwarn):
    first = opened(file)
    for path in entries():
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_FREE_BYTES", 2**60)  # more than any disk has
        assert_equal(first, opened(file))
        assert not entries()
    monkeypatch.setenv("KERAS_SD_CACHE", "off")
    assert_equal(first, opened(file))
    assert not messages(recwarn)


def test_the_oldest_entries_go_first(file, monkeypatch):
    opened(file)
    os.utime(entries()[0], (1e9, 1e9))
    monkeypatch.setattr(conversion, "_CACHE_BYTES", 0)
    opened(file, "float16")
    (entry,) = entries()
    assert entry.stat().st_mtime > 1e9


def test_a_file_left_by_a_killed_process_is_removed_after_a_day(file):
    folder = private_folder("weights")
    for age, name in ((100, ".new.partial"), (90_000, ".old.partial")):
        (folder / name).touch()
        now = (folder / name).stat().st_mtime
        os.utime(folder / name, (now - age, now - age))
    opened(file)
    assert [path.name for path in folder.glob(".*")] == [".new.partial"]


def test_a_folder_of_another_user_is_not_used(file, tmp_path, monkeypatch):
    if os.geteuid():
        pytest.fail("only root can make a folder of another user")
    first = opened(file)
    folder = private_folder("weights")
    os.chown(folder, 12345, 12345)
    cache._warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match=rf"^{folder}: belongs to another user or is a link, so it is not used"
    ):
        assert_equal(first, opened(file))
    os.chown(folder, 0, 0)
    (entry,) = entries()
    content = entry.read_bytes()
    (tmp_path / "zeros").write_bytes(
        bytes(len(content) - 32) + content[-32:]
    )  # their name and size are right
    os.chown(tmp_path / "zeros", 12345, 12345)
    os.replace(tmp_path / "zeros", entry)
    assert_equal(first, opened(file))
    assert entry.stat().st_uid == 0 and entry.read_bytes() == content


PROGRAM = """if True:
    import sys
    from keras_sd.weights import conversion, rules
    from keras_sd.weights.safetensors_files import read_safetensors
    from keras_sd.config import VAEConfig
    from keras_sd.models.vae import AutoencoderKL
    conversion.SMALLEST = conversion._FREE_BYTES = 0
    config = VAEConfig(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
    model = rules.open_model(AutoencoderKL, config, read_safetensors(sys.argv[1]))
    print(rules.weights_fingerprint(model))
"""


def test_processes_that_open_at_once(file):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(file)],
            env={**os.environ, "KERAS_BACKEND": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("tensorflow", "jax")
    ]
    found = {run.communicate()[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert found == {rules.weights_fingerprint(opened(file)) + "\n"}
    assert len(entries()) == 1 and not list(private_folder("weights").glob("*.partial"))
