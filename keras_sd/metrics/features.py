"""Feature extractors for metrics.

An extractor maps images in [0, 255] (uint8 or float, (n, h, w, 3)) to float32 features (n, d). It is built of
`keras.ops`, so it runs by itself or inside a compiled step. `.name` is the name of a KID over its features.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.arguments import Floats, Images, Tensor, checked_images, checked_path, whole_number
from keras_sd.errors import UserError
from keras_sd.models.batches import in_batches
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.inception import IMAGE_SIZE, InceptionV3
from keras_sd.models.pixels import images_to_unit
from keras_sd.models.precision import dtype_policy
from keras_sd.weights.inception import FILE_NAME, find_inception_weights, read_inception_weights
from keras_sd.weights.rules import load_weights


class FeatureExtractor:
    """Base of the extractors: resizes images and scales them to [-1, 1].

    Args:
        network: the Keras model that computes the features, built.
        image_size: side in pixels of the square images that the network takes.
        name: the name of a KID over these features.
        jit_compile: whether to compile with XLA on TensorFlow; JAX always does.

    Attributes:
        antialias: whether images are smoothed when they are made smaller.
    """

    antialias = True

    def __init__(self, network: keras.Model, image_size: int, name: str, jit_compile: bool = True) -> None:
        self.network, self.image_size, self.name = network, image_size, name
        self._jit_compile = jit_compile

    def __call__(self, images: Tensor) -> Tensor:
        images = images_to_unit(ops.convert_to_tensor(images))
        images = resize(images, self.image_size, self.antialias)
        return ops.cast(self.features(images), "float32")

    def features(self, images: Tensor) -> Tensor:
        """Return the features `(n, d)` of images in [-1, 1] of the network's size."""
        raise NotImplementedError

    @functools.cached_property
    def compiled(self) -> Callable:
        """The extractor as a compiled function, for use outside of a compiled step."""
        return backend.jit(
            self.__call__, self.network.variables, self._jit_compile, title="features of images"
        )


class ClipFeatures(FeatureExtractor):
    """Extracts the features of a CLIP image tower: its pooled vector before the projection.

    Args:
        image_encoder: `keras_sd.models.image_encoder.ImageEncoder`.
        name: "kid_emoji" for the bundled encoder.
        jit_compile: as in `FeatureExtractor`.
    """

    def __init__(
        self, image_encoder: ImageEncoder, name: str = "kid_emoji", jit_compile: bool = True
    ) -> None:
        super().__init__(image_encoder, image_encoder.config.image_size, name, jit_compile)

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images)


class PublishedInceptionFeatures(FeatureExtractor):
    """Extracts the 2048 features of Inception v3 that the FID and KID of papers are measured on.

    The network and its weights are those of TensorFlow's graph of 2015-12-05. Images are resized to 299
    pixels as in pytorch-fid: bilinear, without antialiasing. torch-fidelity resizes as TensorFlow 1 did, half
    a pixel beside, so its values differ by a little.

    Args:
        inception_weights: the path of the published file `pt_inception-2015-12-05-6726825d.pth`, or of its
            tensors in another file of torch or safetensors; None looks in torch hub's cache, and downloads
            the file if it is not there. The name is "kid_inception" for the published file, and
            "kid_inception_unverified" for another one, with a warning.
        jit_compile: as in `FeatureExtractor`.

    Raises:
        UserError: there is no such file, it is damaged or of another network, or could not be downloaded.
    """

    antialias = False

    def __init__(self, inception_weights: str | Path | None = None, jit_compile: bool = True) -> None:
        path, is_published = find_inception_weights(inception_weights)
        if not is_published:
            warnings.warn(
                f"{path}: not the published file by its SHA-256, so KID and FID are called unverified; "
                "compare them with no paper's",
                stacklevel=2,
            )
        with dtype_policy("float32"):
            network = InceptionV3()
        remedy = f"name the file {FILE_NAME}"
        load_weights(network, read_inception_weights(path), source=path, remedy=remedy)
        name = "kid_inception" if is_published else "kid_inception_unverified"
        super().__init__(network, IMAGE_SIZE, name, jit_compile)

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)


