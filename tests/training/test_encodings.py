"""Examples encoded once before a run."""

import io
import os
import sys

import numpy as np
import pytest

from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import load_source
from keras_sd.errors import UserError
from keras_sd.progress import Progress
from keras_sd.training.encoder import read_ahead
from keras_sd.training.encodings import EncodedSource, JoinedSource
from tests import tiny

CAPTIONS = (
    ("red heart",),
    ("blue heart", "a grinning face"),
    (),
    ("woman running",),
    ("flag of Japan", "red heart"),
)


class CountingSource:
    """Examples that count how often each is read."""

    def __init__(self, count=5):
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (count, 16, 16, 3), "uint8")
        self.reads = [0] * count

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads[index] += 1
        return {"image": self.images[index], "captions": CAPTIONS[index % len(CAPTIONS)]}


@pytest.fixture(scope="module")
def sd():
    return tiny.pipeline(jit_compile=False)


def encode(source, sd, **options):
    options = {"jit_compile": False} | options
    return EncodedSource(source, sd.vae, sd.text_encoder, sd.tokenizer, **options)


def test_a_split_source_has_the_examples_of_the_whole(sd):
    source = CountingSource()
    whole = encode(source, sd)
    assert source.reads == [1] * 5
    assert [len(whole[index]["contexts"]) for index in range(len(whole))] == [1, 2, 0, 1, 2]
    first, others = whole.split(2)
    assert (len(first), len(others), others.condition) == (2, 3, "context")
    assert len({whole.fingerprint(), first.fingerprint(), others.fingerprint()}) == 3
    parts = [part[index] for part in (first, others) for index in range(len(part))]
    for index, example in enumerate(parts):
        for name, array in whole[index].items():
            np.testing.assert_array_equal(example[name], array, err_msg=name)


@pytest.mark.parametrize("condition", ["context", "token_ids"])
def test_any_batch_size_gives_the_same(sd, condition):
    text_encoder = sd.text_encoder if condition == "context" else None
    sources = [
        EncodedSource(CountingSource(), sd.vae, text_encoder, sd.tokenizer, batch_size, jit_compile=False)
        for batch_size in (1, 2, 5, 64)
    ]
    for index in range(5):
        one, *others = (source[index] for source in sources)
        for other in others:
            for name, array in one.items():
                np.testing.assert_allclose(other[name], array, atol=1e-5, err_msg=name)
    # An equal caption, met again, is the same row.
    np.testing.assert_array_equal(sources[0][4]["contexts"][1], sources[0][0]["contexts"][0])
    assert len(sources[0]._contexts) == 6


def test_few_images_are_read_ahead():
    source = CountingSource(500)
    most = 4 * min(32, os.cpu_count()) + 4
    for count, _ in enumerate(read_ahead(source, range(500)), start=1):
        assert sum(source.reads) <= count + most
    assert source.reads == [1] * 500


def test_fingerprint(sd, tmp_path):
    first, again = encode(CountingSource(), sd), encode(CountingSource(), sd)
    assert first.fingerprint() == again.fingerprint() and len(first.fingerprint()) == 64
    other = CountingSource()
    other.images[3, 0, 0, 0] ^= 1
    assert encode(other, sd).fingerprint() != first.fingerprint()


def test_joined_sources():
    emoji = load_source("emoji", "validation", 16)
    small, large = (FramedSource(emoji, Framing(side)) for side in (16, 32))
    assert JoinedSource(small, ()).fingerprint() == JoinedSource((), small).fingerprint()
    joined, count = JoinedSource(small, large), len(emoji)
    assert len(joined) == 2 * count and len({joined.fingerprint(), small.fingerprint()}) == 2
    np.testing.assert_array_equal(joined[count + 1]["image"], large[1]["image"])
    assert joined.bucket_sizes == [(16, 16), (32, 32)]
    assert joined.buckets.tolist() == [0] * count + [1] * count
    assert joined.captions() == 2 * emoji.captions() and joined.content_keys() == 2 * emoji.content_keys()
    assert joined.frame_key(count + 3) == large.frame_key(3)
    assert joined.flipped().frame_key(3) == small.flipped().frame_key(3)
    np.testing.assert_array_equal(joined.flipped()[3]["image"], small[3]["image"][:, ::-1])
    with pytest.raises(IndexError):
        joined[2 * count]


def test_latents_that_are_not_finite_are_refused(sd):
    vae = tiny.randomize(type(sd.vae)(sd.vae.config), 3)
    vae.weights[0].assign(np.full(vae.weights[0].shape, np.nan, "float32"))
    with pytest.raises(UserError, match="image 0: its latents are not finite numbers; .*"):
        EncodedSource(CountingSource(), vae, None, sd.tokenizer, jit_compile=False)


def test_nothing_to_encode(sd):
    with pytest.raises(UserError, match="no examples to encode"):
        encode([], sd)


def test_progress_in_lines(capsys):
    with Progress("encoding images", 8, "images", line_seconds=0) as progress:
        progress.update(4)
        assert not capsys.readouterr().err  # quick work says nothing
        progress._next_line = 0
        progress.update(1)
        assert capsys.readouterr().err.startswith("encoding images 5/8, ")
        progress._next_line = float("inf")
        progress.update(3)
    line = capsys.readouterr().err
    assert line.startswith("encoding images 8/8, ") and line.endswith(" images/s, 00:00 left\n")


def test_the_first_update_does_not_tell_the_time_left(capsys, monkeypatch):
    """It may wait for a compilation: 40 minutes were told for a task of 15 seconds."""
    now = [0.0]
    monkeypatch.setattr("keras_sd.progress.time.monotonic", lambda: now[0])
    with Progress("encoding images", 100, "images", line_seconds=0) as progress:
        for now[0], count in ((60.0, 4), (61.0, 16), (65.0, 80)):
            progress.update(count)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "encoding images 4/100",
        "encoding images 20/100, 16.0 images/s, 00:05 left",
        "encoding images 100/100, 1.5 images/s, 00:00 left",
    ]


def test_progress_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("encoding images", 8, "images") as progress:
        progress.update(8)
    assert "encoding images: 100%" in terminal.getvalue() and "images/s" in terminal.getvalue()
