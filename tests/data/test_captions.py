"""Where captions are, as people's folders have them, and how one is drawn."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.caption_files import CaptionFiles
from keras_sd.data.captions import Captions
from keras_sd.data.folders import FolderSource
from keras_sd.errors import BadSamples, UserError

TAGS = "1girl, solo, red hair, smile, hat"


def image(path, side=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(path)
    return path


def opened(folder, skip=False, **files):
    return FolderSource(
        folder, 16, caption_files=CaptionFiles(**files), on_bad_sample="skip" if skip else "error"
    )


def fault(folder, **files):
    with pytest.raises(UserError) as caught:
        opened(folder, **files)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def folder(tmp_path):
    """Two images with captions in files of both suffixes."""
    for name in "ab":
        image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.caption").write_text("three")
    return tmp_path


def test_caption_files_of_both_suffixes(folder):
    source = opened(folder)
    assert source.captions() == [("one", "two"), ("three",)]
    (note,) = source.notes
    assert "1 caption files have several lines" in note and "caption_lines='first'" in note
    assert opened(folder, caption_lines="each").notes == []
    first = opened(folder, caption_lines="first")
    assert first.captions() == [("one",), ("three",)] and first.notes == []
    assert "b.png: no caption; write b.txt beside it" in fault(folder, caption_extension="txt")
    (folder / "b.txt").write_text("four")
    source = opened(folder)
    assert source.captions()[1] == ("four",)
    assert any("1 images have two caption files; read is .txt" in note for note in source.notes)
    (folder / "a.caption").write_text("five")
    assert opened(folder, caption_extension=".caption").captions() == [("five",), ("three",)]


def test_caption_files_of_another_suffix_without_an_image(folder):
    (folder / "a.caption").write_text("five")
    (folder / "c.caption").write_text("six")
    assert "c.caption: a caption without an image" in fault(folder)
    (folder / "b.caption").unlink()
    (folder / "a.caption").unlink()
    (folder / "b.txt").write_text("three")
    assert len(opened(folder)) == 2  # another program's, as no image uses this suffix


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"caption_extension": "a/b"}, "caption_extension 'a/b': not a suffix"),
        ({"caption_lines": "last"}, "caption_lines 'last': unknown"),
        ({"caption_column": "prompt"}, "caption_column: has no effect on a folder without metadata"),
    ],
)
def test_bad_options(folder, files, line):
    assert line in fault(folder, **files)


def test_metadata_as_a_table(folder):
    (folder / "metadata.csv").write_text(
        'file_name,text,prompt\na.png,"one, ""two""",x\nb.png,"three\nfour",y\n'
    )
    source = opened(folder)
    assert source.captions()[1] == ("three",)  # as before there were tables
    assert any("captions are of the text files, not of metadata.csv" in note for note in source.notes)
    assert opened(folder, caption_column="prompt").captions() == [("x",), ("y",)]
    for name in ("a.txt", "b.caption"):
        (folder / name).unlink()
    assert opened(folder).captions() == [('one, "two"',), ("three\nfour",)]
    assert "has no column 'caption', only 'file_name, text, prompt'" in fault(
        folder, caption_column="caption"
    )
    assert "has no column 'image'" in fault(folder, image_column="image")
    assert "caption_lines: has no effect beside" in fault(folder, caption_lines="first")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("file_name,text\na.png\n", "line 2: 1 values for 2 columns"),
        ("file_name,text\na.png,\n", 'line 2: no "text"'),
        ('file_name,text\na.png,"x', "not comma-separated values"),
        ("file_name,text\nc.png,x\n", "line 2: no image 'c.png' in the folder"),
        ("file_name,text\n", "metadata.csv: empty"),
        ("", "metadata.csv: empty"),
        ("file_name,text\na.png,x\0y\n", "a NUL"),
    ],
)
def test_bad_tables(tmp_path, table, line):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(table)
    assert line in fault(tmp_path)


def test_columns_of_metadata_and_lists_of_captions(tmp_path):
    for name in "ab":
        image(tmp_path / f"{name}.png")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"image": "a.png", "texts": ["x", "y "]}\n{"image": "b.png", "texts": "z"}\n')
    source = opened(tmp_path, image_column="image", caption_column="texts")
    assert source.captions() == [("x", "y"), ("z",)]
    assert "line 1: has no file_name, only 'image, texts'" in fault(tmp_path)
    metadata.write_text('{"file_name": "a.png", "text": [["x"]]}\n{"file_name": "b.png", "text": 3}\n')
    with pytest.raises(BadSamples) as caught:
        opened(tmp_path)
    assert len(caught.value.faults) == 2 and all("not a text" in line for line in caught.value.faults)


