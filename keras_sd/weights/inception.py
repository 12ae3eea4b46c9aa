"""The published weights of Inception v3 for FID and KID: finds, downloads, checks and reads their file.

The file is pytorch-fid's, made of TensorFlow's graph of 2015-12-05; torch-fidelity publishes the same bytes
under another name.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.files.download import download, file_hash
from keras_sd.weights.safetensors_files import read_safetensors
from keras_sd.weights.torch_pickle import read_torch

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_NAMES = (FILE_NAME, "weights-inception-2015-12-05-6726825d.pth")
_REMEDY = f"name the file {FILE_NAME} by `inception_weights`"
# What features do not need, with the graph's shapes; with others it is of another network.
_CLASSIFIER = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


class InceptionWeights(NamedTuple):
    """A file of weights, and whether it is the published one to the byte."""

    path: Path
    is_published: bool


def find_inception_weights(inception_weights=None):
    """Find the file of weights; without a name, in torch hub's cache, where it is downloaded to if missing.

    Args:
        inception_weights: the path of the published file, or of its tensors in a file of torch or
            safetensors; None looks for `pt_inception-2015-12-05-6726825d.pth` in
            `$TORCH_HOME/hub/checkpoints`, by default `~/.cache/torch/hub/checkpoints`.

    Returns:
        `InceptionWeights`.

    Raises:
        UserError: there is no such file, it could not be downloaded, or the one in the cache is damaged.
    """
    if inception_weights is not None:
        path = checked_path("inception_weights", inception_weights)
        if not path.is_file():
            fault = "not a plain file" if path.exists() else "no such file"
            raise UserError(f"inception_weights {path}: {fault}; give {FILE_NAME}, or leave it out")
        with os_errors_in_one_line(path):
            return InceptionWeights(path, file_hash(path) == SHA256)
    folder = _hub_folder()
    path = next((folder / name for name in _NAMES if (folder / name).is_file()), folder / FILE_NAME)
    if not path.is_file():
        download(URL, path, SHA256, _REMEDY)
        return InceptionWeights(path, True)
    with os_errors_in_one_line(path):
        if file_hash(path) != SHA256:
            raise UserError(f"{path}: damaged (its SHA-256 differs); remove it, or {_REMEDY}")
    return InceptionWeights(path, True)


def read_inception_weights(path):
    """Return the tensors of the network up to its features by their published names.

    Raises:
        UserError: the file is damaged or holds no tensors by name.
    """
    with os_errors_in_one_line(path):
        saved = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    tensors = {
        name: array
        for name, array in (saved.items() if isinstance(saved, dict) else ())
        if isinstance(name, str) and isinstance(array, np.ndarray)
    }
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name; {_REMEDY}")
    return {name: array for name, array in tensors.items() if not _is_unused(name, array)}


def _is_unused(name, array):
    return name.endswith(".num_batches_tracked") or _CLASSIFIER.get(name) == array.shape


def _hub_folder():
    """Return torch hub's folder of files."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache, "torch"), "hub", "checkpoints").expanduser()
