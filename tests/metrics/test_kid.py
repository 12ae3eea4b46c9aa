import json

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.metrics.clip_score import clip_score
from keras_sd.metrics.kid import (
    KernelInceptionDistance,
    kernel_inception_distance,
    paired_kernel_inception_distance,
    polynomial_mmd,
)
from tests.programs import run_python
from tests.reference import run_reference


def features(seed, count, width, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, width)) + shift


def brute_force_mmd(real, generated):
    """The definition, pair by pair."""

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    def within(rows):
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return np.mean(pairs)

    between = np.mean([kernel(x, y) for x in real for y in generated])
    return within(real) + within(generated) - 2 * between


def test_full_set_estimate_is_the_definition():
    real, generated = features(0, 9, 5), features(1, 6, 5, shift=0.3)
    assert polynomial_mmd(real, generated) == pytest.approx(brute_force_mmd(real, generated), abs=1e-12)


def test_identical_distributions_average_to_zero():
    estimates = [polynomial_mmd(features(2 * i, 40, 8), features(2 * i + 1, 40, 8)) for i in range(400)]
    standard_error = np.std(estimates) / 20
    assert abs(np.mean(estimates)) < 3 * standard_error
    assert min(estimates) < 0 < max(estimates)  # unbiased, hence below zero half the time
    assert standard_error < 0.005


def test_estimate_does_not_depend_on_the_sample_size():
    def mean(count):
        draws = [
            polynomial_mmd(features(2 * i, count, 8), features(2 * i + 1, count, 8, shift=0.5))
            for i in range(300)
        ]
        return np.mean(draws), np.std(draws) / 300**0.5

    (small, small_error), (large, large_error) = mean(6), mean(48)
    assert abs(small - large) < 3 * (small_error + large_error)
    assert large > 0.3


def test_subsets_have_the_mean_of_the_whole_and_a_spread():
    real, generated = features(0, 300, 8), features(1, 400, 8, shift=0.5)
    whole = polynomial_mmd(real, generated)
    kid = kernel_inception_distance(real, generated, num_subsets=200, subset_size=50)
    assert 0 < kid.standard_deviation < whole
    assert abs(kid.mean - whole) < 5 * kid.standard_deviation / 200**0.5
    assert kid == kernel_inception_distance(real, generated, num_subsets=200, subset_size=50, seed=0)
    assert kid != kernel_inception_distance(real, generated, num_subsets=200, subset_size=50, seed=1)


@pytest.mark.parametrize("subset_size, seed, width", [(100, 0, 2048), (37, 2020, 64)])
def test_agrees_with_torch_fidelity(tmp_path, subset_size, seed, width):
    # Non-negative and skewed, as pooled activations are.
    real = np.abs(features(0, 150, width)).astype("float32")
    generated = np.abs(features(1, 120, width, shift=0.1)).astype("float32")
    script = f"""
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
        result = kid_features_to_metric(
            inputs["real"], inputs["generated"],
            kid_subsets=20, kid_subset_size={subset_size}, rng_seed={seed}, verbose=False,
        )
        outputs["mean"] = torch.tensor(result[KEY_METRIC_KID_MEAN])
        outputs["standard_deviation"] = torch.tensor(result[KEY_METRIC_KID_STD])
    """
    reference = run_reference(script, {"real": real, "generated": generated}, tmp_path)
    kid = kernel_inception_distance(real, generated, num_subsets=20, subset_size=subset_size, seed=seed)
    assert kid.mean == pytest.approx(float(reference["mean"]), abs=1e-5)
    assert kid.standard_deviation == pytest.approx(float(reference["standard_deviation"]), abs=1e-5)
    assert abs(kid.mean) > 1e-3  # not an agreement of zeros


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_metric_in_a_compiled_step_is_the_mean_of_the_batches(backend):
    results = json.loads(run_python(["-m", "tests.metrics.compiled_step"], backend).splitlines()[-1])
    assert results["backend"] == backend
    assert results["tensorflow_imported"] == (backend == "tensorflow")
    assert results["empty"] == 0.0
    assert results["numpy"] > 0.01
    # The eager pass ends with a batch of one image, which has no estimate and must not count.
    assert results["eager"] == pytest.approx(results["numpy"], abs=1e-5)
    assert results["compiled"] == pytest.approx(results["numpy"], abs=1e-5)
    assert results["variables"] == []  # nothing of the metric is a weight of the model


