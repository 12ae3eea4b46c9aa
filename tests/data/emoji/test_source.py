import collections
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from keras_sd.data.emoji.source import HELD_OUT, load_emoji

GENDERS = {"2640": "woman", "2642": "man", "1f468": "man", "1f469": "woman"}


def attributes(code):
    points = code.split("-")
    genders = tuple(GENDERS[point] for point in points if point in GENDERS)
    tones = (point for point in points if "1f3fb" <= point <= "1f3ff" and len(point) == 5)
    return genders, tuple(dict.fromkeys(tones))


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


def test_counts_and_order(emoji):
    assert len(emoji) == 3778
    assert [e.code for e in emoji] == sorted({e.code for e in emoji})
    assert len({e.concept for e in emoji}) == 1706
    assert all(e.path.is_file() for e in emoji)


def test_loads_quickly():
    # In a process of its own: collecting the garbage of a large one would be counted too.
    code = """if True:
        import time
        from keras_sd.data.emoji.source import load_emoji
        start = time.process_time()
        load_emoji()
        print(time.process_time() - start)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


def test_split_is_fixed(emoji):
    held_out = [e.code for e in emoji if e.split == "validation"]
    assert len(held_out) == HELD_OUT == 200
    assert sum(e.split == "train" for e in emoji) == 3578
    digest = hashlib.sha256(" ".join(held_out).encode()).hexdigest()
    assert digest == "ea5a55e1113469dad0039409ca1f122f645a62175615b0fb10508906a39ea241"


def test_held_out_are_new_combinations_of_seen_attributes(emoji):
    by_code = {e.code: e for e in emoji}
    seen = collections.defaultdict(set)
    for e in emoji:
        if e.split == "train":
            seen[attributes(e.code)].add(e.concept)
    for e in emoji:
        base = by_code[e.concept]
        assert base.concept == base.code
        assert base.split == "train"
        if e.split == "validation":
            assert e.code != e.concept
            assert seen[attributes(e.code)] - {e.concept}, e.code


def test_no_held_out_picture_is_in_training(emoji):
    pictures = collections.defaultdict(list)
    for e in emoji:
        pictures[e.load(72).tobytes()].append(e)
    for same in pictures.values():
        assert len(same) == 1 or {e.split for e in same} == {"train"}, [e.code for e in same]


def test_captions(emoji):
    owners = collections.Counter(caption for e in emoji for caption in set(e.captions))
    assert set(owners.values()) == {1}
    for e in emoji:
        assert 4 <= len(e.captions) == len(set(e.captions)) <= 6
        for caption in e.captions:
            assert caption == caption.lower().strip() and caption.isascii()
            assert len(caption.split()) <= 14


@pytest.mark.parametrize(
    ("code", "concept", "name"),
    [
        ("2764", "2764", "red heart"),
        ("1f44d-1f3fd", "1f44d", "thumbs up, medium skin tone"),
        ("1f1ef-1f1f5", "1f1ef-1f1f5", "flag of japan"),
        ("1f1f3-1f1f1", "1f1f3-1f1f1", "flag of the netherlands"),
        ("33-20e3", "33-20e3", "keycap 3"),
        ("1f55b", "1f55b", "clock showing twelve o'clock"),
        ("1f3c3", "1f3c3", "person running"),
        ("1f3c3-200d-2640-fe0f", "1f3c3", "woman running"),
        ("1f3c3-1f3ff-200d-2642-fe0f", "1f3c3", "man running, dark skin tone"),
        ("1f469-1f3fb-200d-1f52c", "1f9d1-200d-1f52c", "woman scientist, light skin tone"),
        ("1f575-fe0f-200d-2640-fe0f", "1f575", "woman detective"),
        ("1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d1-200d-1f9d2", "family of man, woman and boy"),
        ("1f46d-1f3fb", "1f9d1-200d-1f91d-200d-1f9d1", "two women holding hands, light skin tone"),
        ("1f91d-1f3fc", "1f91d", "handshake, medium-light skin tone"),
        (
            "1f468-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3fd",
            "1f48f",
            "kiss between man and man, light and medium skin tones",
        ),
        ("1f468", "1f468", "man"),
    ],
)
def test_names_and_concepts(emoji, code, concept, name):
    found = next(e for e in emoji if e.code == code)
    assert found.concept == concept
    assert found.captions[0] == name


def test_pictures_are_composited_on_white(emoji):
    heart = next(e for e in emoji if e.captions[0] == "red heart")
    picture = heart.load()
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == 255).all()
    assert (picture[32, 32] == [221, 46, 68]).all()  # Twemoji's red
    assert heart.load(16).shape == (16, 16, 3)
