import pytest

from keras_sd.captions.vocabulary import Vocabulary, read_phrases
from keras_sd.errors import UserError


def test_reads_lists(tmp_path):
    (tmp_path / "artists.txt").write_text("Claude Monet\n\n  Hokusai \n", encoding="utf-8")
    (tmp_path / "flavors.txt").write_text("\ufeffvivid\nby Hokusai\n", encoding="utf-8")
    vocabulary = Vocabulary.read(
        artists=tmp_path / "artists.txt", flavors=tmp_path / "flavors.txt", mediums=None
    )
    assert vocabulary.artists == ("Claude Monet", "Hokusai")
    assert vocabulary.phrases[:5] == (
        *("by Claude Monet", "by Hokusai", "inspired by Claude Monet", "inspired by Hokusai"),
        "vivid",
    )
    assert len(set(vocabulary.phrases)) == len(vocabulary.phrases)
    assert vocabulary.digest() != Vocabulary(flavors=("vivid",)).digest()


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "empty vocabulary"), (b"\n \n", "empty vocabulary"), (b"vivid\n\xff\n", "not UTF-8")],
)
def test_bad_files(tmp_path, content, fault):
    (tmp_path / "flavors.txt").write_bytes(content)
    with pytest.raises(UserError, match=fault):
        read_phrases(tmp_path / "flavors.txt")
    with pytest.raises(UserError, match="not found"):
        read_phrases(tmp_path / "none.txt")


def test_duplicate_lines_count_once(tmp_path):
    (tmp_path / "flavors.txt").write_text("vivid\nsoft\nvivid\n")
    with pytest.warns(UserWarning, match="1 duplicate lines, the first is 'vivid'"):
        assert read_phrases(tmp_path / "flavors.txt") == ("vivid", "soft")


def test_no_vocabulary_at_all():
    with pytest.raises(UserError, match="no vocabulary: give text files"):
        Vocabulary.read()
