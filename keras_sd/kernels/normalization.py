"""Group and layer normalisation with gradients in closed form.

Automatic differentiation of the moments has twice the operations to trace and compile, and keeps the centred
inputs in memory as well. The closed form keeps the inputs alone, and computes the gradient by two sums over
them, a scale and a shift (Wu and He, 2018; Ba et al., 2016).
"""

from keras import ops


def group_normalization(inputs, gamma, beta, groups, epsilon, *, silu=False):
    """Group normalisation of `(n, height, width, channels)`, of which all but n are known.

    Moments are taken per channel first and then joined inside each group, so the large tensor is never
    reshaped to five dimensions; what remains are sums, and a shift and a scale per channel.

    Args:
        inputs: of any precision; moments and what follows are float32.
        gamma, beta: scale and shift, `(channels,)` float32.
        silu: whether the sigmoid linear unit follows (Elfwing et al., 2018).

    Returns:
        What has the shape and the dtype of the inputs.
    """
    _, height, width, channels = inputs.shape
    shape = (groups, channels // groups)

    def grouped(values):
        return ops.reshape(values, (-1, *shape))

    def spread(values):
        """`(n, groups, 1 or channels of a group)` to `(n, 1, 1, channels)`."""
        if values.shape[-1] != shape[1]:
            values = values + ops.zeros(shape)
        return ops.reshape(values, (-1, 1, 1, channels))

    @ops.custom_gradient
    def normalize(inputs, gamma, beta):
        # Half precision loses the small differences that a variance is made of.
        values = ops.cast(inputs, "float32")
        take_moments = _moments if inputs.dtype == "float32" else _moments_in_one_pass
        mean, variance = take_moments(values, grouped, spread)
        inverse_std = ops.rsqrt(variance + epsilon)  # (n, groups, 1)
        scale = spread(inverse_std * ops.reshape(gamma, shape))

        def gradient(upstream):
            # From the inputs again, which costs XLA nothing where it fuses: no other large tensor is kept.
            centred = ops.cast(inputs, "float32") - mean
            upstream = ops.cast(upstream, "float32")
            if silu:
                upstream = upstream * _silu_slope(centred * scale + beta)
            total = grouped(ops.sum(upstream, axis=(1, 2)))
            product = grouped(ops.sum(upstream * centred, axis=(1, 2)))
            # Of the mean and of the variance, per group.
            weights = ops.reshape(gamma, shape) / (height * width * shape[1])
            along = ops.sum(product * weights, axis=-1, keepdims=True) * ops.square(inverse_std)
            shift = ops.sum(total * weights, axis=-1, keepdims=True)
            slope = upstream * scale - centred * spread(along * inverse_std) - spread(shift * inverse_std)
            return (
                ops.cast(slope, inputs.dtype),
                ops.reshape(ops.sum(product * inverse_std, axis=0), (channels,)),
                ops.reshape(ops.sum(total, axis=0), (channels,)),
            )

        outputs = (values - mean) * scale + beta
        if silu:
            outputs = outputs * ops.sigmoid(outputs)
        return ops.cast(outputs, inputs.dtype), gradient

    return normalize(inputs, gamma, beta)


def _moments(values, grouped, spread):
    """Mean `(n, 1, 1, channels)` and variance `(n, groups, 1)` of each group."""
    mean = spread(ops.mean(grouped(ops.mean(values, axis=(1, 2))), axis=-1, keepdims=True))
    squares = ops.mean(ops.square(values - mean), axis=(1, 2))
    return mean, ops.mean(grouped(squares), axis=-1, keepdims=True)


def _moments_in_one_pass(values, grouped, spread):
    """Return the same from the moments of the channels (Chan, Golub and LeVeque, 1983), in a single pass.

    It is meant for GPUs, where memory bandwidth is the bottleneck. On a CPU, XLA is faster with two passes.
    """
    # Squares of numbers far from zero would lose those differences in float32 too.
    origin = values[:, :1, :1]
    shifted = values - origin
    offset = ops.mean(shifted, axis=(1, 2), keepdims=True)
    square = ops.mean(ops.square(shifted), axis=(1, 2), keepdims=True)
    means = grouped(origin + offset)
    mean = ops.mean(means, axis=-1, keepdims=True)
    variances = grouped(square - ops.square(offset)) + ops.square(means - mean)
    return spread(mean), ops.maximum(ops.mean(variances, axis=-1, keepdims=True), 0.0)


def layer_normalization(inputs, gamma, beta, epsilon):
    """Layer normalisation over the last axis of `(..., features)`.

    Args:
        inputs: of any precision; moments and what follows are float32.
        gamma, beta: scale and shift, `(features,)` float32.

    Returns:
        What has the shape and the dtype of the inputs.
    """

    @ops.custom_gradient
    def normalize(inputs, gamma, beta):
        values = ops.cast(inputs, "float32")
        mean = ops.mean(values, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(values - mean), axis=-1, keepdims=True)
        inverse_std = ops.rsqrt(variance + epsilon)

        def gradient(upstream):
            normal = (ops.cast(inputs, "float32") - mean) * inverse_std
            upstream = ops.cast(upstream, "float32")
            product = upstream * normal
            scaled = upstream * gamma
            along = ops.mean(scaled * normal, axis=-1, keepdims=True)
            slope = (scaled - ops.mean(scaled, axis=-1, keepdims=True) - normal * along) * inverse_std
            examples = tuple(range(len(inputs.shape) - 1))
            return ops.cast(slope, inputs.dtype), ops.sum(product, examples), ops.sum(upstream, examples)

        outputs = (values - mean) * inverse_std * gamma + beta
        return ops.cast(outputs, inputs.dtype), gradient

    return normalize(inputs, gamma, beta)


def _silu_slope(values):
    sigmoid = ops.sigmoid(values)
    return sigmoid * (1.0 + values * (1.0 - sigmoid))
