"""Group and layer normalisation with gradients in closed form.

Automatic differentiation of the moments traces and compiles more operations (178 instead of 109 for a group
normalisation with its SiLU, docs/results.md), and keeps the centred inputs in memory as well. The closed form
keeps the inputs only, and computes the gradient by two sums over them, a scale and a shift (Wu and He, 2018;
Ba et al., 2016).
"""

from keras import ops

from keras_sd import backend


def group_normalization(inputs, gamma, beta, groups, epsilon, *, silu=False):
    """Return the group normalisation of `(n, height, width, channels)`; all but n must be known.

    Moments are computed per channel first and then combined in each group, so the large tensor is never
    reshaped to five dimensions.

    Args:
        inputs: of any precision; moments and what follows are float32.
        gamma, beta: scale and shift, `(channels,)` float32.
        silu: whether to apply the sigmoid linear unit (Elfwing et al., 2018) afterwards.

    Returns:
        A tensor with the shape and the dtype of the inputs.
    """
    if backend.traces_for_openvino():
        settings = {"groups": groups, "epsilon": epsilon, "silu": silu}
        return backend.mark("group_normalization", [inputs, gamma, beta], inputs.shape, **settings)
    _, height, width, channels = inputs.shape
    shape = (groups, channels // groups)

    def grouped(values):
        return ops.reshape(values, (-1, *shape))

    def spread(values):
        """Broadcast `(n, groups, 1 or channels of a group)` to `(n, 1, 1, channels)`."""
        if values.shape[-1] != shape[1]:
            values = values + ops.zeros(shape)
        return ops.reshape(values, (-1, 1, 1, channels))

    @ops.custom_gradient
    def normalize(inputs, gamma, beta):
        # Half precision would lose the small differences that make up a variance.
        values = ops.cast(inputs, "float32")
        take_moments = _moments if inputs.dtype == "float32" else _moments_in_one_pass
        mean, variance = take_moments(values, grouped, spread)
        inverse_std = ops.rsqrt(variance + epsilon)  # (n, groups, 1)
        scale = spread(inverse_std * ops.reshape(gamma, shape))

        def gradient(upstream):
            # Computed again from the inputs, so that no other large tensor is kept. XLA fuses it.
            centred = ops.cast(inputs, "float32") - mean
            upstream = ops.cast(upstream, "float32")
            if silu:
                upstream = upstream * _silu_slope(centred * scale + beta)
            total = grouped(ops.sum(upstream, axis=(1, 2)))
            product = grouped(ops.sum(upstream * centred, axis=(1, 2)))
            # The gradients of the variance and of the mean, per group.
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
    """Return mean `(n, 1, 1, channels)` and variance `(n, groups, 1)` of each group."""
    mean = spread(ops.mean(grouped(ops.mean(values, axis=(1, 2))), axis=-1, keepdims=True))
    squares = ops.mean(ops.square(values - mean), axis=(1, 2))
    return mean, ops.mean(grouped(squares), axis=-1, keepdims=True)


def _moments_in_one_pass(values, grouped, spread):
    """Return the same from the moments of the channels (Chan, Golub and LeVeque, 1983), in a single pass.

    It is used in half precision, which is for GPUs: there it took the sums of a UNet from 1.3 to 0.5 ms, at a
    batch of 2. On a CPU it takes 1.1 times as long as two passes (docs/results.md).
    """
    # Squares of numbers far from zero would lose these differences in float32 too.
    origin = values[:, :1, :1]
    shifted = values - origin
    offset = ops.mean(shifted, axis=(1, 2), keepdims=True)
    square = ops.mean(ops.square(shifted), axis=(1, 2), keepdims=True)
    means = grouped(origin + offset)
    mean = ops.mean(means, axis=-1, keepdims=True)
    variances = grouped(square - ops.square(offset)) + ops.square(means - mean)
    return spread(mean), ops.maximum(ops.mean(variances, axis=-1, keepdims=True), 0.0)


def layer_normalization(inputs, gamma, beta, epsilon):
    """Return the layer normalisation over the last axis of `(..., features)`.

    Args:
        inputs: of any precision; moments and what follows are float32.
        gamma, beta: scale and shift, `(features,)` float32.

    Returns:
        A tensor with the shape and the dtype of the inputs.
    """
    if backend.traces_for_openvino():
        return backend.mark("layer_normalization", [inputs, gamma, beta], inputs.shape, epsilon=epsilon)

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
