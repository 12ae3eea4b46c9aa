"""Several data sets in one TOML file."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.dataset_config import read_dataset_config
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import load_config
from keras_sd.errors import UserError

KOHYA = """
[general]
shuffle_caption = true
caption_extension = '.caption'
keep_tokens = 1
color_aug = false

[[datasets]]
resolution = 512
batch_size = 4
enable_bucket = true
bucket_no_upscale = true
flip_aug = true
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = '{folder}/cats'
  class_tokens = 'hoge cat'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'dogs'
  keep_tokens = 3
  shuffle_caption = false

[[datasets]]
resolution = [512, 512]
batch_size = 4
enable_bucket = true
bucket_no_upscale = true
flip_aug = true

  [[datasets.subsets]]
  dataset_name = 'emoji'
"""


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cats/a", "cats/b", "dogs/c")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + number, 30), (80 * number, 0, 0)).save(path)
    (tmp_path / "cats" / "a.caption").write_text("a, b, c\nsecond line")
    (tmp_path / "dogs" / "c.caption").write_text("a dog")
    return tmp_path


def write(folder, text):
    path = folder / "data.toml"
    path.write_text(text)
    return path


def test_kohyas_file(folder):
    path = write(folder, KOHYA.replace("{folder}", str(folder)))
    config = read_dataset_config(path)
    assert config.options == {
        "resolution": 512,
        "train_batch_size": 4,
        "enable_bucket": True,
        "bucket_upscale": False,
        "random_flip": True,
    }
    assert [subset.captions.keep_tokens for subset in config.subsets] == [2, 3, 1]
    source = load_config(path, 16)
    assert source.captions()[:3] == [("a, b, c",), ("hoge cat",), ("a dog",)]
    assert source.repeats()[:3].tolist() == [10, 10, 1] and len(source.repeats()) == len(source) > 3000
    rules = source.caption_rules()
    assert rules[0].shuffle_caption and rules[2].is_fixed and len(rules) == len(source)
    assert source.sizes()[:3].tolist() == [[30, 20], [30, 21], [30, 22]]
    assert len(set(source.content_keys())) == len(source)
    assert (source[2]["image"] == (160, 0, 0)).all() and source[3]["image"].shape == (16, 16, 3)
    assert any("1 images without a caption file" in note for note in source.notes)
    framed = FramedSource(source.at_size(32), Framing(16, aspect_ratio_buckets=3, bucket_upscale=True))
    assert framed[1]["captions"] == ("hoge cat",)
    with pytest.raises(IndexError):
        source[len(source)]
    before = source.fingerprint()
    (folder / "dogs" / "c.caption").write_text("another dog")
    assert load_config(path, 16).fingerprint() != before


def test_weights_are_shares_of_the_draws(folder):
    subsets = [("cats", 1), ("dogs", 3.1)]
    text = "".join(
        f"[[datasets.subsets]]\nimage_dir = '{name}'\nclass_tokens = 'x'\nweight = {weight}\n"
        for name, weight in subsets
    )
    for name in ("cats/a", "dogs/c"):
        (folder / f"{name}.caption").unlink()
    source = load_config(write(folder, "[[datasets]]\n" + text), 16)
    repeats = source.repeats()
    assert source.caption_rules() is None
    assert repeats[2] / repeats.sum() == pytest.approx(3.1 / 4.1, rel=0.02)
    assert np.gcd.reduce(repeats) == 1


ONE = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'dogs'\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[datasets", "not valid TOML"),
        ("", "no datasets; write [[datasets]]"),
        ("[[datasets]]\n", "[[datasets]] 1: subsets; write"),
        ("[other]\nx = 1\n" + ONE, "the file: other is not supported; remove it"),
        (ONE + "is_reg = true\n", "data.toml: is_reg has an effect in DreamBooth alone; remove it"),
        (ONE + "caption_dropout_rate = 0.1\n", "give `proportion_empty_prompts`"),
        (ONE + "batch_size = 4\n", "subset 1: batch_size has no place there"),
        (ONE + "num_repeats = 'ten'\n", "num_repeats 'ten': not of type int"),
        (ONE + "num_repeats = true\n", "num_repeats True: not of type int"),
        (ONE + "num_repeats = 0\n", "num_repeats 0: out of range"),
        (ONE + "num_repeats = 1000001\n", "num_repeats 1000001: out of range; give 1 to 1,000,000"),
        (ONE + f"num_repeats = {10**30}\n", "out of range; give 1 to 1,000,000"),
        (ONE + "weight = -1\n", "weight -1: out of range"),
        (ONE + "weight = 1e-300\n", "weight 1e-300: out of range; give 1e-06 to 1,000,000"),
        (ONE + "weight = 2\nnum_repeats = 2\n", "num_repeats has no effect beside weight"),
        (ONE + "dataset_name = 'emoji'\n", "give image_dir, a folder, or dataset_name, and not both"),
        (ONE + "keep_tokens = -1\n", "subset 1: keep_tokens -1"),
        (ONE + ONE.replace("[[datasets]]", "[[datasets]]\nresolution = 64"), "resolution differs between"),
        (ONE + "weight = 1\n" + ONE, "some subsets have a weight and others none"),
        ("[general]\nresolution = [64, 32]\n" + ONE, "resolution [64, 32]: not a square"),
        (ONE.replace("dogs", "birds"), "birds: no such folder"),
    ],
)
def test_faulty_files(folder, text, line):
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), 16)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="not found; check its name"):
        read_dataset_config(tmp_path / "none.toml")