def test_unfit_features_are_refused():
    with pytest.raises(UserError, match="subset size 1000"):
        kernel_inception_distance(features(0, 20, 4), features(1, 30, 4))
    with pytest.raises(UserError, match="num_subsets 0"):
        kernel_inception_distance(features(0, 20, 4), features(1, 30, 4), num_subsets=0, subset_size=10)
    with pytest.raises(UserError, match="same extractor"):
        polynomial_mmd(features(0, 20, 4), features(1, 20, 5))
    with pytest.raises(UserError, match="two of each"):
        polynomial_mmd(features(0, 1, 4), features(1, 20, 4))


def test_pairs_that_are_alike_do_not_pull_the_estimate_below_zero():
    """Copies with a little noise: the same distribution, so KID is zero up to its own spread."""
    generator = np.random.default_rng(0)
    plain, paired = [], []
    for _ in range(40):
        real = generator.standard_normal((60, 16))
        generated = real + 0.1 * generator.standard_normal((60, 16))
        plain.append(kernel_inception_distance(real, generated, subset_size=30, num_subsets=20).mean)
        paired.append(paired_kernel_inception_distance(real, generated, num_subsets=20).mean)
    error = np.std(paired) / np.sqrt(len(paired))
    assert abs(np.mean(paired)) < 4 * error
    assert np.mean(plain) < -4 * np.std(plain) / np.sqrt(len(plain))


def test_pairs_are_as_many_of_each():
    with pytest.raises(UserError, match="3 real and 3 generated"):
        paired_kernel_inception_distance(features(0, 3, 4), features(1, 3, 4))
    with pytest.raises(UserError, match="8 real and 6 generated"):
        paired_kernel_inception_distance(features(0, 8, 4), features(1, 6, 4))


NAN = features(0, 8, 4) * np.nan


@pytest.mark.parametrize(
    "measure, message",
    [
        (lambda f: kernel_inception_distance(NAN, f, subset_size=5), "not all are finite"),
        (lambda f: paired_kernel_inception_distance(f, NAN), "not all are finite"),
        (lambda f: polynomial_mmd(f, NAN), "not all are finite"),
        (lambda f: polynomial_mmd(f[:, :0], f[:, :0]), "not two tables"),
        (lambda f: polynomial_mmd([["a"]], f), "not two tables"),
        (lambda f: kernel_inception_distance(f, f, subset_size="a"), "subset_size 'a'"),
        (lambda f: kernel_inception_distance(f, f, subset_size=2.5), "subset_size 2.5"),
        (lambda f: kernel_inception_distance(f, f, subset_size=5, num_subsets=1.5), "num_subsets 1.5"),
        (lambda f: kernel_inception_distance(f, f, subset_size=5, seed=-1), "seed -1"),
        (lambda f: paired_kernel_inception_distance(f, f, seed=-1), "seed -1"),
        (lambda f: KernelInceptionDistance(5), "extractor 5: not a function"),
        (lambda f: KernelInceptionDistance(lambda x: x).update_state(f[:0], f), "real_images of shape"),
        (lambda f: clip_score(f * 0, f), "an embedding is zero"),
        (lambda f: clip_score(f, NAN), "not all embeddings are finite"),
    ],
)
def test_nothing_is_measured_of_numbers_that_are_none(measure, message):
    with pytest.raises(UserError, match=message):
        measure(features(0, 8, 4))
