"""Kernel Inception Distance (KID): the distance between two sets of images, in a feature space.

Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, section 4: the squared maximum mean
discrepancy (MMD²) of the features under the kernel k(x, y) = (x·y / d + 1)³. The estimator is unbiased, so a
small sample scores no worse on average than a large one, and an estimate may be slightly below zero.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_sd.arguments import Images, Tensor, shown, whole_number
from keras_sd.errors import UserError
from keras_sd.metrics.features import extract

DEGREE = 3


class KID(NamedTuple):
    """Mean and population standard deviation of the estimates over the subsets."""

    mean: float
    standard_deviation: float


def kernel_inception_distance(
    real_features: npt.ArrayLike,
    generated_features: npt.ArrayLike,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KID:
    """Return the KID of two sets of features, (n, d) and (m, d), computed in float64.

    The estimate is repeated over `num_subsets` pairs of subsets of `subset_size` rows, each drawn without
    replacement: first from the real rows, then from the generated ones, by one `numpy.random.RandomState`.
    That is torch-fidelity's rule, so the same seed draws the same subsets there.

    Raises:
        UserError: a set has fewer rows than a subset, or the widths differ.
    """
    real, generated = checked_features(real_features, generated_features)
    smallest = min(len(real), len(generated))
    if not 2 <= whole_number("subset_size", subset_size, 1) <= smallest:
        raise UserError(
            f"KID subset size {subset_size}: outside 2 to {smallest}, the rows of the smaller set; "
            f"choose one within, or measure more images"
        )
    whole_number("num_subsets", num_subsets, 1)
    random = np.random.RandomState(whole_number("seed", seed, 0, 2**32 - 1))
    estimates = []
    for _ in range(num_subsets):
        real_subset = real[random.choice(len(real), subset_size, replace=False)]
        generated_subset = generated[random.choice(len(generated), subset_size, replace=False)]
        estimates.append(_unbiased_mmd(real_subset, generated_subset, np))
    return KID(float(np.mean(estimates)), float(np.std(estimates)))


def paired_kernel_inception_distance(
    real_features: npt.ArrayLike, generated_features: npt.ArrayLike, *, num_subsets: int = 100, seed: int = 0
) -> KID:
    """Return the KID of paired sets: generated row i was generated from the caption of real row i.

    The estimator is unbiased for independent sets only. Here an image resembles its counterpart, which pulls
    the estimate of a small set far below zero. So the pairs are split at random into two halves, and the real
    rows of each half are compared with the generated rows of the other, in subsets of half their size.

    Raises:
        UserError: there are fewer than four pairs, or the shapes differ.
    """
    real, generated = checked_features(real_features, generated_features)
    if len(real) != len(generated) or len(real) < 4:
        raise UserError(
            f"KID of {len(real)} real and {len(generated)} generated images in pairs: needs as many of each, "
            "four or more; measure more images"
        )
    whole_number("seed", seed, 0, 2**32 - 1)
    left, right = np.array_split(np.random.RandomState(seed).permutation(len(real)), 2)
    options = {"num_subsets": num_subsets, "subset_size": max(2, len(right) // 2), "seed": seed}
    estimates = [
        kernel_inception_distance(real[one], generated[other], **options)
        for one, other in ((left, right), (right, left))
    ]
    return KID(*(float(np.mean(figures)) for figures in zip(*estimates, strict=True)))


def polynomial_mmd(real_features, generated_features):
    """Return the unbiased MMD² of two sets of features, (n, d) and (m, d), without subsets, in float64."""
    real, generated = checked_features(real_features, generated_features)
    if min(len(real), len(generated)) < 2:
        raise UserError(
            f"KID of {len(real)} real and {len(generated)} generated images: an unbiased estimate "
            f"needs two of each; measure more images"
        )
    return float(_unbiased_mmd(real, generated, np))


class KernelInceptionDistance(keras.metrics.Metric):
    """A Keras metric: the KID of batches of real and generated images, usable inside a compiled step.

    The result is the mean of the unbiased estimates of the batches. A batch with a single real or generated
    image has no such estimate and is left out. The result is zero before the first update.

    Args:
        extractor: function from images in [0, 255], (n, h, w, 3), to features (n, d), made of `keras.ops`
            (see `keras_sd.metrics.features`). It must be built. Its weights are constants of the step; they
            are neither trained nor saved with the metric.

    Example:
        ```python
        kid = keras_sd.KernelInceptionDistance(keras_sd.InceptionFeatures(75))
        kid.update_state(real_images, generated_images)
        print(float(kid.result()))
        ```
    """

    def __init__(self, extractor: Any, name: str = "kid", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if not callable(extractor):
            raise UserError(f"extractor {shown(extractor)}: not a function from images to features; give one")
        self.extractor = extractor
        self.total = self.add_variable(shape=(), initializer="zeros", name="total")
        self.batches = self.add_variable(shape=(), initializer="zeros", name="batches")

    def update_state(self, real_images: Tensor, generated_images: Tensor) -> None:
        """Add a batch of images in [0, 255], (n, h, w, 3) and (m, h, w, 3).

        A compiled step cannot raise an error for numbers that are not finite: they make the result NaN.

        Raises:
            UserError: a batch has no images.
        """
        for name, images in (("real_images", real_images), ("generated_images", generated_images)):
            if 0 in tuple(images.shape):
                raise UserError(f"{name} of shape {tuple(images.shape)}: no images; give one or more")
        real = ops.cast(self.extractor(real_images), self.dtype)
        generated = ops.cast(self.extractor(generated_images), self.dtype)
        enough = ops.logical_and(ops.shape(real)[0] > 1, ops.shape(generated)[0] > 1)
        estimate = ops.where(enough, _unbiased_mmd(real, generated, ops), 0.0)
        self.total.assign_add(ops.cast(estimate, self.dtype))
        self.batches.assign_add(ops.cast(enough, self.dtype))

    def result(self) -> Tensor:
        """Return the mean over the batches so far, a scalar."""
        return self.total / ops.maximum(self.batches, 1.0)

    def of_pairs(self, real_features: npt.ArrayLike, generated_images: Images) -> KID:
        """Return the `KID` of whole sets, outside a compiled step, as `paired_kernel_inception_distance`.

        Args:
            real_features: `extract(extractor, real_images)`, (n, d), computed once.
            generated_images: uint8 (n, h, w, 3); image i was made for the caption of real image i.
        """
        return paired_kernel_inception_distance(real_features, extract(self.extractor, generated_images))

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("KernelInceptionDistance holds a feature extractor; build it anew")


def checked_features(real_features, generated_features, metric="KID"):
    """Return two sets of features as float64 tables of one width.

    Args:
        metric: what messages name.

    Raises:
        UserError: they are no tables of finite numbers, or have different widths.
    """
    try:
        real, generated = (np.asarray(each, np.float64) for each in (real_features, generated_features))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{metric} features: not two tables of numbers; extract both with an extractor"
        ) from error
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1] or not real.shape[1]:
        raise UserError(
            f"{metric} features of shapes {real.shape} and {generated.shape}: not two tables of one width; "
            f"extract both with the same extractor"
        )
    if not (np.isfinite(real).all() and np.isfinite(generated).all()):
        raise UserError(f"{metric} features: not all are finite numbers; check the images and the extractor")
    return real, generated


def _unbiased_mmd(real, generated, namespace):
    """Return the unbiased MMD² (equation 4): within a set, no row is compared with itself.

    Args:
        namespace: `numpy` or `keras.ops`.
    """
    width = real.shape[1]

    def kernel(rows, columns):
        return (namespace.matmul(rows, namespace.transpose(columns)) / width + 1.0) ** DEGREE

    def mean_off_diagonal(gram):
        rows = namespace.shape(gram)[0]
        pairs = namespace.maximum(rows * (rows - 1), 1)
        off_diagonal = namespace.sum(gram) - namespace.trace(gram)
        return namespace.divide(off_diagonal, pairs)

    within = mean_off_diagonal(kernel(real, real)) + mean_off_diagonal(kernel(generated, generated))
    return within - 2.0 * namespace.mean(kernel(real, generated))
