"""`keras-sd encode` fills a folder, and training on it encodes nothing."""

import shlex
import signal
import time

import pytest
from PIL import Image

from keras_sd.cli.main import main
from keras_sd.cli.train.main import main as train
from tests import tiny
from tests.programs import Program
from tests.training.test_stored_encodings import shards, write_images

SHAPES = ("--resolution", 24, "--aspect-ratio-buckets", 3, "--bucket-upscale", "--random-flip")
SHAPES += ("--train-batch-size", 2)


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
    _, _, told = run_program(main, *encode(folder, tmp_path / "part", "--max-train-samples", 4))
    assert told.endswith(f"8 images encoded, 4 are in {tmp_path / 'part'}\n")
    arguments = ["text-to-image", "--train-data-dir", folder / "images", "--output-dir", tmp_path / "run"]
    arguments += ["--pretrained-model-name-or-path", folder / "model", *SHAPES]
    arguments += ["--cache-latents", "disk", "--cache-dir", cache, "--no-jit-compile"]
    arguments += ["--max-train-steps", 2, "--evaluation-steps", 0]
    code, _, told = run_program(train, *arguments, "--lr-warmup-steps", 0)
    assert code == 0 and f"encodings: 18 of 18 images are in {cache}" in told
    assert "encoding images" not in told and shards(cache) == written


def test_buckets_are_merged_as_in_lora(folder, tmp_path, run_program):
    """With the batch size of LoRA of the model, which is also that of a file of data sets."""
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = 24\nenable_bucket = true\nbucket_no_upscale = false\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
    )
    model = ("--pretrained-model-name-or-path", folder / "model")
    cache = tmp_path / "cache"
    layer = ("--clip-skip", 2)
    code, _, told = run_program(main, "encode", tmp_path / "data.toml", cache, *model, *layer)
    assert code == 0 and "buckets for batches of 4, width x height: images: " in told
    assert "buckets: merged as in training with --train-batch-size 4; give it there, too" in told
    arguments = ["lora", "--dataset-config", tmp_path / "data.toml", "--output-dir", tmp_path / "run", *model]
    arguments += ["--cache-latents", "disk", "--cache-dir", cache, "--no-jit-compile", "--max-train-steps", 1]
    written = shards(cache)
    options = ("--lr-warmup-steps", 0, "--evaluation-steps", 0, *layer)
    code, _, told = run_program(train, *arguments, *options)
    assert code == 0 and f"encodings: 9 of 9 images are in {cache}" in told, told
    assert shards(cache) == written
    (tmp_path / "data.toml").write_text(
        (tmp_path / "data.toml").read_text().replace("resolution", "shuffle_caption = true\nresolution")
    )
    code, _, told = run_program(main, "encode", tmp_path / "data.toml", cache, *model)
    assert code == 2 and "captions are drawn anew each time; encode --images-only" in told


@pytest.fixture(scope="module")
def many(folder):
    """Enough images for several shards, and the shards of a run that nothing interrupted."""
    write_images(folder / "many", 200)
    done = Program(["-m", "keras_sd", *encode_many(folder, folder / "whole")]).finish()
    assert done.returncode == 0, done.stderr
    return shards(folder / "whole")


def encode_many(folder, cache, *more):
    arguments = list(encode(folder, cache, "--images-only", *more))
    return [folder / "many" if argument == folder / "images" else argument for argument in arguments]


def started(folder, cache, count):
    """A run that has written so many shards."""
    program = Program(["-m", "keras_sd", *encode_many(folder, cache)])
    deadline = time.monotonic() + 300
    while len(list(cache.glob("latents-*"))) < count:
        assert program.is_running() and time.monotonic() < deadline, program.printed()
        time.sleep(0.005)
    return program


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_second_run_goes_on_where_one_was_ended(folder, many, tmp_path, number):
    program, began = started(folder, tmp_path / "cache", 1), time.monotonic()
    program.send(number)
    done = program.finish()
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    if number == signal.SIGINT:
        assert time.monotonic() - began < 10
        line = done.stderr.splitlines()[-1]
        assert f"SIGINT: ended; the shards in {tmp_path / 'cache'} stay; go on with: " in line, done.stderr
        assert line.endswith(shlex.join(map(str, encode_many(folder, tmp_path / "cache"))))
        assert "Traceback" not in done.stderr
    kept = shards(tmp_path / "cache")
    assert kept.items() < many.items()
    done = Program(["-m", "keras_sd", *encode_many(folder, tmp_path / "cache")]).finish()
    assert done.returncode == 0 and shards(tmp_path / "cache") == many, done.stderr


def test_two_runs_at_once_write_the_same(folder, many, tmp_path):
    first = started(folder, tmp_path / "cache", 1)
    second = Program(["-m", "keras_sd", *encode_many(folder, tmp_path / "cache")])
    for program in (first, second):
        done = program.finish()
        assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "cache") == many


def test_images_that_are_too_small_are_left_out(folder, tmp_path, run_program):
    command = list(encode(folder, tmp_path / "cache", "--images-only"))
    command.remove("--bucket-upscale")
    command[command.index("--resolution") + 1] = 32
    code, _, told = run_program(main, *command)
    assert code == 2 and "images are smaller than their bucket: " in told
    assert "enlarge them by --bucket-upscale, leave them out by --on-bad-sample skip, or lower" in told
    Image.new("RGB", (64, 64)).save(folder / "images" / "large.png")
    code, _, told = run_program(main, *command, "--on-bad-sample", "skip")
    (folder / "images" / "large.png").unlink()
    assert code == 0 and "9 of 10 images are smaller than their bucket, and are left out: " in told
    assert "1 are in" in told.splitlines()[-1]


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
