"""Tiles: exact where a function is pointwise, without seams where it is an autoencoder."""

import numpy as np
import pytest
from keras import ops

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.tiling import in_tiles
from tests import tiny


def pictures(height, width, channels=3):
    return np.random.default_rng(0).standard_normal((2, height, width, channels)).astype("float32")


def enlarge(images):
    return np.sin(images.repeat(8, axis=1).repeat(8, axis=2))


def shrink(images):
    return np.cos(images[:, ::8, ::8])


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (13, 29), (23, 5), (31, 31), (1, 17)])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_pointwise_functions_are_exact_at_any_size(size, overlap):
    shapes = set()

    def watched(tile):
        shapes.add(tile.shape)
        return enlarge(tile)

    images = pictures(*size)
    tiled = in_tiles(watched, images, tile=8, overlap=overlap, scale=8)
    assert tiled.dtype == np.float32
    np.testing.assert_allclose(tiled, enlarge(images), atol=1e-6)
    assert shapes == {(2, min(size[0], 8), min(size[1], 8), 3)}


def test_reductions_are_exact():
    images = pictures(88, 136)
    tiled = in_tiles(shrink, images, tile=64, overlap=16, scale=1 / 8)
    np.testing.assert_allclose(tiled, shrink(images), atol=1e-6)


def test_overlaps_are_blended_linearly():
    # Each tile gives the column at which it starts.
    columns = np.broadcast_to(np.arange(16.0)[None, None, :, None], (1, 4, 16, 1))
    tiled = in_tiles(lambda tile: 0 * tile + tile[:, :1, :1], columns, tile=10, overlap=4, scale=1)
    expected = [0] * 6 + [6 * share for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)] + [6] * 6
    np.testing.assert_allclose(tiled[0, 0, :, 0], expected, atol=1e-6)


def test_seams_of_an_autoencoder_are_blended():
    vae = tiny.randomize(AutoencoderKL(tiny.VAE), 3, 0.2)
    decode = backend.jit(vae.decode, vae.variables, jit_compile=False)
    latents = pictures(40, 40, 4)[:1]
    whole = ops.convert_to_numpy(decode(latents))

    def seam(overlap):
        """The largest step from one column to the next that is not in the whole image, on average."""
        tiled = in_tiles(decode, latents, tile=24, overlap=overlap, scale=4)
        return np.abs(np.diff(tiled - whole, axis=2)).mean((0, 1, 3)).max() / whole.std()

    assert seam(12) < 0.15 < 0.4 < seam(0)


def test_an_autoencoder_encodes_in_tiles():
    vae = tiny.randomize(AutoencoderKL(tiny.VAE), 3, 0.2)
    encode = backend.jit(lambda images: vae.encode(images).mode(), vae.variables, jit_compile=False)
    images = np.tanh(pictures(72, 104))[:1]
    whole = ops.convert_to_numpy(encode(images))
    tiled = in_tiles(encode, images, tile=64, overlap=32, scale=1 / 4)
    assert np.abs(tiled - whole).mean() / whole.std() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8, "overlap": 8, "scale": 8}, "tiles of 8 cannot overlap by 8"),
        ({"tile": 16, "overlap": 4, "scale": 1 / 8}, "give a multiple of 8"),
    ],
)
def test_impossible_tiles(options, message):
    with pytest.raises(UserError, match=message):
        in_tiles(enlarge, pictures(32, 32), **options)
