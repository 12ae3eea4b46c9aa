import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.config import ImageEncoderConfig
from keras_sd.errors import UserError
from keras_sd.metrics.features import ClipFeatures, InceptionFeatures, extract, resize
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.pixels import images_to_unit
from keras_sd.weights.readers import read_checkpoint

TINY = ImageEncoderConfig(
    image_size=32,
    patch_size=16,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=8,
)


def random_images(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("uint8")


@pytest.mark.parametrize("source, target", [(64, 32), (64, 48), (72, 64), (33, 75), (64, 64)])
def test_resize_is_antialiased_bilinear(source, target):
    images = random_images(2, source) / np.float32(255)
    expected = ops.image.resize(images, (target, target), interpolation="bilinear", antialias=True)
    np.testing.assert_allclose(resize(images, target), expected, atol=2e-6)


def test_resize_takes_rectangles():
    images = random_images(2, 64)[:, :40] / np.float32(255)
    expected = ops.image.resize(images, (32, 32), interpolation="bilinear", antialias=True)
    np.testing.assert_allclose(resize(images, 32), expected, atol=2e-6)
    expected = ops.image.resize(images, (24, 56), interpolation="bilinear", antialias=True)
    np.testing.assert_allclose(resize(images, (24, 56)), expected, atol=5e-6)


def test_range_is_that_of_the_networks():
    images = np.array([0, 255], "uint8")[:, None, None, None] * np.ones((1, 8, 8, 3), "uint8")
    unit = ops.convert_to_numpy(images_to_unit(ops.convert_to_tensor(images)))
    assert unit.dtype == np.float32
    assert unit[0].min() == unit[0].max() == -1.0
    assert unit[1].min() == unit[1].max() == 1.0


def test_clip_features_are_the_pooled_vector():
    encoder = ImageEncoder(TINY)
    extractor = ClipFeatures(encoder)
    images = random_images(5, 32)
    features = extract(extractor, images, batch_size=2)  # the last batch is not full
    assert extractor.name == "kid_emoji"
    assert features.shape == (5, 24) and features.dtype == np.float32
    expected = ops.convert_to_numpy(encoder.features(images.astype("float32") / 127.5 - 1.0))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(extract(extractor, images.astype("float32")), expected, atol=1e-5)
    assert extract(extractor, random_images(1, 64)).shape == (1, 24)


def test_inception_features_are_the_averaged_map():
    extractor = InceptionFeatures(image_size=75, weights=None)
    images = random_images(3, 64)
    features = extract(extractor, images, batch_size=2)
    assert extractor.name == "kid_inception_imagenet"
    assert features.shape == (3, 2048) and features.dtype == np.float32
    enlarged = ops.image.resize(images.astype("float32"), (75, 75), interpolation="bilinear")
    prepared = keras.applications.inception_v3.preprocess_input(ops.convert_to_numpy(enlarged))
    expected = ops.convert_to_numpy(extractor.network(prepared, training=False))
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


def test_inception_weights_are_read_from_a_file(tmp_path):
    path = tmp_path / "inception.weights.h5"
    first = InceptionFeatures(image_size=75, weights=None)
    first.network.save_weights(path)
    second = InceptionFeatures(image_size=75, weights=str(path))
    images = random_images(1, 64)
    np.testing.assert_array_equal(first(images), second(images))


def test_unfit_input_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="use 75 or more"):
        InceptionFeatures(image_size=64, weights=None)
    with pytest.raises(UserError, match="no such InceptionV3 weights file"):
        InceptionFeatures(image_size=75, weights=str(tmp_path / "missing.h5"))
    garbage = tmp_path / "garbage.h5"
    garbage.write_bytes(b"not an HDF5 file")
    with pytest.raises(UserError, match="not InceptionV3 weights") as caught:
        InceptionFeatures(image_size=75, weights=str(garbage))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="images of type uint8 and shape .0, 32"):
        extract(ClipFeatures(ImageEncoder(TINY)), random_images(0, 32))


def test_imagenet_weights_out_of_reach_are_told_in_one_line(tmp_path):
    code = """if True:
        from keras_sd.errors import UserError
        from keras_sd.metrics.features import InceptionFeatures
        try:
            InceptionFeatures(image_size=75)
        except UserError as error:
            print(error)
    """
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **proxies, "no_proxy": "", "NO_PROXY": "", "KERAS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("InceptionV3 weights:")]
    assert len(told) == 1
    assert "neither cached nor downloadable" in told[0]
    assert "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5" in told[0]


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_file_of_weights_runs_no_code(tmp_path):
    """A Lambda layer is a program in a file of a whole model; of such files only weights are read."""
    marker = tmp_path / "marker"

    def leave(x, path=str(marker)):
        open(path, "w").close()
        return x

    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Lambda(leave), keras.layers.Dense(2)])
    for name in ("model.h5", "model.keras"):
        model.save(tmp_path / name)
    model.save_weights(tmp_path / "model.weights.h5")
    marker.unlink()  # building the model ran it
    for name in ("model.h5", "model.keras", "model.weights.h5"):
        with pytest.raises(UserError, match="not InceptionV3 weights"):
            InceptionFeatures(75, tmp_path / name)
        if name.endswith(".h5"):
            with pytest.raises(UserError):
                read_checkpoint(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.zeros((64, 64, 3), "uint8"), {}, "images of type"),
        (np.zeros((2, 0, 8, 3), "uint8"), {}, "images of type"),
        (np.full((1, 8, 8, 3), np.nan), {}, "not all numbers are finite"),
        (random_images(1, 8), {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_features_are_of_images(images, options, message):
    with pytest.raises(UserError, match=message):
        extract(ClipFeatures(ImageEncoder(TINY)), images, **options)
    with pytest.raises(UserError, match="image_size 75.5"):
        InceptionFeatures(75.5, weights=None)
