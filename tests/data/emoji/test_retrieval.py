import numpy as np
import pytest

from keras_sd.data.emoji.retrieval import first_of_identical, nearest, shrink, top1
from keras_sd.errors import UserError


def random_images(seed, count, size):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype("uint8")


def test_shrink_by_two_is_the_mean_of_four():
    images = random_images(0, 3, 64)
    expected = images.reshape(3, 32, 2, 32, 2, 3).astype(float).mean(axis=(2, 4))
    np.testing.assert_allclose(shrink(images, 32), expected.reshape(3, -1), atol=1e-9)


def test_shrink_by_a_fraction_shares_pixels_out_by_area():
    # 3 pixels to 2: each takes one whole pixel and half of the middle one, along both sides.
    image = np.arange(9, dtype="uint8").reshape(1, 3, 3, 1) * np.ones(3, "uint8")
    weights = np.array([[2, 1, 0], [0, 1, 2]]) / 3
    expected = weights @ image[0, :, :, 0] @ weights.T
    np.testing.assert_allclose(shrink(image, 2).reshape(2, 2, 3)[..., 0], expected, atol=1e-12)
    # The mean of an image is kept whatever the size.
    images = random_images(0, 2, 72)
    np.testing.assert_allclose(shrink(images, 32).mean(axis=1), images.mean(axis=(1, 2, 3)), atol=1e-9)


def test_nearest_agrees_with_brute_force():
    queries, gallery = random_images(1, 7, 64), random_images(2, 40, 64)
    # More gallery than one chunk holds, with repeats further on: the lowest index wins.
    gallery = np.concatenate([gallery] * 30)
    indices, distances = nearest(queries, gallery)
    small_queries, small_gallery = shrink(queries, 32), shrink(gallery[:40], 32)
    for query, index, distance in zip(small_queries, indices, distances, strict=True):
        every = [np.sqrt(((query - candidate) ** 2).sum()) for candidate in small_gallery]
        assert index % 40 == int(np.argmin(every))
        assert distance == pytest.approx(min(every), abs=1e-6)


def test_nearest_finds_its_own_among_near_twins():
    base = random_images(3, 1, 64)
    gallery = np.repeat(base, 32, axis=0)
    for index in range(32):
        gallery[index, 2 * index, 0, 0] ^= 1  # one level apart in one value
    indices, distances = nearest(gallery, gallery)
    assert indices.tolist() == list(range(32))
    np.testing.assert_allclose(distances, 0.0, atol=1e-9)


def test_top1_counts_the_right_ones_and_takes_twins_as_one():
    gallery = random_images(4, 6, 32)
    gallery[5] = gallery[2]
    noise = np.random.default_rng(5).integers(0, 3, (4, 32, 32, 3))
    queries = np.clip(gallery[[0, 1, 2, 3]].astype(int) + noise, 0, 255).astype("uint8")
    assert top1(queries, gallery, [0, 1, 2, 3]) == 1.0
    assert top1(queries, gallery, [0, 1, 5, 4]) == 0.75
    assert first_of_identical(gallery).tolist() == [0, 1, 2, 3, 4, 2]


def test_unfit_pictures_are_refused():
    with pytest.raises(UserError, match="smaller than 32x32"):
        nearest(random_images(0, 1, 16), random_images(0, 1, 64))
    with pytest.raises(UserError, match="uint8"):
        nearest(random_images(0, 1, 64) / 255.0, random_images(0, 1, 64))
