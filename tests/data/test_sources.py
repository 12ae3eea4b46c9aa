import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.sources import EmojiSource, available_splits, batches, load_source
from keras_sd.errors import UserError

SOURCE = [{"image": np.full((2, 2, 3), i, "uint8"), "captions": (f"number {i}",)} for i in range(10)]


def draw(example, generator):
    return {
        "image": example["image"],
        "noise": generator.standard_normal((3,), dtype="float32"),
        "timestep": generator.integers(1000),
    }


def take(count, **options):
    options = {"batch_size": 4, "seed": 7, "draw": draw} | options
    return list(itertools.islice(iter(batches(SOURCE, **options)), count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def order(stream):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in stream])


def test_stacked_arrays():
    batch = take(1)[0]
    assert batch["image"].shape == (4, 2, 2, 3) and batch["image"].dtype == np.uint8
    assert batch["noise"].shape == (4, 3) and batch["noise"].dtype == np.float32
    assert batch["timestep"].shape == (4,)


def test_same_seed_same_stream():
    assert_equal(take(12), take(12))
    assert not np.array_equal(take(1)[0]["noise"], take(1, seed=8)[0]["noise"])
    assert not np.array_equal(order(take(5)), order(take(5, seed=8)))


def test_start_continues_the_stream():
    whole = take(12)
    assert_equal(whole[5:], take(7, start=5))
    assert_equal(take(1, start=10**12), take(1, start=10**12))


def test_processes_share_each_batch():
    whole = take(9, start=2)
    for count in (2, 4):
        parts = [take(9, start=2, process_index=i, process_count=count) for i in range(count)]
        steps = zip(*parts, strict=True)
        joined = [{key: np.concatenate([part[key] for part in step]) for key in whole[0]} for step in steps]
        assert_equal(whole, joined)


def test_each_epoch_is_its_own_permutation():
    epochs = order(take(25)).reshape(10, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 10
    # Consecutive seeds must not give the same epochs one later.
    assert not (order(take(25, seed=8)).reshape(10, 10)[:-1] == epochs[1:]).all(axis=1).any()
    assert (order(take(5, shuffle=False)) == np.tile(np.arange(10), 2)).all()


def test_batch_size_changes_no_position():
    left, right = take(10), take(4, batch_size=10)
    for key in left[0]:
        np.testing.assert_array_equal(
            np.concatenate([b[key] for b in left]), np.concatenate([b[key] for b in right])
        )


def test_noise_of_positions_differs():
    noise = np.concatenate([batch["noise"] for batch in take(100)])
    assert len(np.unique(noise)) > 1190  # 1200 draws, all but sure to differ
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_repeats_weigh_examples():
    seen = order(take(9, repeats=[3] * 4 + [1] * 6))  # two epochs of 18
    assert (np.bincount(seen, minlength=10) == [6] * 4 + [2] * 6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0: not a positive multiple"),
        ({"batch_size": 5, "process_count": 2}, "batch size 5: not a positive multiple of 2"),
        ({"seed": -1}, "seed -1: out of range"),
        ({"repeats": [0] * 10}, "no examples"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        take(1, **options)


def test_emoji_source():
    source = load_source("emoji", "train", 32)
    assert len(source) == 3578
    example = source[5]
    assert example["image"].shape == (32, 32, 3) and not example["image"].flags.writeable
    assert example["captions"] == source.emoji[5].captions
    repeats = source.repeats(5)
    assert repeats.sum() == 3578 + 4 * 1706
    assert repeats[next(i for i, e in enumerate(source.emoji) if e.code == e.concept)] == 5
    assert len(EmojiSource("validation")) == 200
    assert available_splits("emoji") == ("train", "validation")
    with pytest.raises(UserError, match="no split 'test'"):
        load_source("emoji", "test", 32)


def test_a_source_at_another_size():
    source = load_source("emoji", "validation", 16)
    assert source[0]["image"].shape == (16, 16, 3)
    other = source.at_size(24)
    assert other[0]["image"].shape == (24, 24, 3) and source[0]["image"].shape == (16, 16, 3)
    assert other.captions() == [example["captions"] for example in source]


def test_fingerprint_of_emoji():
    prints = [
        load_source(name, split, 16).fingerprint()
        for name in ("emoji", "openmoji")
        for split in ("train", "validation")
    ]
    assert len(set(prints)) == 4 and all(len(one) == 64 for one in prints)
    assert load_source("emoji", "train", 64).fingerprint() == prints[0]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "No Such Thing"])
def test_missing_folder(name):
    with pytest.raises(UserError, match="no such folder"):
        load_source(name, "train", 32)


@pytest.mark.parametrize("name", ["emoji", "openmoji", "oxford_flowers102"])
def test_a_path_is_a_folder_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for find in (available_splits, functools.partial(load_source, split="train", image_size=16)):
        with pytest.raises(UserError, match=f"{name}: no such folder; give a folder with images"):
            find(Path(name))
    for split in ("train", "validation"):
        (tmp_path / name / split).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name / split / f"{split}.png")
    assert available_splits(Path(name)) == ("train", "validation")
    source = load_source(Path(name), "validation", 16, need_captions=False)
    assert [example["path"] for example in source] == [f"{name}/validation/validation.png"]


