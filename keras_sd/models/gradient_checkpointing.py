"""Gradient checkpointing: the backward pass recomputes the activations inside a block, which are not kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. It takes about a third more time.
"""

import functools

from keras_sd import backend
from keras_sd.models.layers import Layer, sublayers


class RecomputingLayer(Layer):
    """A layer whose sublayers can be recomputed in the backward pass."""

    recomputes = False

    def _recomputed(self, layer, function=None):
        """Return a sublayer, or `function` with it as first argument, recomputed if `recomputes` is set.

        All other arguments must be tensors. Only they and the sublayer's weights get gradients.
        """
        function = layer if function is None else functools.partial(function, layer)
        return backend.recomputed(function, layer.variables) if self.recomputes else function


def recomputing_layers(model):
    """Return every `RecomputingLayer` of a model, at any depth."""
    own = [model] if isinstance(model, RecomputingLayer) else []
    return own + [found for _, layer in sublayers(model) for found in recomputing_layers(layer)]


def enable_gradient_checkpointing(model, recomputes=True):
    """Set whether all blocks of a model are recomputed in the backward pass; gradients stay the same.

    It must be called before anything is compiled with the model.
    """
    for layer in recomputing_layers(model):
        layer.recomputes = recomputes
