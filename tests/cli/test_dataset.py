"""`keras-sd dataset`: what a run would see."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.main import cli
from keras_sd.data.survey import similar_pairs
from keras_sd.errors import UserError
from tests.programs import run_python


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(64, 64), (96, 64), (64, 128), (200, 100), (64, 64)]):
        path = tmp_path / "images" / ("3_cat" if number == 1 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), "uint8")).save(path)
        path.with_suffix(".txt").write_text("a cat\na photo of " + "very " * 40 * number + "good cat")
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "4.png")
    return tmp_path / "images"


def shown(capsys, *arguments):
    cli.main([str(one) for one in ("dataset", *arguments)], standalone_mode=False)
    return capsys.readouterr()


def test_figures_and_drawing(folder, tmp_path, capsys):
    output = tmp_path / "seen.png"
    options = ("--resolution", 64, "--aspect-ratio-buckets", 5, "--caption-lines", "each")
    options += ("--train-batch-size", 1)
    printed = shown(capsys, folder, "--output", output, *options)
    text = printed.out
    assert f"{folder}: 5 images, 7 in an epoch" in text
    assert "width: 64 to 200, median 64; height: 64 to 128, median 64 pixels" in text
    assert "0.5 to 0.667: 1, 0.95 to 1.05: 2, 1.5 to 2: 1, from 2: 1" in text
    assert re.search(r"buckets for batches of 1, width x height: images: .*64 x 64: 2", text)
    # The tokens and the length of the model, as a run counts them.
    assert "captions: 10, 6 different; tokens: 2 to 328, median 128; 4 are longer than 30" in text
    assert re.search(r"the same image: 1 too many: \S+0.png = \S+4.png", text)
    assert "'3_cat' (1 images) 3" in printed.err
    image = np.asarray(Image.open(output))
    assert image.shape[1] > 400 and len(np.unique(image)) > 100
    with pytest.raises(UserError, match="exists"):
        shown(capsys, folder, "--output", output)


def test_what_masks_leave_out_is_drawn(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    pixels = np.full((64, 64, 4), 255, "uint8")
    pixels[:, :32, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    found = []
    for option in ("--no-captions", "--alpha-mask"):
        shown(
            capsys, tmp_path / "images", "--no-captions", option, "--output", tmp_path / f"{option[2:]}.png"
        )
        found.append(np.asarray(Image.open(tmp_path / f"{option[2:]}.png")))
    is_red = (found[1] == [200, 0, 0]).all(axis=-1)
    assert not (found[0] == [200, 0, 0]).all(axis=-1).any()
    assert 0.95 * 192 * 96 < is_red.sum() <= 192 * 96  # half of the cell, but for the blurred edge


def test_a_run_that_would_be_refused(folder, tmp_path, capsys):
    options = ("--resolution", 128, "--aspect-ratio-buckets", 3, "--output", tmp_path / "seen.png")
    text = shown(capsys, folder, *options, "--no-captions").out
    assert "a run would be refused: --resolution 128: " in text and "--bucket-upscale" in text
    assert "captions:" not in text and (tmp_path / "seen.png").is_file()


def test_a_file_of_data_sets(folder, tmp_path, capsys):
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 2\n"
    )
    text = shown(capsys, tmp_path / "data.toml", "--resolution", 64, "--output", tmp_path / "seen.png").out
    assert "5 images, 14 in an epoch" in text
    (tmp_path / "data.toml").write_text((tmp_path / "data.toml").read_text() + "is_reg = true\n")
    options = ("--resolution", 64, "--output", tmp_path / "part.png", "--max-train-samples", 3)
    assert "3 images, " in shown(capsys, tmp_path / "data.toml", *options, "--seed", 1).out
    with pytest.raises(UserError, match="--seed: has no effect without --max-train-samples"):
        shown(capsys, folder, "--seed", 1)
    with pytest.raises(UserError, match=r"--caption-lines: has no effect with \S+data.toml, whose"):
        shown(capsys, tmp_path / "data.toml", "--caption-lines", "first")


def test_the_settings_of_a_run_in_a_file_of_data_sets(folder, tmp_path, capsys):
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = 32\nbatch_size = 2\nenable_bucket = true\nbucket_no_upscale = false\n"
        f"shuffle_caption = true\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )
    text = shown(capsys, tmp_path / "data.toml", "--output", tmp_path / "seen.png").out
    assert re.search(r"buckets for batches of 2, width x height: images: .*32 x 32: 3", text)
    with pytest.warns(UserWarning, match="--train-batch-size: 1, not the 2 of"):
        options = ("--train-batch-size", 1, "--output", tmp_path / "other.png")
        text = shown(capsys, tmp_path / "data.toml", *options).out
    assert "buckets for batches of 1," in text


def test_the_defaults_are_those_of_a_run(folder, tmp_path, capsys):
    options = ("--enable-bucket", "--no-center-crop", "--shuffle-caption", "--caption-separator", ";")
    text = shown(capsys, folder, "--output", tmp_path / "seen.png", *options).out
    assert "buckets for batches of 64, width x height: images: 72 x 48: 5;" in text
    assert "a run would be refused: --resolution 64: 3 of 5 images are smaller than their bucket" in text
    assert "has fewer images in an epoch than a batch, so they go into" in text


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--similarity", 0.9), "--similarity: has no effect without --clip"),
        (("--no-captions", "--caption-lines", "first"), "--caption-lines: has no effect with --no-captions"),
        (("--split", "validation"), "no sub-folder 'validation'"),
        (("--keep-tokens", 1), "--keep-tokens: has no effect without --shuffle-caption"),
    ],
)
def test_bad_options(folder, capsys, options, line):
    with pytest.raises(UserError, match=re.escape(line)):
        shown(capsys, folder, "--aspect-ratio-buckets", 3, *options)


def test_similar_pairs():
    vectors = np.random.default_rng(0).standard_normal((2500, 8)).astype("float32")
    vectors[2400] = vectors[7] + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (pair, *others) = similar_pairs(vectors, 0.99)
    assert pair[:2] == (7, 2400) and pair[2] > 0.999
    assert all(value >= 0.99 for *_, value in others)


def test_similar_images_by_clip(folder, tmp_path):
    """In processes of their own: TensorFlow and torch do not share one."""
    run_python(["-m", "keras_sd", "convert", "emoji", tmp_path / "clip", "--open-clip"])
    options = ["--clip", tmp_path / "clip", "--similarity", 0.999, "--resolution", 64]
    options += ["--output", tmp_path / "seen.png"]
    text = run_python(["-m", "keras_sd", "dataset", folder, *options])
    assert re.search(r"similar images: \d+ pairs: .*0.png ~ \S+4.png \(1.000\)", text)