def test_repeats_by_names_of_folders(tmp_path):
    image(tmp_path / "10_sks cat" / "a.png")
    image(tmp_path / "10_sks cat" / "b.png")
    (tmp_path / "10_sks cat" / "b.txt").write_text("a sleeping cat")
    image(tmp_path / "2_dog" / "deep" / "c.png")
    image(tmp_path / "2019_italy" / "d.png")
    (tmp_path / "2019_italy" / "d.txt").write_text("Rome")
    source = opened(tmp_path)
    assert source.repeats().tolist() == [10, 10, 1, 2]
    assert source.captions() == [("sks cat",), ("a sleeping cat",), ("Rome",), ("dog",)]
    assert any("'10_sks cat' (2 images) 10, '2_dog' (1 images) 2" in note for note in source.notes)
    assert any(
        "2 images without a caption file take the words of their folder" in note for note in source.notes
    )
    assert FolderSource(tmp_path / "2019_italy", 16).repeats() is None


def test_all_faults_are_named_or_left_out(folder, capsys):
    for number in range(30):
        (folder / f"{number}.png").write_bytes(b"no image")
        (folder / f"{number}.txt").write_text("a caption")
    image(folder / "c.png")  # without a caption
    (folder / "d.txt").write_text("without an image")
    with pytest.raises(BadSamples) as caught:
        opened(folder)
    assert len(caught.value.faults) == 32
    line = str(caught.value)
    assert ": 32 faulty examples, the first is" in line and "on_bad_sample='skip'" in line
    source = opened(folder, skip=True)
    assert source.captions() == [("one", "two"), ("three",)] and len(source.sizes()) == 2
    assert any("32 faulty examples are left out, the first is" in note for note in source.notes)
    for name in "ab":
        (folder / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="every example is faulty, the first is"):
        opened(folder, skip=True)
    with pytest.raises(UserError, match="on_bad_sample 'ignore': unknown"):
        FolderSource(folder, 16, on_bad_sample="ignore")


def drawn(rules, caption=TAGS, count=200):
    return [rules.draw((caption,), np.random.default_rng((0, draw))) for draw in range(count)]


def test_fixed_captions():
    rules = Captions()
    assert rules.is_fixed and rules.identity() == {} and set(drawn(rules)) == {TAGS}
    generators = [np.random.default_rng(0) for _ in range(2)]
    # The same draws as those of a run whose captions are encoded.
    choices = [Captions().draw("abc", generators[0]) for _ in range(50)]
    expected = []
    for _ in range(50):
        several = generators[1].random() < 0.5
        expected.append("abc"[generators[1].integers(3)] if several else "a")
    assert choices == expected and choices.count("a") > 25
    assert rules.draw((), generators[0]) == ""


def test_shuffled_tags():
    rules = Captions(shuffle_caption=True, keep_tokens=2)
    texts = drawn(rules)
    assert len(set(texts)) == 6 and not rules.is_fixed
    assert all(text.startswith("1girl, solo, ") for text in texts)
    assert all(sorted(text.split(", ")) == sorted(TAGS.split(", ")) for text in texts)
    assert texts == drawn(rules)  # functions of the generator
    assert rules.identity()["keep_tokens"] == 2


def test_dropped_tags():
    rules = Captions(caption_tag_dropout_rate=0.25, keep_tokens=1, caption_separator=" ; ")
    texts = drawn(rules, TAGS.replace(",", ";"), 2000)
    kept = [text.split("; ") for text in texts]
    assert all(tags[0] == "1girl" for tags in kept)
    assert abs(np.mean([len(tags) - 1 for tags in kept]) - 3) < 0.1
    assert all(tags == sorted(tags, key=TAGS.split(", ").index) for tags in kept)
    assert set(drawn(Captions(caption_tag_dropout_rate=1.0))) == {""}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"keep_tokens": -1}, "keep_tokens -1"),
        ({"caption_separator": " "}, "caption_separator: empty"),
        ({"caption_tag_dropout_rate": 1.5}, "caption_tag_dropout_rate 1.5: out of range"),
    ],
)
def test_bad_rules(options, line):
    with pytest.raises(UserError, match=line):
        Captions(**options)


def test_what_would_be_read_silently_is_named(folder):
    (folder / "c.txt").mkdir()
    image(folder / "c.png")
    with pytest.raises(UserError, match=r"c\.txt: a folder, not a file; rename it"):
        opened(folder)
    (folder / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    with pytest.raises(UserError, match="has the column 'text' twice; rename one"):
        opened(folder, caption_column="text")
    (folder / "metadata.csv").write_bytes(b"file_name,text\ra.png,x\r")
    with pytest.raises(UserError, match="line 1: its lines end in CR alone; save it with LF or CRLF"):
        opened(folder, caption_column="text")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "text": "y"}')
    with pytest.raises(UserError, match="the key 'text' twice"):
        opened(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    with pytest.warns(UserWarning, match="2 are left out"):
        source = opened(folder)
    assert any("captions are of metadata.jsonl, not of metadata.csv" in note for note in source.notes)
