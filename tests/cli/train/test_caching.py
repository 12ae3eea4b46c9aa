"""A run has the same weights wherever its encodings are kept, on both backends."""

import pytest
from safetensors.numpy import load_file

from keras_sd.cli.train.main import main
from keras_sd.training.caching import MODES
from tests import tiny
from tests.programs import Program
from tests.training.test_stored_encodings import write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caching")
    write_images(folder / "images", 9)
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, output, mode, *more):
    values = ["lora", "--train-data-dir", folder / "images", "--output-dir", output / mode]
    values += ["--pretrained-model-name-or-path", folder / "model", "--cache-latents", mode]
    values += ["--cache-dir", output / "cache"] if mode == "disk" else []
    values += ["--max-train-steps", 4, "--train-batch-size", 2, "--evaluation-steps", 0]
    values += ["--learning-rate", 0.01, "--lr-warmup-steps", 0, "--rank", 2, *more]
    return [*map(str, values), "--aspect-ratio-buckets", "3", "--bucket-upscale", "--random-flip"]


def assert_same_weights(output):
    """Of all runs in a folder; of their updates, which are zero at first."""
    weights = [load_file(output / mode / "checkpoint-4" / "weights.safetensors") for mode in MODES]
    assert all(array.any() for array in weights[0].values())
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all((other[name] == array).all() for name, array in weights[0].items())


def test_weights_on_tensorflow(folder, tmp_path, run_program):
    for mode in MODES:
        code, _, told = run_program(main, *arguments(folder, tmp_path, mode, "--no-jit-compile"))
        assert code == 0, told
    assert_same_weights(tmp_path)


def test_weights_on_jax(folder, tmp_path):
    for mode in MODES:
        done = Program(["-m", "keras_sd.train", *arguments(folder, tmp_path, mode)]).finish()
        assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path)
