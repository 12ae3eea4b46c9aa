"""The weight map: a rule between Keras variables and the public checkpoints' tensors.

The attribute trees of the models mirror the published parameter trees, so a tensor's name is the
path of attributes and list indices that leads to its variable. Only the leaf is renamed (`kernel`
is torch's `weight`) and only kernels are transposed, by their rank. No table of tensors exists, and
the rule is read in both directions.
"""

import contextlib
import re
from typing import NamedTuple

import keras
import numpy as np

from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.text_encoder import TextEncoder

_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}

# By rank: torch has a kernel's outputs first, (out, in) and OIHW, Keras last, (in, out) and HWIO.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_TO_KERAS = {2: (1, 0), 4: (2, 3, 1, 0)}

# What transformers puts before the names of CLIP's towers. Releases differ (5.x drops it from the
# text tower), so names are compared without it; each release reads files that have it.
_TOWERS = {TextEncoder: "text_model.", ImageEncoder: "vision_model."}
_TOWER_PATTERN = re.compile(r"^(text_model|vision_model)\.")
_BESIDE_TOWER = "visual_projection."

# The VAE's attention in files written by diffusers before 0.18.
_OLD_ATTENTION_PATTERN = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_IGNORED_PATTERN = re.compile(r"(^|\.)position_ids$")
_NAMED_AT_MOST = 5


class Parameter(NamedTuple):
    """A variable of a model, the name of its tensor in published files and the layer that owns it."""

    name: str
    variable: keras.Variable
    layer: keras.layers.Layer


def parameter_paths(model):
    """Lists every weight of a model under its published name, in a fixed order.

    Args:
        model: a built Keras layer or model whose attributes mirror the published parameter tree.

    Returns:
        A list of `Parameter(name, variable, layer)`.
    """
    parameters = _walk(model, "")
    if len(parameters) != len(model.weights):
        raise ValueError(
            f"{type(model).__name__}: {len(model.weights)} weights, but {len(parameters)} found along public "
            "attributes; a layer is kept in a private attribute, in a dictionary or twice"
        )
    prefix = next((prefix for tower, prefix in _TOWERS.items() if isinstance(model, tower)), "")
    return [
        Parameter(name if name.startswith(_BESIDE_TOWER) else prefix + name, variable, layer)
        for name, variable, layer in parameters
    ]


def _walk(layer, path):
    """Lists the parameters of a layer tree, the layer's own before those of its children."""
    own = {id(value) for value in vars(layer).values()}
    parameters = [
        Parameter(path + _LEAVES.get(variable.name, variable.name), variable, layer)
        for variable in layer.weights
        if id(variable) in own
    ]
    for name, child in _children(layer):
        parameters += _walk(child, f"{path}{name}.")
    return parameters


def _children(layer):
    """Yields `(path, sublayer)` for each layer in a public attribute or in a list that is one."""
    for attribute, value in vars(layer).items():
        if attribute.startswith("_"):
            continue
        if isinstance(value, keras.layers.Layer):
            yield attribute, value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, keras.layers.Layer):
                    yield f"{attribute}.{index}", item


def _torch_axes(parameter):
    """The order of the Keras variable's axes in the torch tensor."""
    rank = len(parameter.variable.shape)
    return _TO_TORCH[rank] if parameter.variable.name == "kernel" else tuple(range(rank))


def _torch_shape(parameter):
    return tuple(parameter.variable.shape[axis] for axis in _torch_axes(parameter))


def torch_state(model):
    """The model's weights under their published names in torch layout.

    Returns:
        A dictionary of NumPy arrays, in the variables' own precision.
    """
    return {
        parameter.name: np.asarray(parameter.variable).transpose(_torch_axes(parameter))
        for parameter in parameter_paths(model)
    }


def canonical_name(name):
    """The one spelling under which the names of all releases meet; None for what is no weight."""
    if _IGNORED_PATTERN.search(name):
        return None
    name = _TOWER_PATTERN.sub("", name)
    return _OLD_ATTENTION_PATTERN.sub(lambda match: match[1] + _OLD_ATTENTION[match[2]], name)


@contextlib.contextmanager
def without_initial_values():
    """Makes models built inside it start from zeros, as what is about to be loaded needs no random draw.

    Random initial values take longer than reading a file, above all on JAX, which compiles a program for
    each shape. Not for several threads at once.
    """
    add_weight = keras.layers.Layer.add_weight

    def add_zeros(layer, shape=None, initializer=None, *arguments, **options):
        return add_weight(layer, shape, _zeros, *arguments, **options)

    keras.layers.Layer.add_weight = add_zeros
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = add_weight


def _zeros(shape, dtype=None):
    return keras.ops.convert_to_tensor(np.zeros(shape, dtype))


def load_weights(model, tensors, *, prefix="", source="weights"):
    """Puts published tensors into a model, accounting for every one of them.

    Nothing is assigned unless every tensor has its variable, every variable its tensor, all shapes
    agree and all values are finite.

    Args:
        model: the built Keras model.
        tensors: a mapping of published names to arrays in torch layout; any float precision.
        prefix: takes only the names that begin with it, and without it.
        source: what to call the tensors' origin in an error, usually the file.

    Raises:
        UserError: tensors are missing, left over, misshapen or not finite.
    """
    given = {canonical_name(name.removeprefix(prefix)): name for name in tensors if name.startswith(prefix)}
    given.pop(None, None)
    wanted = {canonical_name(parameter.name): parameter for parameter in parameter_paths(model)}
    _account(type(model).__name__, wanted, {name: tensors[key].shape for name, key in given.items()}, source)
    _refuse_non_finite({key: tensors[key] for key in given.values()}, source)
    for name, parameter in wanted.items():
        # A 1x1 convolution and a linear layer hold the same numbers; files have either.
        array = np.reshape(tensors[given[name]], _torch_shape(parameter))
        if parameter.variable.name == "kernel":
            array = array.transpose(_TO_KERAS[array.ndim])
        parameter.variable.assign(array.astype(parameter.variable.dtype))


def _account(model_name, wanted, shapes, source):
    """Raises a UserError that counts all faults of a set of tensors and names the first ones."""
    missing = [
        f"{name} is missing, the model has {_torch_shape(parameter)}"
        for name, parameter in wanted.items()
        if name not in shapes
    ]
    misshapen = [
        f"{name} is {shapes[name]}, the model has {_torch_shape(parameter)}"
        for name, parameter in wanted.items()
        if name in shapes and not _same_shape(tuple(shapes[name]), _torch_shape(parameter))
    ]
    extra = [f"{name} {shape} has no place" for name, shape in shapes.items() if name not in wanted]
    faults = missing + misshapen + extra
    if faults:
        named = "; ".join(faults[:_NAMED_AT_MOST]) + ("; ..." if len(faults) > _NAMED_AT_MOST else "")
        raise UserError(
            f"{source}: {len(missing)} tensors missing, {len(misshapen)} misshapen, {len(extra)} left over "
            f"for {model_name}: {named}. Use the config.json that belongs to these weights"
        )


def _same_shape(given, wanted):
    return given == wanted or given == wanted + (1, 1) or given + (1, 1) == wanted


def _refuse_non_finite(tensors, source):
    bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}; use an undamaged file"
        )
