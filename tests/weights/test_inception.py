"""Where the published file of Inception v3 is looked for, and what is said of another one."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from keras_sd.errors import UserError
from keras_sd.weights.inception import FILE_NAME, SHA256, URL, find_inception_weights, read_inception_weights


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Torch hub's folder of files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def offline(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_the_name_says_the_hash():
    """As in torch hub, whose files' names end in the first digits of their SHA-256."""
    assert FILE_NAME.removesuffix(".pth").rpartition("-")[2] == SHA256[:8]
    assert len(SHA256) == hashlib.sha256().digest_size * 2 and URL.endswith(f"/{FILE_NAME}")


def test_without_a_connection(checkpoints, offline):
    with pytest.raises(
        UserError, match="not found, and https://github.com/.* could not be downloaded"
    ) as caught:
        find_inception_weights()
    told = str(caught.value)
    assert "\n" not in told and str(checkpoints / FILE_NAME) in told and "`inception_weights`" in told
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize("name", [FILE_NAME, "weights-inception-2015-12-05-6726825d.pth"])
def test_a_damaged_file_in_the_cache_is_not_taken_for_the_published_one(checkpoints, name):
    (checkpoints / name).write_bytes(b"cut")
    with pytest.raises(
        UserError, match=f"{name}: damaged .its SHA-256 differs.; remove it, or name the file"
    ):
        find_inception_weights()


def test_the_caches_default_place(monkeypatch, tmp_path, offline):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=str(tmp_path / "cache" / "torch" / "hub" / "checkpoints" / FILE_NAME)
    ):
        find_inception_weights()


def test_a_named_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=f"inception_weights {path}: no such file"):
        find_inception_weights(path)
    with pytest.raises(UserError, match="not a plain file"):
        find_inception_weights(tmp_path)
    save_file({"a": np.zeros(3, "float32")}, path)
    assert find_inception_weights(path) == (path, False)


def test_only_what_features_need_is_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    used = {"Mixed_7c.branch1x1.bn.bias": np.ones(320, "float32")}
    unused = {
        "fc.weight": np.ones((1008, 2048), "float32"),
        "fc.bias": np.ones(1008, "float32"),
        "Mixed_7c.branch1x1.bn.num_batches_tracked": np.ones((), "int64"),
    }
    save_file(used | unused, path)
    assert read_inception_weights(path).keys() == used.keys()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_cut_file_is_told_in_one_line(tmp_path, name):
    path = tmp_path / "whole.safetensors"
    save_file({"a": np.zeros(1000, "float32")}, path)
    (tmp_path / name).write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{name}: (truncated or no safetensors|neither a zip nor a pickle)"):
        read_inception_weights(tmp_path / name)
