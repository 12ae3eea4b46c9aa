"""What tracing a function of a model depends on, as a text that names its kept program."""

import json
from typing import Any

from keras_sd.models.layers import LowRankUpdate, sublayers

_PACKAGES = ("keras_sd", "keras")


def program_identity(function: str, model: Any) -> str | None:
    """Return the identity of a function of a model: its config, and the classes and precisions of its layers.

    Weights are not part of it, as they are inputs of a program.

    Args:
        function: what names the function, and all else that its trace depends on.
        model: a text encoder, a UNet or a VAE.

    Returns:
        A text; None if layers are of other packages or have updates such as LoRA, which may be traced
        differently each time.
    """
    layers = list(_walk("", model))
    is_plain = all(
        type(layer).__module__.partition(".")[0] in _PACKAGES
        and not (isinstance(layer, LowRankUpdate) and layer.has_update)
        for _, layer in layers
    )
    if not is_plain:
        return None
    found = [
        [path, f"{type(layer).__module__}.{type(layer).__qualname__}", layer.dtype_policy.name]
        for path, layer in layers
    ]
    return json.dumps([function, model.config.to_dict(), found], sort_keys=True)


def _walk(path, layer):
    yield path, layer
    for name, child in sublayers(layer):
        yield from _walk(f"{path}.{name}", child)
