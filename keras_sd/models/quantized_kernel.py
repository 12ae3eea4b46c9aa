"""A layer's kernel in 8 bits: whole numbers -127 to 127, and a scale in float32 for each output.

The scale is the largest absolute value of a column over 127: symmetric quantization (Jacob et al., 2018),
rounded to the nearest. A call computes with `codes * scale` in the layer's own precision, so inputs are not
rounded.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.kernels.late_decoding import once_inputs_are_there

_LARGEST = 127
_HALF = ("float16", "bfloat16")


class StoredKernel(NamedTuple):
    """The values of a kernel as a layer keeps them.

    Attributes:
        values: `(..., outputs)`, in the layer's precision; codes where there is a scale.
        scale: float32 `(outputs,)`, or None.
    """

    values: Any
    scale: Any = None

    def decoded(self):
        """Return the kernel, float32."""
        kernel = np.asarray(self.values, "float32")
        return kernel if self.scale is None else kernel * self.scale

    def is_finite(self):
        """Return whether no value is infinite or undefined; codes are so where their scale is."""
        return bool(np.isfinite(self.values if self.scale is None else self.scale).all())

    def encoded(self, kernel):
        """Return a float32 kernel as this one is kept."""
        return StoredKernel(kernel.astype(self.values.dtype)) if self.scale is None else _quantized(kernel)


class QuantizableKernel:
    """A layer of Keras with a kernel, which can be kept in 8 bits.

    Attributes:
        kernel_scale: float32 `(outputs,)`; None for a kernel that is not quantized.
    """

    kernel_scale = None

    @property
    def kernel(self):
        kernel = super().kernel
        if self.kernel_scale is None:
            return kernel
        return ops.cast(ops.cast(kernel, "float32") * self.kernel_scale, self.compute_dtype)

    def call(self, inputs):
        if not self._is_decoded_by(inputs):
            return super().call(inputs)
        window = {name: getattr(self, name) for name in ("strides", "padding") if hasattr(self, name)}
        return once_inputs_are_there(
            inputs,
            lambda: super(QuantizableKernel, self).call(inputs),
            [variable for variable in (self._kernel, self.kernel_scale, self.bias) if variable is not None],
            **window,
        )

    def _is_decoded_by(self, inputs):
        """Return whether a program decodes the kernel: XLA for a processor turns halves into float32."""
        if self.kernel_scale is not None:
            return True
        return self._kernel.dtype in _HALF and backend.compiles_for_processor(inputs)

    def quantize_kernel(self):
        """Keep the kernel in 8 bits from now on."""
        codes, scale = _quantized(np.asarray(backend.to_numpy(self._kernel), "float32"))
        with backend.unlocked(self):
            backend.forget_variable(self, self._kernel)
            self._kernel = self.add_weight(
                shape=codes.shape,
                initializer=lambda shape, dtype: ops.convert_to_tensor(codes, dtype),
                name="kernel",
                dtype="int8",
                trainable=False,
            )
            self.kernel_scale = self.add_weight(
                shape=scale.shape,
                initializer=lambda shape, dtype: ops.convert_to_tensor(scale, dtype),
                name="kernel_scale",
                dtype="float32",
                autocast=False,
                trainable=False,
            )

    def stored_kernel(self):
        """Return a copy of the kernel as it is kept."""
        scale = self.kernel_scale
        return StoredKernel(np.array(self._kernel), None if scale is None else np.array(scale))

    def assign_kernel(self, stored):
        """Assign a `StoredKernel` of this layer."""
        self._kernel.assign(stored.values)
        if self.kernel_scale is not None:
            self.kernel_scale.assign(stored.scale)


def _quantized(kernel):
    """Return a float32 kernel as a `StoredKernel` of codes."""
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.where(largest == 0, 1, largest / _LARGEST).astype("float32")
    with np.errstate(invalid="ignore"):  # where the scale is not finite
        codes = np.rint(kernel / scale).astype("int8")
    return StoredKernel(codes, scale)
