"""Gradient checkpointing: what a block computes inside is not kept for the backward pass but computed again.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. It takes about a third more time.
"""

import functools

from keras_sd import backend
from keras_sd.models.layers import Layer, sublayers


class RecomputingLayer(Layer):
    """A layer whose parts can be computed again in the backward pass."""

    recomputes = False

    def _recomputed(self, layer, function=None):
        """`layer`, of tensors alone, which is to be computed again if this layer does that.

        With `function(layer, ...)` that is what is computed. What it needs gradients for must be among its
        arguments or the layer's weights: no backend finds other tensors.
        """
        function = layer if function is None else functools.partial(function, layer)
        return backend.recomputed(function, layer.variables) if self.recomputes else function


def recomputing_layers(model):
    """The layers of a model that can compute their parts again, wherever they are nested."""
    own = [model] if isinstance(model, RecomputingLayer) else []
    return own + [found for _, layer in sublayers(model) for found in recomputing_layers(layer)]


def enable_gradient_checkpointing(model, recomputes=True):
    """Set whether all blocks of a model are recomputed in the backward pass.

    Gradients stay what they were. Do it before anything is compiled with the model.
    """
    for layer in recomputing_layers(model):
        layer.recomputes = recomputes