class InceptionFeatures(FeatureExtractor):
    """Extracts the averaged last feature map of Keras' InceptionV3, 2048 wide, as in the Keras DDIM example.

    Its weights are of ImageNet's 1000 classes, and its values compare with no paper's FID and KID, for which
    there is `PublishedInceptionFeatures`.

    Args:
        image_size: side in pixels to which images are resized: 299 is the network's own, 75 the smallest and
            fastest.
        weights: "imagenet" (from the Keras cache, downloaded when missing), the path of a weights file
            without the classifier, or None for random weights.
        jit_compile: as in `FeatureExtractor`.

    Raises:
        UserError: the weights are not available or not InceptionV3's, or `image_size` is too small.
    """

    def __init__(
        self,
        image_size: int = 299,
        weights: str | Path | None = "imagenet",
        name: str = "kid_inception_imagenet",
        jit_compile: bool = True,
    ) -> None:
        if whole_number("image_size", image_size, 1) < 75:
            raise UserError(f"InceptionV3 at {image_size} pixels: too small; use 75 or more (299 is its own)")
        super().__init__(_inception(image_size, weights), image_size, name, jit_compile)

    def features(self, images: Tensor) -> Tensor:
        return self.network(images, training=False)


def extract(extractor: FeatureExtractor, images: Images, batch_size: int = 64) -> Floats:
    """Return the features of all images as a NumPy array, float32 (n, d), computed in batches.

    All batches are of one size, so that the extractor is compiled once.

    Raises:
        UserError: the images have another type or shape, a number in them is not finite, or `batch_size` is
            out of range.
    """
    images = checked_images("images", images, "(n, height, width, 3)", floats=True)
    whole_number("batch_size", batch_size, 1)
    return in_batches(extractor.compiled, images, batch_size)


def resize(images, size, antialias=True):
    """Resize float images (n, h, w, c): bilinear, aligned as areas.

    Two matrix multiplications, because XLA has no kernel for TensorFlow's antialiased resize.

    Args:
        size: the side of square images, or `(height, width)`.
        antialias: average over all pixels when shrinking; False takes the two nearest in each direction.
    """
    height, width = images.shape[1:3]
    new_height, new_width = (size, size) if isinstance(size, int) else size
    if height != new_height:
        images = ops.einsum("ph,nhwc->npwc", _bilinear_weights(height, new_height, antialias), images)
    if width != new_width:
        images = ops.einsum("qw,nhwc->nhqc", _bilinear_weights(width, new_width, antialias), images)
    return images


def _bilinear_weights(source, target, antialias):
    """Return the weights of `source` pixels in `target` pixels, float32 (target, source); rows sum to 1.

    The filter is a triangle around each target pixel's centre, as wide as the coarser of the two grids needs;
    without `antialias` always as wide as two source pixels.
    """
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    width = max(scale, 1.0) if antialias else 1.0
    distances = np.abs(np.arange(source)[None, :] - centres) / width
    weights = np.maximum(1.0 - distances, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")


def _inception(image_size, weights):
    remedy = "give the path of inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5, or measure kid_emoji"
    if weights not in (None, "imagenet") and not checked_path("weights", weights).is_file():
        raise UserError(f"{weights}: no such InceptionV3 weights file; {remedy}")
    try:
        return keras.applications.InceptionV3(
            include_top=False, pooling="avg", input_shape=(image_size, image_size, 3), weights=weights
        )
    except Exception as error:
        # Keras raises a bare Exception when a download fails, and many kinds for an unreadable file.
        reason = " ".join(str(error).split())
        if weights == "imagenet":
            fault = f"InceptionV3 weights: neither cached nor downloadable ({reason})"
        else:
            fault = f"{weights}: not InceptionV3 weights ({reason})"
        raise UserError(f"{fault}; {remedy}") from error
