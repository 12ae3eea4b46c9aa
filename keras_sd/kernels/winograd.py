"""3x3 convolutions with fewer multiplications: Winograd's F(2x2, 3x3) (Lavin and Gray, 2016).

Four neighbouring outputs take 16 products of sums of inputs instead of 36 products of inputs. The sums move
more bytes, so the algorithm is faster only if XLA fuses them and there are many channels. On a GPU cuDNN
chooses such an algorithm by itself.
"""

from keras import ops

from keras_sd import backend

# Maps from 128x128, and layers from 160 channels. On maps of 128x128 the kernel takes 0.65 of the processor
# time of XLA's own with 160 channels, 0.53 with 512, and 0.86 with 64 (TensorFlow; benchmarks/kernels.md,
# `python tools/bench_kernels.py`). On another processor 128 channels at 256x256 took 0.94, so narrower layers
# are left to XLA (docs/results.md). Maps of 64x64 with 512 channels take 0.55, but their rounding takes the
# decoder's largest difference to diffusers from 8.8e-5 of the standard deviation to 1.04e-4, beyond the bar
# of 1e-4 (docs/results.md).
_FEWEST_POSITIONS = 128 * 128
_LEAST_WIDTH = 80  # c * k / (c + k) for c channels in and k out: the products saved per sum


def is_faster(inputs, kernel, strides, padding):
    """Return whether `convolve` is the faster way, given the arguments of `im2col.convolve`."""
    if tuple(kernel.shape[:2]) != (3, 3) or strides != (1, 1) or padding != "same":
        return False
    height, width = inputs.shape[1:3]
    channels, outputs = kernel.shape[2:]
    if height is None or width is None or height % 2 or width % 2 or height * width < _FEWEST_POSITIONS:
        return False
    is_wide = channels * outputs >= _LEAST_WIDTH * (channels + outputs)
    return is_wide and inputs.dtype == "float32" and backend.compiles_for_processor(inputs)


def convolve(inputs, kernel):
    """Return the "same" convolution of inputs `(n, h, w, c)` with a kernel `(3, 3, c, k)`: `(n, h, w, k)`.

    Height and width must be even. Rounding errors are no larger than those of the sum of 9 c products.
    """
    _, height, width, channels = inputs.shape
    outputs = kernel.shape[-1]
    padded = ops.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # A window of 4x4 inputs for each 2x2 outputs. Rows of windows are transformed first, then columns.
    rows = _inputs_transform([padded[:, row : row + height - 1 : 2] for row in range(4)])
    windows = [
        ops.reshape(sums, (-1, channels))
        for row in rows
        for sums in _inputs_transform([row[:, :, column : column + width - 1 : 2] for column in range(4)])
    ]
    kernels = [
        sums
        for row in _kernel_transform([kernel[row] for row in range(3)])
        for sums in _kernel_transform([row[column] for column in range(3)])
    ]
    products = ops.matmul(ops.stack(windows), ops.stack(kernels))
    products = ops.reshape(products, (4, 4, -1, height // 2, width // 2, outputs))
    rows = _outputs_transform([products[row] for row in range(4)])
    rows = [ops.stack(_outputs_transform([row[column] for column in range(4)]), axis=3) for row in rows]
    return ops.reshape(ops.stack(rows, axis=2), (-1, height, width, outputs))


def _inputs_transform(values):
    first, second, third, fourth = values
    return [first - third, second + third, third - second, second - fourth]


def _kernel_transform(values):
    first, second, third = values
    return [first, 0.5 * (first + second + third), 0.5 * (first - second + third), third]


def _outputs_transform(values):
    first, second, third, fourth = values
    return [first + second + third, second - third - fourth]
