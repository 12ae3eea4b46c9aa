"""A perceptual distance between images: LPIPS' form on the features of a CLIP image encoder."""

import math

from keras import ops

from keras_sd.metrics.features import resize

_EPSILON = 1e-10


class PerceptualDistance:
    """Distance of images in the features of all blocks of an image encoder.

    The form is that of LPIPS without learned weights (Zhang et al., "The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric", 2018, equation 1): the features of each patch are scaled to unit length;
    the squared differences are summed over the features, averaged over the patches and added up over the
    blocks. Images that are larger than the encoder's are seen in windows of its size that cover them, at
    full resolution; smaller ones are enlarged.

    Args:
        image_encoder: `models.image_encoder.ImageEncoder`, whose weights stay as they are.
    """

    def __init__(self, image_encoder):
        self.image_encoder = image_encoder

    def __call__(self, images, others):
        """Return the distance of each pair of float `(n, h, w, 3)` images in [-1, 1]: float32 `(n,)`."""
        pairs = zip(self._features(images), self._features(others), strict=True)
        return sum(ops.mean(ops.sum(ops.square(one - other), axis=-1), axis=1) for one, other in pairs)

    def _features(self, images):
        """Return unit vectors `(n, patches of all windows, features)` of each block."""
        size = self.image_encoder.config.image_size
        if min(images.shape[1:3]) < size:
            images = resize(images, size)
        rows, columns = (_starts(length, size) for length in images.shape[1:3])
        windows = [images[:, top : top + size, left : left + size] for top in rows for left in columns]
        states = self.image_encoder.hidden_states(ops.concatenate(windows))
        return [_joined(_unit(ops.cast(state, "float32")), len(windows)) for state in states]


def _starts(length, size):
    """Return where the fewest windows of a size start that cover a length, evenly spaced."""
    count = math.ceil(length / size)
    return [round(index * (length - size) / max(count - 1, 1)) for index in range(count)]


def _unit(features):
    return features / ops.sqrt(ops.sum(ops.square(features), axis=-1, keepdims=True) + _EPSILON)


def _joined(features, windows):
    """Return `(windows n, patches, features)`, window by window, as `(n, windows patches, features)`."""
    return ops.concatenate(ops.split(features, windows), axis=1)
