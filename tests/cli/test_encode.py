"""`keras-sd encode` fills a folder, and training on it encodes nothing."""

import pytest

from keras_sd.cli.main import main
from keras_sd.cli.train.main import main as train
from tests import tiny
from tests.programs import Program
from tests.training.test_stored_encodings import shards, write_images

SHAPES = ("--resolution", 24, "--aspect-ratio-buckets", 3, "--bucket-upscale", "--random-flip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three ratios, a model, and their encodings."""
    folder = tmp_path_factory.mktemp("encode")
    write_images(folder / "images", 9)
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def encode(folder, cache, *more):
    model = ("--pretrained-model-name-or-path", folder / "model")
    return ("encode", folder / "images", cache, *model, *SHAPES, *more)


def test_training_encodes_nothing_that_was_encoded(folder, tmp_path, run_program):
    cache = tmp_path / "cache"
    code, _, told = run_program(main, *encode(folder, cache))
    assert code == 0 and f"18 images encoded, 9 are in {cache}" in told
    written = shards(cache)
    assert {name.partition("-")[0] for name in written} == {"latents", "text"}
    assert cache.stat().st_mode & 0o777 == 0o700
    assert run_program(main, *encode(folder, cache))[2].endswith(f"0 images encoded, 9 are in {cache}\n")
    arguments = ["text-to-image", "--train-data-dir", folder / "images", "--output-dir", tmp_path / "run"]
    arguments += ["--pretrained-model-name-or-path", folder / "model", *SHAPES]
    arguments += ["--cache-latents", "disk", "--cache-dir", cache, "--no-jit-compile"]
    arguments += ["--max-train-steps", 2, "--train-batch-size", 2, "--evaluation-steps", 0]
    code, _, told = run_program(train, *arguments, "--lr-warmup-steps", 0)
    assert code == 0 and f"encodings: 18 of 18 images are in {cache}" in told
    assert "encoding images" not in told and shards(cache) == written


def test_on_jax(folder, tmp_path):
    command = encode(folder, tmp_path, "--images-only", "--cache-dtype", "bfloat16", "--batch-size", 3)
    done = Program(["-m", "keras_sd", *command]).finish()
    assert done.returncode == 0, done.stderr
    assert {name.partition("-")[0] for name in shards(tmp_path)} == {"latents"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--no-center-crop",), "--no-center-crop: another crop at each draw cannot be kept; leave it out"),
        (
            ("--images-only", "--max-token-length", 150),
            "--max-token-length: has no effect with --images-only",
        ),
        (("--cache-dtype", "int8"), "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
    ],
)
def test_bad_options(folder, tmp_path, run_program, arguments, told):
    code, _, errors = run_program(main, *encode(folder, tmp_path / "cache", *arguments))
    assert code == 2 and told in errors
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cache-latents", "disk", "--no-center-crop"), "--cache-latents disk: keeps one crop of an image"),
        (
            ("--cache-dir", "here", "--no-center-crop"),
            "--cache-dir here: has no effect with --cache-latents off",
        ),
        (("--cache-latents", "off", "--cache-dtype", "float16"), "--cache-dtype float16: has no effect with"),
        (
            ("--cache-latents", "--cache-dir", "here"),
            "--cache-dir here: has no effect with --cache-latents memory",
        ),
    ],
)
@pytest.mark.parametrize("method", ["lora", "lcm", "dreambooth", "textual-inversion"])
def test_training_refuses_what_has_no_effect(folder, tmp_path, run_program, method, arguments, told):
    more = {
        "dreambooth": ("--instance-data-dir", folder / "images", "--instance-prompt", "a"),
        "textual-inversion": ("--train-data-dir", folder / "images", "--placeholder-token", "<a>"),
    }
    options = more.get(method, ("--train-data-dir", folder / "images"))
    code, _, errors = run_program(train, method, "--output-dir", tmp_path / "run", *options, *arguments)
    assert code == 2 and told in errors
