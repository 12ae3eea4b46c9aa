import numpy as np
import pytest

from keras_sd.data.buckets import assign, bucket_grid, cropped_shares, merge_small
from keras_sd.errors import UserError


def log_uniform_sizes(count, seed=0):
    """Sizes of about a megapixel whose ratios are log-uniform between 1:2 and 2:1."""
    ratios = 2 ** np.random.default_rng(seed).uniform(-1, 1, count)
    return np.round(1000 * np.stack([ratios**-0.5, ratios**0.5], axis=1)).astype(int)


@pytest.mark.parametrize("resolution", [128, 256, 512, 520, 768, 1024])
def test_nine_buckets_crop_little(resolution):
    grid = bucket_grid(resolution, 9)
    sizes = log_uniform_sizes(500)
    framed = np.array(grid)[assign(sizes, grid)]
    assert cropped_shares(sizes, framed).mean() < 0.05
    # As much as resizing by the larger factor and cropping the rest really loses.
    scales = np.max(framed / sizes, axis=1)
    lost = 1 - framed.prod(axis=1) / (sizes * scales[:, None]).prod(axis=1)
    np.testing.assert_allclose(cropped_shares(sizes, framed), lost, atol=1e-12)
    squares = np.full_like(framed, resolution)
    assert 0.24 < cropped_shares(sizes, squares).mean() < 0.32


@pytest.mark.parametrize("resolution", [64, 104, 256, 512, 1000, 1024])
@pytest.mark.parametrize("count", range(1, 20))
def test_grid(resolution, count):
    grid = bucket_grid(resolution, count)
    assert len(grid) <= count and len(set(grid)) == len(grid)
    assert (resolution, resolution) in grid
    assert {(width, height) for height, width in grid} == set(grid)
    assert all(side % 8 == 0 for size in grid for side in size)
    areas = [height * width / resolution**2 for height, width in grid]
    assert max(areas) == 1 and min(areas) > (0.87 if resolution >= 256 else 0.7)
    ratios = [width / height for height, width in grid]
    assert ratios == sorted(ratios)
    if count > 2:
        assert ratios[-1] == pytest.approx(2, rel=0.15) and ratios[0] == pytest.approx(0.5, rel=0.15)


def test_an_image_goes_where_least_is_cropped():
    grid = bucket_grid(512, 9)
    sizes = np.random.default_rng(1).integers(16, 4000, (2000, 2))
    shares = np.stack([cropped_shares(sizes, np.array([size])) for size in grid], axis=1)
    np.testing.assert_allclose(shares[np.arange(2000), assign(sizes, grid)], shares.min(axis=1))


def test_small_buckets_are_merged_into_their_neighbours():
    grid = bucket_grid(512, 9)
    buckets, merged = merge_small(np.array([0, 4, 4, 4, 4, 7, 8, 8]), grid, 4)
    assert merged == [(0, 4), (7, 8), (8, 4)] and (buckets == 4).all()
    buckets, merged = merge_small(np.array([0] * 4 + [7] + [8] * 3), grid, 4)
    assert merged == [(7, 8)] and (np.bincount(buckets)[[0, 8]] == 4).all()
    buckets, merged = merge_small(np.array([3, 3]), grid, 4)
    assert merged == [] and (buckets == 3).all()


def test_repeats_count_where_buckets_are_merged():
    grid, places = bucket_grid(512, 9), np.array([0, 4, 4, 8])
    buckets, merged = merge_small(places, grid, 4, np.array([10, 2, 2, 3]))
    assert merged == [(8, 4)] and buckets.tolist() == [0, 4, 4, 4]
    assert merge_small(places, grid, 4, np.array([10, 2, 2, 0]))[1] == [(8, 4)]


@pytest.mark.parametrize(("resolution", "count"), [(500, 9), (0, 9), (-8, 9), (512, 0)])
def test_bad_arguments(resolution, count):
    with pytest.raises(UserError, match="resolution|aspect_ratio_buckets"):
        bucket_grid(resolution, count)
