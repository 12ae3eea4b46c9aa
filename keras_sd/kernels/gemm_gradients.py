"""A convolution whose gradients are matrix multiplications (GEMM), on a CPU.

XLA computes the gradient by the inputs as a convolution with a reversed and transposed kernel. It makes all
these copies at the beginning of a step, so that a LoRA step on Stable Diffusion 1.5 held 2.1 GiB of them.
"""

import math

from keras import ops

from keras_sd import backend
from keras_sd.kernels.im2col import windows_of

# Up to as many rows of the matrix as output channels: the kernel is then the largest of the arrays. With 1280
# channels the gradient by the inputs takes 0.44 of the backend's processor time with 64 rows, 0.52 with 256
# and 0.80 with 1024, that by the kernel 0.51, 0.60 and 0.81; with 640 channels and 256 rows 0.68 and 0.78,
# with 1024 rows 1.18 and 1.24 (benchmarks/kernels.md, `python tools/bench_kernels.py`).


def is_faster(inputs, kernel, strides, padding):
    """Return whether the gradients of `convolve` are faster, given the arguments of `im2col.convolve`."""
    if strides != (1, 1) or padding != "same" or inputs.dtype != "float32":
        return False
    *sizes, _, outputs = kernel.shape
    positions = inputs.shape[:3]  # they may be unknown while a program is traced
    if not all(size % 2 for size in sizes) or not all(isinstance(number, int) for number in positions):
        return False
    return math.prod(positions) <= outputs and backend.compiles_for_processor(inputs)


def convolve(inputs, kernel):
    """Return the "same" convolution of `(n, h, w, c)` with a kernel `(rows, columns, c, k)`: `(n, h, w, k)`.

    The sizes of the kernel must be odd.
    """

    @ops.custom_gradient
    def convolution(inputs, kernel):
        outputs = ops.conv(inputs, kernel, strides=1, padding="same", data_format="channels_last")

        def gradient(upstream):
            return _by_inputs(upstream, kernel), _by_kernel(upstream, inputs, kernel.shape)

        return outputs, gradient

    return convolution(inputs, kernel)


def _by_inputs(upstream, kernel):
    """Return the gradient by the inputs: the products of each window, added at their places (col2im)."""
    rows, columns, channels, outputs = kernel.shape
    batch, height, width, _ = upstream.shape
    products = ops.matmul(
        ops.reshape(upstream, (-1, outputs)), ops.transpose(ops.reshape(kernel, (-1, outputs)))
    )
    products = ops.reshape(products, (batch, height, width, rows * columns, channels))
    edges = [(size // 2, size // 2) for size in (rows, columns)]
    products = ops.pad(products, ((0, 0), *edges, (0, 0), (0, 0)))
    return sum(
        products[:, row : row + height, column : column + width, -1 - (row * columns + column)]
        for row in range(rows)
        for column in range(columns)
    )


def _by_kernel(upstream, inputs, shape):
    """Return the gradient by the kernel: the windows of the inputs by the outputs' gradient."""
    windows = windows_of(inputs, shape[:2])
    rows = ops.reshape(windows, (-1, windows.shape[-1]))
    return ops.reshape(ops.matmul(ops.transpose(rows), ops.reshape(upstream, (-1, shape[3]))), shape)
