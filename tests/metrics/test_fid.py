"""FID against the formula by scipy's matrix square root, as pytorch-fid and torch-fidelity compute it."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from keras_sd.errors import UserError
from keras_sd.metrics.fid import frechet_inception_distance, name_of


def features(seed, count, width, shift=0.0, scale=1.0):
    """Correlated features, as a network's are."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((width, width)) / width**0.5
    return scale * generator.standard_normal((count, width)) @ mixing + shift


def by_matrix_square_root(real, generated):
    means = [rows.mean(axis=0) for rows in (real, generated)]
    covariances = [np.cov(rows, rowvar=False) for rows in (real, generated)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = means[0] - means[1]
    return difference @ difference + np.trace(sum(covariances)) - 2 * np.trace(root.real)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.1, 1.7)])
def test_is_the_published_formula(shift, scale):
    real, generated = features(0, 300, 24), features(1, 200, 24, shift, scale)
    expected = by_matrix_square_root(real, generated)
    assert frechet_inception_distance(real, generated) == pytest.approx(expected, rel=1e-9)


def test_of_known_distributions():
    """Of normal distributions of variances a and b in each dimension: d (sqrt a - sqrt b)^2 + |shift|^2."""
    generator = np.random.default_rng(0)
    real, generated = generator.standard_normal((2, 200_000, 3))
    found = frechet_inception_distance(real, 2 * generated + 1)
    assert found == pytest.approx(3 * (2 - 1) ** 2 + 3, rel=0.02)
    assert frechet_inception_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_few_images_are_told_of_and_computed_all_the_same():
    real, generated = features(0, 10, 24), features(1, 12, 24, 0.5)
    with pytest.warns(UserWarning, match="FID of 10 images with 24 features: the covariance is singular"):
        found = frechet_inception_distance(real, generated)
    means = [rows.mean(axis=0) for rows in (real, generated)]
    centred = [
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip((real, generated), means, strict=True)
    ]
    # Of singular covariances the square root is that of the Gram matrix of one against the other.
    gram = centred[0] @ centred[1].T
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(gram @ gram.T), 0)).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + sum((rows**2).sum() for rows in centred) - 2 * trace
    assert found == pytest.approx(expected, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_inception_distance(features(0, 25, 24), features(1, 25, 24))


def test_bad_features_and_names():
    good = features(0, 30, 4)
    for other, told in (
        (features(1, 30, 5), "FID features of shapes"),
        (good * np.nan, "FID features: not all are finite"),
        ([["a"]], "FID features: not two tables of numbers"),
        (good[:1], "FID of 30 real and 1 generated images"),
    ):
        with pytest.raises(UserError, match=told):
            frechet_inception_distance(good, other)
    assert [name_of(f"kid_{network}") for network in ("emoji", "inception", "inception_imagenet")] == [
        *("fid_emoji", "fid_inception", "fid_inception_imagenet"),
    ]
