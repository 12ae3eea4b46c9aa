"""Models whose kernels are kept in 8 bits: a quarter of the memory of float32, for making images."""

from typing import Any

import numpy as np

from keras_sd import backend
from keras_sd.arguments import shown
from keras_sd.errors import UserError
from keras_sd.models.layers import sublayers
from keras_sd.models.quantized_kernel import QuantizableKernel

QUANTIZATIONS = ("int8",)
"""What kernels can be quantized to."""


def check_quantization(quantize: Any) -> str | None:
    """Return `quantize`, after checking that it is None or in `QUANTIZATIONS`."""
    if quantize is not None and quantize not in QUANTIZATIONS:
        known = " or ".join(QUANTIZATIONS)
        raise UserError(f"quantize {shown(quantize)}: unknown; use {known}, or leave it out")
    return quantize


def quantize_kernels(model) -> None:
    """Keep the kernels of all linear layers and convolutions of a model in 8 bits, for inference only.

    Call this before anything is compiled with the model.
    """
    for layer in _quantizable(model):
        if layer.kernel_scale is None:
            layer.quantize_kernel()
    # The others may be views of a mapped file, all of which would stay in memory for them.
    for variable in model.variables:
        if variable.dtype != "int8":
            variable.assign(backend.to_tensor(np.array(variable)))


def quantization_of(model) -> str | None:
    """Return what the kernels of a model are quantized to, or None."""
    return "int8" if any(layer.kernel_scale is not None for layer in _quantizable(model)) else None


def refuse_quantized(title: str, model: Any) -> None:
    """Raise a UserError if a model's kernels are quantized; `title` begins the message."""
    kind = quantization_of(model)
    if kind is not None:
        raise UserError(
            f"{title}: the kernels are quantized to {kind}, which is for making images; open the model "
            "without `quantize`"
        )


def _quantizable(layer):
    """Return the layers with a kernel of a layer or model."""
    if isinstance(layer, QuantizableKernel):
        return [layer]
    return [found for _, child in sublayers(layer) for found in _quantizable(child)]
