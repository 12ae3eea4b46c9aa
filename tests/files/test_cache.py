"""The folder of the cache, and how it is turned off."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from keras_sd.cli.main import main
from keras_sd.cli.program import message_of
from keras_sd.cli.train.main import main as train
from keras_sd.files import cache
from keras_sd.files.cache import VARIABLE, cache_root, open_entry, private_folder, remove_oldest


@pytest.mark.parametrize("value", ["", "off", "OFF", "0", "none", "false", "no"])
def test_values_that_turn_the_cache_off(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    assert cache_root() is None


def test_a_place_that_cannot_be_used_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place, told in {
        str(tmp_path / "file"): "is no folder",
        str(tmp_path / "file" / "below"): r"cannot be written to \(Not a directory\)",
        "/proc/keras_sd": r"cannot be written to \(No such file or directory\)",
        "/proc/self": r"cannot be written to \(",  # a folder that is there, also to root
        "~no-such-user/cache": "there is no such home",
    }.items():
        monkeypatch.setenv(VARIABLE, place)
        line = f"^{VARIABLE} {place}: {told}.*, so there is no cache; name another folder, or off$"
        with pytest.warns(UserWarning, match=line) as warned:
            assert cache_root() is None and cache_root() is None
        assert len(warned) == 1


def test_a_home_without_a_cache_is_no_matter(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_root() is None and not recwarn.list


def test_a_command_warns_in_one_line_and_goes_on(tmp_path, monkeypatch, run_program):
    monkeypatch.chdir(tmp_path)  # where the command writes a drawing
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "0.txt").write_text("black")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    code, _, errors = run_program(main, "dataset", tmp_path / "images")
    assert code == 0 and errors.count(f"warning: {VARIABLE} {tmp_path / 'file'}: is no folder") == 1
    assert "Traceback" not in errors


def test_encodings_on_disk_need_a_place(tmp_path, monkeypatch, run_program):
    monkeypatch.setenv(VARIABLE, "off")
    values = ["--cache-latents", "disk", "--output-dir", tmp_path / "run", "--evaluation-steps", 0]
    code, _, errors = run_program(train, "lora", *values)
    assert code == 2 and errors.endswith(
        "--cache-dir: missing, and there is no cache folder (KERAS_SD_CACHE); give a folder\n"
    )
    assert not (tmp_path / "run").exists()


def test_any_other_value_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/kept")
    assert cache_root() == Path("~/kept").expanduser()


def test_the_oldest_files_go_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    remove_oldest(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]


def test_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    folder = private_folder("xla", "jax")
    assert folder == tmp_path / "own" / "xla" / "jax" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder("xla", "jax") == folder and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "own" / "link").symlink_to(folder)  # it may lead into a folder of another user
    with pytest.warns(UserWarning, match="link: belongs to another user or is a link"):
        assert private_folder("link") is None
    monkeypatch.setenv(VARIABLE, "off")
    assert private_folder("xla") is None


def test_what_others_have_left_is_removed(tmp_path, monkeypatch):
    if os.geteuid():
        pytest.fail("only root can make a file of another user")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    folder = private_folder("xla")
    (folder / "own").write_text("")
    for name in ("other", "folder/other"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
        os.chown(folder / name, 12345, 12345)
    os.chown(folder / "folder", 12345, 12345)
    folder.chmod(0o777)
    assert [path.name for path in private_folder("xla").iterdir()] == ["own"]


def test_an_entry_is_a_file_of_ones_own(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with open_entry(tmp_path / "file") as file:
        assert file.read() == b"content"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "none", ""):
        with pytest.raises(OSError):
            open_entry(tmp_path / name)


def test_pipes_links_and_unfinished_files_are_removed(tmp_path):
    old = time.time() - 2 * 86400
    for name in ("kept-cache", "whole", "ours.partial", "xla.pb.tmp"):
        (tmp_path / name).write_text("content")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "now.partial").write_text("content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    os.mkfifo(tmp_path / "pipe")
    remove_oldest(tmp_path, 2**20)
    assert {path.name for path in tmp_path.iterdir()} == {"kept-cache", "whole", "now.partial", "folder"}


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, run_program):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "full"))
    monkeypatch.setattr(cache, "_LEAST_BYTES", 2**60)
    code, _, errors = run_program(main, "generate", "heart", "--num-inference-steps", 1)
    assert code == 0 and (tmp_path / "image.png").is_file() and not any((tmp_path / "full").iterdir())
    assert errors.count("warning") == 1 and f"{VARIABLE} {tmp_path / 'full'}: has " in errors


def test_an_error_of_tensorflows_cache_is_one_line():
    error = RuntimeError(
        "/c/xla/tensorflow/xla_compile_cache__k__XLA_CPU_JIT.pbvm-1.tmp; No space left on device [Op:x]"
    )
    assert message_of(error) == (
        "KERAS_SD_CACHE: TensorFlow cannot keep a compiled program (No space left on device); free space, "
        "name another folder, or off"
    )
