"""Which way of computing a convolution is the fastest: Winograd's, im2col, or the backend's own."""

from keras import ops

from keras_sd.kernels import im2col, winograd


def convolve(inputs, kernel, strides, padding):
    """Return the convolution of inputs `(n, h, w, c)` with a kernel `(size, size, c, k)` by a faster way.

    Args:
        strides: of rows and columns.
        padding: "same" or "valid".

    Returns:
        `(n, h', w', k)`, or None where the backend's own way is the fastest, or the only one.
    """
    if winograd.pays(inputs, kernel, strides, padding):
        return winograd.convolve(inputs, ops.convert_to_tensor(kernel))
    if im2col.pays(inputs, kernel, strides, padding):
        return im2col.convolve(inputs, ops.convert_to_tensor(kernel), strides, padding)
    return None
