"""The weights of a model under their published names.

The attribute trees of the models mirror the published parameter trees, so a name is the path of attributes
and list indices that leads to a variable; only its last part is renamed (`kernel` is torch's `weight`).
"""

from typing import NamedTuple

import keras

from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.layers import sublayers
from keras_sd.models.text_encoder import TextEncoder

_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}

# What transformers puts before the names of CLIP's towers.
_TOWERS = {TextEncoder: "text_model.", ImageEncoder: "vision_model."}
_BESIDE_TOWER = "visual_projection."


class Parameter(NamedTuple):
    """A variable of a model, the name of its tensor in published files and the layer that owns it."""

    name: str
    variable: keras.Variable
    layer: keras.layers.Layer


def parameter_paths(model):
    """Return all weights of a model with their published names, in a fixed order.

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
    """Return the parameters of a layer tree, the layer's own before those of its children."""
    own = {id(value) for value in vars(layer).values()}
    parameters = [
        Parameter(path + _LEAVES.get(variable.name, variable.name), variable, layer)
        for variable in layer.weights
        if id(variable) in own
    ]
    for name, child in sublayers(layer):
        parameters += _walk(child, f"{path}{name}.")
    return parameters