def test_import_without_tensorflow():
    code = (
        "import sys, keras, keras_sd.data.sources as d; d.load_source('emoji', 'validation', 64)[0]; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


BUCKETS = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]  # of SOURCE


def bucketed(count, **options):
    stream = take(count, **{"batch_size": 2, "buckets": BUCKETS} | options)
    return np.stack([batch["image"][:, 0, 0, 0] for batch in stream])


def test_a_batch_is_of_one_bucket():
    seen = bucketed(500)
    assert (np.ptp(np.array(BUCKETS)[seen], axis=1) == 0).all()
    # 100 epochs of 10 examples: all are shown as often, apart from the batch that crosses an epoch's end.
    assert (np.abs(np.bincount(seen.ravel()) - 100) <= 1).all()
    # Within each bucket every epoch is a permutation.
    of_first = seen[np.array(BUCKETS)[seen[:, 0]] == 0].ravel()
    assert (np.sort(of_first[:245].reshape(-1, 5), axis=1) == np.arange(5)).all()
    assert not (bucketed(500, seed=8) == seen).all()
    # Buckets are mixed: no order of their batches recurs in each epoch.
    assert (
        len({tuple(np.array(BUCKETS)[batch] for batch in epoch[:, 0]) for epoch in np.split(seen, 100)}) > 20
    )


def test_buckets_resume_and_share_as_one_stream():
    whole = take(60, batch_size=2, buckets=BUCKETS)
    for start in (1, 7, 33):
        assert_equal(whole[start:], take(60 - start, batch_size=2, buckets=BUCKETS, start=start))
    far = take(2, batch_size=2, buckets=BUCKETS, start=10**12)
    assert_equal(far[1:], take(1, batch_size=2, buckets=BUCKETS, start=10**12 + 1))
    parts = [take(60, batch_size=2, buckets=BUCKETS, process_index=i, process_count=2) for i in range(2)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in whole[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(whole, joined)


def test_buckets_larger_and_smaller_than_a_batch():
    """A bucket of two examples fills a batch of four every second epoch."""
    seen = bucketed(250, batch_size=4, repeats=[1] * 5 + [2] * 3 + [1] * 2)  # of 13 examples an epoch
    counts = np.bincount(seen.ravel(), minlength=10) / (1000 / 13)
    np.testing.assert_allclose(counts, [1] * 5 + [2] * 3 + [1] * 2, atol=0.06)
    assert {tuple(sorted(batch)) for batch in seen[seen[:, 0] > 7].tolist()} == {(8, 8, 9, 9)}


@pytest.mark.parametrize("buckets", [None, [5] * 10])
def test_one_bucket_is_the_plain_stream(buckets):
    expected = [np.random.default_rng((7, epoch)).permutation(10) for epoch in range(2)]
    assert (order(take(5, buckets=buckets)) == np.concatenate(expected)).all()


def test_a_source_may_draw_its_examples():
    class Drawn:
        def __len__(self):
            return 10

        def draw_example(self, index, generator):
            return SOURCE[index] | {"image": np.full((1, 1, 3), generator.integers(256), "uint8")}

    stream = [
        list(itertools.islice(batches(Drawn(), batch_size=5, seed=1, draw=draw, start=s), 3)) for s in (0, 2)
    ]
    assert (
        len(np.unique(order(stream[0]))) > 10
    )  # another draw at every position, and the same after a resume
    assert_equal(stream[0][2:], stream[1][:1])


@pytest.mark.parametrize("made", [None, {}, 5], ids=repr)
def test_a_draw_makes_a_dictionary(made):
    stream = batches([{"image": 1}], batch_size=1, seed=0, draw=lambda example, generator: made)
    with pytest.raises(UserError, match="draw: returned .*; return a dictionary of arrays"):
        next(iter(stream))
