"""Convolutions of 3x3 windows with fewer multiplications: Winograd's F(2x2, 3x3) (Lavin and Gray, 2016).

Four neighbouring outputs take 16 products of sums of inputs instead of 36 products of inputs. The sums
are the price: they move more bytes, and pay where XLA fuses them, channels are many and maps are large. On a
GPU cuDNN chooses such an algorithm by itself.
"""

from keras import ops

from keras_sd import backend

# From measurements on two cores: of narrower layers the sums cost more than the products they save. Smaller
# maps would gain too, but take the rounding of the decoder beyond 1e-4 of its deviation.
_FEWEST_POSITIONS = 16384
_LEAST_WIDTH = 80


def pays(inputs, kernel, strides, padding):
    """Return whether `convolve` takes these arguments of `im2col.convolve` and is the faster way."""
    if tuple(kernel.shape[:2]) != (3, 3) or strides != (1, 1) or padding != "same":
        return False
    height, width = inputs.shape[1:3]
    channels, outputs = kernel.shape[2:]
    if height is None or width is None or height % 2 or width % 2 or height * width < _FEWEST_POSITIONS:
        return False
    # A product of matrices moves so many numbers less than it multiplies.
    is_wide = channels * outputs >= _LEAST_WIDTH * (channels + outputs)
    return is_wide and inputs.dtype == "float32" and backend.compiles_for_processor(inputs)


def convolve(inputs, kernel):
    """Return the "same" convolution of inputs `(n, h, w, c)` with a kernel `(3, 3, c, k)`: `(n, h, w, k)`.

    Height and width are even. Errors are no larger than those of the sum over 9 c products.
    """
    _, height, width, channels = inputs.shape
    outputs = kernel.shape[-1]
    padded = ops.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Windows of 4x4 inputs, one for each 2x2 outputs: the windows' rows first, then their columns.
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
