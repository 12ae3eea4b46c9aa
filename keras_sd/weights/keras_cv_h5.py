"""KerasCV's Stable Diffusion files: H5 files of Keras 2, one for each of four models.

Their layer names depend on the order in which a process created the layers (`padded_conv2d_17`). So layers
are
identified by position, as Keras itself does: a generator walks through the same architecture and yields the
published names of the weights. Datasets are contiguous in the file, so they are mapped instead of read.
"""

import math
from pathlib import Path

import h5py
import numpy as np

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.weights import derived_config
from keras_sd.weights.checkpoint import Checkpoint, Part

_LEVELS, _LAYERS = 4, 2


def _both(*modules):
    return tuple(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))


def _under(module, parameters):
    return tuple(f"{module}.{parameter}" for parameter in parameters)


# The parameters of KerasCV's layers, in KerasCV's order. Only residual blocks that change the number of
# channels have a shortcut.
_SINGLE = ("weight", "bias")
_SHORTCUT = _both("conv_shortcut")
_CLIP_EMBEDDING = ("token_embedding.weight", "position_embedding.weight")
_CLIP_BLOCK = (
    *_both("layer_norm1"),
    *_under("self_attn", _both("q_proj", "k_proj", "v_proj", "out_proj")),
    *_both("layer_norm2", "mlp.fc1", "mlp.fc2"),
)
_UNET_RESNET = _both("norm1", "conv1", "time_emb_proj", "norm2", "conv2") + _SHORTCUT
_CROSS_ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", *_both("to_out.0"))
_TRANSFORMER_BLOCK = (
    *_both("norm1"),
    *_under("attn1", _CROSS_ATTENTION),
    *_both("norm2"),
    *_under("attn2", _CROSS_ATTENTION),
    *_both("norm3", "ff.net.0.proj", "ff.net.2"),
)
_TRANSFORMER = (
    *_both("norm", "proj_in"),
    *_under("transformer_blocks.0", _TRANSFORMER_BLOCK),
    *_both("proj_out"),
)
_VAE_RESNET = _both("norm1", "conv1", "norm2", "conv2") + _SHORTCUT
_VAE_ATTENTION = _both("group_norm", "to_q", "to_k", "to_v", "to_out.0")


def _text_encoder_layers(count):
    yield "text_model.embeddings", _CLIP_EMBEDDING
    for index in range(count - 2):
        yield f"text_model.encoder.layers.{index}", _CLIP_BLOCK
    yield "text_model.final_layer_norm", _SINGLE


def _unet_layers(_):
    yield "time_embedding.linear_1", _SINGLE
    yield "conv_in", _SINGLE
    yield "time_embedding.linear_2", _SINGLE
    for level in range(_LEVELS):
        is_last = level == _LEVELS - 1
        yield from _unet_blocks(f"down_blocks.{level}", _LAYERS, attends=not is_last)
        if not is_last:
            yield f"down_blocks.{level}.downsamplers.0.conv", _SINGLE
    yield "mid_block.resnets.0", _UNET_RESNET
    yield "mid_block.attentions.0", _TRANSFORMER
    yield "mid_block.resnets.1", _UNET_RESNET
    for index in range(_LEVELS):
        yield from _unet_blocks(f"up_blocks.{index}", _LAYERS + 1, attends=index > 0)
        if index < _LEVELS - 1:
            yield f"up_blocks.{index}.upsamplers.0.conv", _SINGLE
    yield "conv_norm_out", _SINGLE
    yield "conv_out", _SINGLE


def _unet_blocks(module, layers, attends):
    for layer in range(layers):
        yield f"{module}.resnets.{layer}", _UNET_RESNET
        if attends:
            yield f"{module}.attentions.{layer}", _TRANSFORMER


def _decoder_layers(_):
    yield "post_quant_conv", _SINGLE
    yield "decoder.conv_in", _SINGLE
    yield from _vae_middle("decoder.mid_block")
    for index in range(_LEVELS):
        for layer in range(_LAYERS + 1):
            yield f"decoder.up_blocks.{index}.resnets.{layer}", _VAE_RESNET
        if index < _LEVELS - 1:
            yield f"decoder.up_blocks.{index}.upsamplers.0.conv", _SINGLE
    yield "decoder.conv_norm_out", _SINGLE
    yield "decoder.conv_out", _SINGLE


def _encoder_layers(_):
    yield "encoder.conv_in", _SINGLE
    for level in range(_LEVELS):
        for layer in range(_LAYERS):
            yield f"encoder.down_blocks.{level}.resnets.{layer}", _VAE_RESNET
        if level < _LEVELS - 1:
            yield f"encoder.down_blocks.{level}.downsamplers.0.conv", _SINGLE
    yield from _vae_middle("encoder.mid_block")
    yield "encoder.conv_norm_out", _SINGLE
    yield "encoder.conv_out", _SINGLE
    yield "quant_conv", _SINGLE


def _vae_middle(module):
    yield f"{module}.resnets.0", _VAE_RESNET
    yield f"{module}.attentions.0", _VAE_ATTENTION
    yield f"{module}.resnets.1", _VAE_RESNET


_WALKS = {
    "text encoder": _text_encoder_layers,
    "diffusion model": _unet_layers,
    "decoder": _decoder_layers,
    "VAE encoder": _encoder_layers,
}


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
        return [Path(path) for path in paths]
    path = Path(paths)
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
    walk = list(_WALKS[kind](len(layers)))
    if len(walk) != len(layers):
        raise _damaged(path, f"{len(layers)} layers with weights, KerasCV's {kind} has {len(walk)}")
    tensors = {}
    for (module, parameters), arrays in zip(walk, layers, strict=True):
        if parameters[len(arrays) :] not in ((), _SHORTCUT) or len(arrays) > len(parameters):
            raise _damaged(path, f"{len(arrays)} weights for {module}, KerasCV has {len(parameters)}")
        for parameter, array in zip(parameters, arrays, strict=False):
            tensors[f"{module}.{parameter}"] = _to_torch(parameter, array)
    return tensors


def _to_torch(parameter, array):
    if array.ndim == 4 and array.shape[:2] == (1, 1) and parameter.startswith("to_"):
        array = array[0, 0]  # KerasCV has convolutions in place of the linear layers of the VAE's attention
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array if array.ndim < 2 or parameter in _CLIP_EMBEDDING else array.T


def _damaged(path, fault):
    return UserError(f"{path}: {fault}; fetch KerasCV's own file, or write it from its model again")


def _read_layers(path):
    """Return the arrays of each layer with weights, in the order of layers and weights in the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .h5 file of KerasCV's")
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
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
    if attribute in group.attrs:
        chunks = [attribute]
    else:
        chunks = []
        while f"{attribute}{len(chunks)}" in group.attrs:
            chunks.append(f"{attribute}{len(chunks)}")
    names = []
    for chunk in chunks:
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
