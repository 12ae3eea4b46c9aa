"""KerasCV's Stable Diffusion files: H5 files of Keras 2, one for each of four models.

Their layer names depend on the order in which a process created the layers (`padded_conv2d_17`). So layers
are identified by position, as Keras itself does: our models have the same layers, nearly in the same order.
Datasets are contiguous in the file, so they are mapped instead of read.
"""

import itertools
import math
import re
from pathlib import Path

import h5py

from keras_sd.arguments import checked_path
from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.files.mapping import map_file
from keras_sd.weights import derived_config
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.expected_shapes import expected_shapes

# The models of the files. Only names and their order matter here, so any widths will do; where they differ,
# a residual block may have a shortcut.
_WIDTHS = (1, 2, 3, 4)
_UNET, _VAE = UNetConfig(block_out_channels=_WIDTHS), VAEConfig(block_out_channels=_WIDTHS)
_VAE_HALVES = {"decoder": ("decoder.", "post_quant_conv."), "VAE encoder": ("encoder.", "quant_conv.")}
_SHORTCUT = ["conv_shortcut.weight", "conv_shortcut.bias"]

# One layer of KerasCV is a residual block, a transformer, or else a single layer of ours.
_LAYER_PATTERN = re.compile(r"(.*?(?:resnets|attentions|encoder\.layers)\.\d+|.*embeddings|.*)\.(.+)")
# The layers that come first in KerasCV's files; the others are in the order of our models.
_FIRST = ("time_embedding.linear_1", "post_quant_conv", "decoder.conv_in", "decoder.mid_block")


def _layers(kind, count):
    """Return a dictionary from the name of each layer with weights to its parameters, in KerasCV's order.

    Args:
        kind: "text encoder", "diffusion model", "decoder" or "VAE encoder".
        count: the number of layers in the file, which gives the depth of the text encoder.
    """
    if kind == "text encoder":
        config = TextEncoderConfig(num_hidden_layers=max(count - 2, 1))
        names = [f"text_model.{name}" for name, _ in expected_shapes(config)]
    elif kind == "diffusion model":
        names = [name for name, _ in expected_shapes(_UNET)]
    else:
        names = [name for name, _ in expected_shapes(_VAE) if name.startswith(_VAE_HALVES[kind])]
    layers = {}
    for name in names:
        layer, parameter = _LAYER_PATTERN.fullmatch(name).groups()
        layers.setdefault(layer, []).append(parameter)
    first = [layer for prefix in _FIRST for layer in layers if layer.startswith(prefix)]
    return {layer: layers[layer] for layer in dict.fromkeys([*first, *layers])}


def read_keras_cv(paths):
    """Read the files of KerasCV's `StableDiffusion` or `StableDiffusionV2`.

    The first layer of a file shows which model it holds. Configs are derived from the tensors. The noise
    schedule is KerasCV's: both of its models predict noise, at 512 pixels.

    Args:
        paths: a file, a list of files, or a folder with `.h5` files: a text encoder, a diffusion model, a
            decoder, a VAE encoder, or several of these. A VAE encoder needs its decoder.

    Returns:
        A `Checkpoint` with those of the parts text_encoder, unet and vae that the files hold.

    Raises:
        UserError: a file is missing, damaged, not KerasCV's, or refers to other files; or there is a VAE
            encoder without the decoder.
    """
    tensors, files = {}, {}
    for path in _listed(paths):
        layers = _read_layers(path)
        kind = _kind(layers, path)
        if kind in files:
            raise UserError(f"{path}: a {kind}, as is {files[kind]}; give one of each")
        files[kind], tensors[kind] = path, _named(kind, layers, path)
    halves = [kind for kind in ("decoder", "VAE encoder") if kind in files]
    if halves == ["VAE encoder"]:
        raise UserError(f"{files[halves[0]]}: half of the VAE; give its decoder, kcv_decoder.h5, too")
    parts = {}
    for part, kinds in (("text_encoder", ["text encoder"]), ("unet", ["diffusion model"]), ("vae", halves)):
        found = {name: array for kind in kinds for name, array in tensors.get(kind, {}).items()}
        if found:
            parts[part] = Part(_config(part, found, files[kinds[0]]), found, files[kinds[0]])
    return Checkpoint(parts, SchedulerConfig().to_dict() if "unet" in parts else None)


def _listed(paths):
    if not isinstance(paths, str | Path):
        return [checked_path("path", path) for path in paths]
    path = checked_path("path", paths)
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.h5"))
    if not files:
        raise UserError(f"{path}: has no .h5 files; give the folder that holds those of KerasCV")
    return files


