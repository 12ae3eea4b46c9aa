"""The choice between Winograd's algorithm, im2col, gradients as GEMM and the backend's own convolution."""

from keras import ops

from keras_sd.kernels import gemm_gradients, im2col, winograd


def convolve(inputs, kernel, strides, padding):
    """Return the convolution of inputs `(n, h, w, c)` with a kernel `(size, size, c, k)` by a faster kernel.

    Args:
        strides: of rows and columns.
        padding: "same" or "valid".

    Returns:
        `(n, h', w', k)`, or None if the backend's own convolution is the fastest, or the only one possible.
    """
    if winograd.is_faster(inputs, kernel, strides, padding):
        return winograd.convolve(inputs, ops.convert_to_tensor(kernel))
    if im2col.is_faster(inputs, kernel, strides, padding):
        return im2col.convolve(inputs, ops.convert_to_tensor(kernel), strides, padding)
    if gemm_gradients.is_faster(inputs, kernel, strides, padding):
        return gemm_gradients.convolve(inputs, ops.convert_to_tensor(kernel))
    return None
