"""The published Inception v3 against pytorch-fid's, with random weights: features, FID and KID."""

import warnings

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.metrics.features import PublishedInceptionFeatures, resize
from keras_sd.metrics.fid import frechet_inception_distance, name_of
from keras_sd.metrics.kid import kernel_inception_distance
from keras_sd.models.precision import dtype_policy
from keras_sd.weights.inception import FILE_NAME
from tests.metrics.inception import coloured_images, random_weights
from tests.programs import run_python
from tests.reference import run_reference

SUBSETS, SUBSET_SIZE, DIRECTIONS = 10, 5, 5

# pytorch-fid reads its weights from torch hub's cache, and torch-fidelity has the published KID.
REFERENCE = f"""
    import os
    import torchvision
    os.environ["TORCH_HOME"] = str(folder)
    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    state = network.state_dict() | load_file(folder / "weights.safetensors")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    path = folder / "hub" / "checkpoints" / "{FILE_NAME}"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    from pytorch_fid.fid_score import calculate_frechet_distance
    from pytorch_fid.inception import InceptionV3
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    network = InceptionV3([3]).eval()
    for name in ("real", "generated", "large"):
        outputs[name] = network(inputs[name].permute(0, 3, 1, 2) / 255)[0][:, :, 0, 0]
    kid = kid_features_to_metric(
        outputs["real"], outputs["generated"],
        kid_subsets={SUBSETS}, kid_subset_size={SUBSET_SIZE}, rng_seed=0, verbose=False,
    )
    outputs["kid"] = torch.tensor(kid[KEY_METRIC_KID_MEAN])
    moments = []
    for name in ("real", "generated"):
        rows = outputs[name].double() @ inputs["directions"]
        moments += [rows.mean(0).numpy(), torch.cov(rows.T).numpy()]
    outputs["fid"] = torch.tensor(calculate_frechet_distance(*moments))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with weights as safetensors, and as a file of torch where torch hub keeps it."""
    folder = tmp_path_factory.mktemp("inception")
    save_file(random_weights(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    inputs = {
        "real": coloured_images(0, 8, 40, 48),
        "generated": np.random.default_rng(1).integers(0, 256, (8, 40, 48, 3)).astype("uint8"),
        "large": coloured_images(2, 1, 340, 310),  # made smaller, where antialiasing would change it
        "directions": np.random.default_rng(3).standard_normal((2048, DIRECTIONS)),
    }
    return inputs, run_reference(REFERENCE, inputs, folder)


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def features(request, folder, reference):
    """Features of the sets of images: under TensorFlow of torch's file, under JAX of the safetensors."""
    of_torch = folder / "hub" / "checkpoints" / FILE_NAME
    weights = {"tensorflow": of_torch, "jax": folder / "weights.safetensors"}[request.param]
    images = {name: reference[0][name] for name in ("real", "generated", "large")}
    save_file(images, folder / "images.safetensors")
    files = (weights, folder / "images.safetensors", folder / "features.safetensors")
    run_python(["-m", "tests.metrics.inception", *files], request.param)
    return load_file(folder / "features.safetensors")


def test_features_are_those_of_pytorch_fid(features, reference):
    for name, found in features.items():
        expected = reference[1][name]
        assert found.shape == expected.shape == (len(reference[0][name]), 2048)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert reference[1]["real"].std(axis=0).mean() > 0.05 * reference[1]["real"].mean()  # the images differ


def test_kid_is_torch_fidelitys(features, reference):
    options = {"num_subsets": SUBSETS, "subset_size": SUBSET_SIZE}
    kid = kernel_inception_distance(features["real"], features["generated"], **options)
    assert kid.mean == pytest.approx(float(reference[1]["kid"]), rel=1e-3)
    assert kid.mean > 0.01


def test_fid_is_pytorch_fids(features, reference):
    """In a few directions, as the covariance of so few images is singular otherwise."""
    rows = [features[name] @ reference[0]["directions"] for name in ("real", "generated")]
    assert frechet_inception_distance(*rows) == pytest.approx(float(reference[1]["fid"]), rel=1e-3)
    assert reference[1]["fid"] > 1


def test_fid_of_few_images_is_the_formula_of_the_references_features(features, reference):
    real, generated = (reference[1][name].astype("float64") for name in ("real", "generated"))
    centred = [(rows - rows.mean(axis=0)) / (len(rows) - 1) ** 0.5 for rows in (real, generated)]
    # The singular values of the small product are the roots of the eigenvalues of the covariances' product.
    mixed = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum()
    expected += sum((rows**2).sum() for rows in centred) - 2 * mixed
    with pytest.warns(UserWarning, match="FID of 8 images with 2048 features: the covariance is singular"):
        found = frechet_inception_distance(features["real"], features["generated"])
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_the_published_file_has_the_plain_name(folder):
    with pytest.warns(UserWarning, match="weights.safetensors: not the published file by its SHA-256"):
        extractor = PublishedInceptionFeatures(folder / "weights.safetensors")
    assert extractor.name == "kid_inception_unverified"
    assert name_of(extractor.name) == "fid_inception_unverified"


def test_weights_stay_float32_under_any_policy(folder):
    with dtype_policy("mixed_float16"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = PublishedInceptionFeatures(folder / "weights.safetensors")
    kinds = {keras.backend.standardize_dtype(one.dtype) for one in extractor.network.weights}
    assert kinds == {extractor.network.Mixed_7c.branch1x1.conv.compute_dtype} == {"float32"}


def without(weights, name):
    del weights[name]


def misshape(weights, name):
    weights[name] = weights[name][:-1]


def spoil(weights, name):
    weights[name][0] = np.nan


@pytest.mark.filterwarnings("ignore:.*not the published file")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without, "1 tensors missing, 0 misshapen, 0 left over .* Mixed_7c.branch_pool.bn.bias is missing"),
        (misshape, "0 tensors missing, 1 misshapen"),
        (spoil, "hold NaN or infinity"),
        (
            lambda weights, name: weights.update({"AuxLogits.fc.weight": np.zeros((1000, 768), "float32")}),
            "AuxLogits.fc.weight .* has no place",
        ),
        # Of a network for ImageNet's 1000 classes.
        (
            lambda weights, name: weights.update({"fc.weight": np.zeros((1000, 2048), "float32")}),
            "fc.weight .* has no place",
        ),
    ],
)
def test_other_weights_are_told_in_one_line(tmp_path, folder, change, told):
    weights = load_file(folder / "weights.safetensors")
    change(weights, "Mixed_7c.branch_pool.bn.bias")
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        PublishedInceptionFeatures(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value) and "config.json" not in str(caught.value)


@pytest.mark.parametrize("source, target", [(340, 299), (310, 299), (40, 299), (64, 32)])
def test_resize_without_antialiasing_takes_the_two_nearest_pixels(source, target):
    row = np.random.default_rng(0).random(source).astype("float32")
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    expected = np.interp(centres, np.arange(source), row)
    images = np.broadcast_to(row[None, :, None, None], (1, source, target, 1))
    found = np.asarray(resize(images, target, antialias=False))[0, :, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