def _config(part, tensors, path):
    try:
        if part == "text_encoder":
            return derived_config.text_encoder_config(tensors, is_open_clip=False)
        if part == "unet":
            return derived_config.unet_config(tensors, sample_size=64)
        return derived_config.vae_config(tensors, sample_size=512, scaling_factor=0.18215)
    except KeyError as error:
        raise _damaged(path, f"{error} is missing or has too few axes") from error


def _kind(layers, path):
    """Return which model it is: the text encoder starts with two tables, the VAE with a convolution."""
    ranks = [array.ndim for array in layers[0]] if layers else []
    if ranks == [2, 2]:
        return "text encoder"
    if ranks == [2, 1]:
        return "diffusion model"
    if ranks == [4, 1]:
        return "decoder" if layers[0][0].shape[:2] == (1, 1) else "VAE encoder"
    raise UserError(f"{path}: no model of KerasCV's Stable Diffusion; give one of its four .h5 files")


def _named(kind, layers, path):
    """Return the layers' arrays in torch layout by their published names."""
    published = _layers(kind, len(layers))
    if len(published) != len(layers):
        raise _damaged(path, f"{len(layers)} layers with weights, KerasCV's {kind} has {len(published)}")
    tensors = {}
    for (module, parameters), arrays in zip(published.items(), layers, strict=True):
        if parameters[len(arrays) :] not in ([], _SHORTCUT) or len(arrays) > len(parameters):
            raise _damaged(path, f"{len(arrays)} weights for {module}, KerasCV has {len(parameters)}")
        for parameter, array in zip(parameters, arrays, strict=False):
            tensors[f"{module}.{parameter}"] = _to_torch(parameter, array)
    return tensors


def _to_torch(parameter, array):
    if array.ndim == 4 and array.shape[:2] == (1, 1) and parameter.startswith("to_"):
        array = array[0, 0]  # KerasCV has convolutions in place of the linear layers of the VAE's attention
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array if array.ndim < 2 or parameter.endswith("_embedding.weight") else array.T


def _damaged(path, fault):
    return UserError(f"{path}: {fault}; fetch KerasCV's own file, or write it from its model again")


def _read_layers(path):
    """Return the arrays of each layer with weights, in the order of layers and weights in the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .h5 file of KerasCV's")
    data = map_file(path)
    try:
        with h5py.File(path, "r") as file:
            # A file of a whole model has its weights in a group.
            root = _child(file, "model_weights", h5py.Group) if _has_link(file, "model_weights") else file
            layers = [_child(root, name, h5py.Group) for name in _names(root, "layer_names")]
            return [arrays for layer in layers if (arrays := _arrays(layer, data))]
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # These errors may quote the file, at any length.
        fault = str(error).splitlines()[0][:200] if str(error) else "damaged"
        raise _damaged(path, f"no weights as Keras 2 writes them ({fault})") from error


def _names(group, attribute):
    """Return a list of names; Keras splits a long one over several attributes."""
    numbered = (f"{attribute}{index}" for index in itertools.count())
    chunks = itertools.takewhile(group.attrs.__contains__, numbered)
    names = []
    for chunk in [attribute] if attribute in group.attrs else chunks:
        claimed = group.attrs.get_id(chunk)
        if math.prod(claimed.shape) * claimed.dtype.itemsize > group.file.id.get_filesize():
            raise ValueError(f"{chunk} is larger than the file")
        names.extend(group.attrs[chunk])
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _arrays(layer, data):
    return [_array(_child(layer, name, h5py.Dataset), data) for name in _names(layer, "weight_names")]


def _child(group, path, kind):
    """Return the group or dataset at a path; a link on the way is an error."""
    for name in filter(None, path.split("/")):
        if not isinstance(group, h5py.Group) or not _has_link(group, name):
            raise ValueError(f"{name[:80]!r} is missing")
        # h5py's own `Group.get` follows a link, even into another file.
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{name[:80]!r} is a link")
        group = group[name]
    if not isinstance(group, kind):
        raise ValueError(f"{path[:80]!r} is not a {kind.__name__}")
    return group


def _has_link(group, name):
    return group.id.links.exists(name.encode())


def _array(dataset, data):
    """Return the dataset as a view of the file's bytes."""
    properties = dataset.id.get_create_plist()
    # Virtual datasets and external storage refer to other files. Keras writes neither, nor compressed
    # datasets.
    is_contiguous = properties.get_layout() == h5py.h5d.CONTIGUOUS and not properties.get_external_count()
    begin = dataset.id.get_offset() if is_contiguous else None
    if begin is None or begin + dataset.nbytes > len(data):
        raise ValueError(f"{dataset.name[:80]!r} is not contiguous in the file")
    if dataset.dtype.kind != "f" or not dataset.dtype.isnative:
        raise ValueError(f"{dataset.name[:80]!r} is of type {dataset.dtype}")
    return data[begin : begin + dataset.nbytes].view(dataset.dtype).reshape(dataset.shape)
