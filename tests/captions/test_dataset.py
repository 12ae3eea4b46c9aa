"""`keras-sd caption` as people run it, each time in a forked process of its own."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from keras_sd.captions.dataset import CaptionedFolder, CaptionSettings, CleaningSettings
from keras_sd.captions.edited_captions import Written
from keras_sd.data.folders import FolderSource
from keras_sd.errors import UserError
from tests.captions import models
from tests.captions.models import caption, read_lines

COUNT = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("captions")
    models.write_models(place)
    models.write_emoji(place / "images", COUNT)
    return place


def options(place, *more):
    lists = ("--clip", place / "clip", "--captioner", "none", "--flavors", place / "names.txt")
    return ("--mode", "fast", "--max-phrases", "5", "--batch-size", "4", *lists, *more)


@pytest.fixture(scope="module")
def reference(place):
    """Captions of the images, in one go."""
    folder = place / "reference"
    shutil.copytree(place / "images", folder)
    code, output, errors = caption(folder, *options(place))
    assert code == 0, errors
    assert output.endswith(f"{COUNT} captioned, 0 passed over\n{folder / 'metadata.jsonl'}\n")
    assert "image/s" in errors
    captions = read_lines(folder / "metadata.jsonl")
    assert list(captions) == sorted(path.name for path in folder.glob("*.png"))
    return captions


def test_bad_pictures_are_passed_over_and_the_rest_trains(place, reference, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(place / "images", folder)
    (folder / "sub").mkdir()
    first = min(reference)
    (folder / first).rename(folder / "sub" / first)
    whole = (folder / max(reference)).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((64, 64), "uint8")).save(folder / "scan.tif", compression="zstd")
    Image.new("1", (11_500, 11_500)).save(folder / "huge.png")
    Image.open(folder / max(reference)).convert("P").save(folder / "palette.png")
    (folder / "elsewhere.png").symlink_to(place / "images" / first)
    code, output, errors = caption(
        folder, *options(place, "--devices", "cpu,cpu", "--contact-sheet", tmp_path / "sheet.png", "--txt")
    )
    assert code == 0, errors
    captions = read_lines(folder / "metadata.jsonl")
    assert captions.pop("palette.png")
    expected = {("sub/" if name == first else "") + name: text for name, text in reference.items()}
    assert captions == expected
    told = [line for line in errors.splitlines() if line.startswith("passed over")]
    assert [word in "".join(told) for word in ("truncated.png", "scan.tif", "huge.png", "elsewhere")] == [
        True
    ] * 4
    assert len(told) == 4
    assert (folder / "sub" / first).with_suffix(".txt").read_text() == reference[first] + "\n"
    assert min(Image.open(tmp_path / "sheet.png").size) > 256
    for path in ("elsewhere.png",):
        (folder / path).unlink()
    with pytest.warns(UserWarning, match="13 captions for 16 images; 3 are left out"):
        source = FolderSource(folder, 32)
    assert len(source) == COUNT + 1 and source[0]["captions"]


def test_killed_and_resumed(place, reference, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(place / "images", folder)
    arguments = [*map(str, options(place, "--threads", "1")), "--batch-size", "1"]
    journal = folder / ".captions" / "captions-0-of-1.jsonl"
    for lines in (1, 5):
        program = models.start_caption(folder, *arguments)
        while program.is_running() and not (
            journal.exists() and len(journal.read_text().splitlines()) >= lines
        ):
            time.sleep(0.001)
        program.kill()
        assert not (folder / "metadata.jsonl").exists()
    with open(journal, "a") as file:
        file.write('{"file_name": "torn')
    code, output, errors = caption(folder, *arguments)
    assert code == 0, errors
    assert read_lines(folder / "metadata.jsonl") == reference
    lines = [json.loads(line)["file_name"] for line in journal.read_text().splitlines()]
    assert lines == sorted(reference)


def test_shards_by_turns_and_low_memory(place, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(place / "images", folder)
    shutil.copytree(place / "images", tmp_path / "together")
    arguments = [*options(place), "--captioner", place / "blip"]
    for shard in (0, 1):
        sharding = ("--num-shards", "2", "--shard-index", shard, "--low-memory")
        code, output, errors = caption(folder, *arguments, *sharding)
        assert code == 0, errors
        assert (folder / "metadata.jsonl").exists() == (shard == 1)
        assert ("6 of 12 images are left to other shards" in output) == (shard == 0)
    code, _, errors = caption(tmp_path / "together", *arguments)
    assert code == 0, errors
    assert read_lines(folder / "metadata.jsonl") == read_lines(tmp_path / "together" / "metadata.jsonl")


@pytest.fixture
def described(tmp_path):
    """A folder in which three images have been described by a sentence each."""
    folder = tmp_path / "described"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    captioned = CaptionedFolder(folder, CaptionSettings("caption", captioner="blip"))
    captioned.begin()
    texts = ("a bottle, by Claude Monet, 8k", "a cup", "by Claude Monet")
    with captioned.journal(0, 1) as journal:
        journal.append([{"file_name": f"{n}.png", "text": t} for n, t in zip("abc", texts, strict=True)])
    return folder


SENTENCES = ("--mode", "caption", "--captioner", "blip")


def test_cleaning_needs_no_model(described, tmp_path):
    (tmp_path / "artists.txt").write_text("Claude Monet\n")
    introductions = tmp_path / "introductions.jsonl"
    texts = {"a.png": "Peat and smoke. Peat!", "b.png": "Honey and citrus. Honey!"}
    introductions.write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in texts.items()))
    before = read_lines_of(described)
    code, output, errors = caption(
        *(
            described,
            *SENTENCES,
            "--remove-artists",
            "--artists",
            tmp_path / "artists.txt",
            "--remove",
            r"\d+k",
        ),
        *("--product-type", "whisky", "--introductions", introductions, "--keywords", "1"),
    )
    assert code == 0, errors
    assert read_lines(described / "metadata.jsonl") == {
        "a.png": "whisky, a bottle, Peat",
        "b.png": "whisky, a cup, Honey",
    }
    assert "2 captioned, 1 passed over\n2 artists removed: Claude Monet (2)\n" in output
    assert "c.png: nothing is left of its caption" in errors
    code, _, errors = caption(described, *SENTENCES)
    assert code == 0, errors
    assert read_lines(described / "metadata.jsonl")["a.png"] == "a bottle, by Claude Monet, 8k"
    assert read_lines_of(described) == before


def read_lines_of(folder):
    return {path.name: path.read_bytes() for path in (folder / ".captions").glob("*.jsonl")}


def test_new_pictures_are_seen_and_gone_ones_forgotten(described):
    (described / "b.png").unlink()
    Image.new("RGB", (32, 32)).save(described / "d.png")
    captioned = CaptionedFolder(described, CaptionSettings("caption", captioner="blip"))
    assert captioned.missing() == ["d.png"]
    assert captioned.write().missing == 1
    (described / "d.png").unlink()
    captioned = CaptionedFolder(described, CaptionSettings("caption", captioner="blip"))
    assert list(captioned.write().captions) == ["a.png", "c.png"]


def test_dry_run_writes_nothing(place, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(place / "images", folder)
    (folder / "broken.png").write_bytes(b"")
    before = sorted(folder.iterdir())
    code, output, errors = caption(folder, *options(place, "--dry-run"))
    assert code == 0, errors
    assert "13 to describe, 1 unreadable" in output and "broken.png" in output and "mode: fast" in output
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (("--num-shards", "2", "--shard-index", "2"), "shard 2 of 2: out of range"),
        (("--mode", "fast", "--flavors", "missing.txt"), "missing.txt: not found; give a text file"),
        (("--mode", "fast"), "another mode"),
        (("--remove", "("), "no regular expression"),
        (("--introductions", "missing.jsonl"), "missing.jsonl: not found"),
        (("--captioner", "other"), "holds captions of another captioner"),
        (("--captioner", "none"), "name a captioner"),
        (("--contact-sheet", "sheet.jpg"), ".png"),
    ],
)
def test_bad_input(described, place, more, fault):
    if more == ("--mode", "fast"):
        more += ("--flavors", place / "names.txt")
    before = {path: path.read_bytes() for path in described.rglob("*") if path.is_file()}
    code, _, errors = caption(described, *SENTENCES, *more)
    assert code == 2
    *warnings, error = errors.splitlines()
    assert fault in error
    assert all("is given twice" in warning for warning in warnings)
    assert {path: path.read_bytes() for path in described.rglob("*") if path.is_file()} == before


@pytest.fixture
def captioned_by_hand(tmp_path):
    """A folder that captions of people were in before: a.png's, and those of images that are not there."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(
        '{"text": "mine",  "file_name": "./a.png"}\n'
        '{"file_name": "b.png", "label": 3}\n'
        '{"file_name": "later.png", "text": "mine too"}\n'
    )
    (tmp_path / "c.txt").write_text("my own\n")
    return tmp_path


def test_captions_that_were_there_stay(captioned_by_hand):
    settings = CaptionSettings("caption", captioner="blip")
    captioned = CaptionedFolder(captioned_by_hand, settings)
    assert captioned.missing() == ["b.png"]
    captioned.begin()
    with captioned.journal(0, 1) as journal:
        journal.append([{"file_name": "b.png", "text": "a bottle"}])
    for _ in range(2):
        code, output, errors = caption(captioned_by_hand, *SENTENCES, "--txt")
        assert code == 0, errors
        assert "2 captions of your own kept; replace them with --overwrite\n" in output
        assert "1 captions of your own are of images that are not there, such as 'later.png'" in output
        assert (captioned_by_hand / "metadata.jsonl").read_text().splitlines() == [
            '{"text": "mine",  "file_name": "./a.png"}',
            '{"file_name": "b.png", "label": 3, "text": "a bottle"}',
            '{"file_name": "c.png", "text": "my own"}',
            '{"file_name": "later.png", "text": "mine too"}',
        ]
        texts = [(captioned_by_hand / f"{name}.txt").read_text() for name in "abc"]
        assert texts == ["mine\n", "a bottle\n", "my own\n"]
    (captioned_by_hand / "c.txt").write_text("better")
    caption(captioned_by_hand, *SENTENCES)
    assert read_lines(captioned_by_hand / "metadata.jsonl")["c.png"] == "better"
    assert CaptionedFolder(captioned_by_hand, settings, overwrite=True).missing() == ["a.png", "c.png"]


def test_corrected_captions_stay(described):
    def run(*more):
        code, output, errors = caption(described, *SENTENCES, *more)
        assert code == 0, errors
        return output, read_lines(described / "metadata.jsonl")

    said = {"a.png": "a bottle, by Claude Monet, 8k", "b.png": "a cup", "c.png": "by Claude Monet"}
    output, captions = run("--txt")
    assert captions == said and "your own" not in output
    corrected = json.dumps({"file_name": "a.png", "text": "a green bottle"})
    (described / "metadata.jsonl").write_text(f'{corrected}\n{{"file_name": "b.png", "text": "a cup"}}\n')
    for word in ("tea", "coffee"):
        output, captions = run("--product-type", word, "--txt")
        assert captions == {"a.png": "a green bottle", "b.png": f"{word}, a cup"}
        line = "1 captions of your own kept, 1 that you took out left out; replace them with --overwrite\n"
        assert line in output
    assert (described / "a.txt").read_text() == "a green bottle\n"
    assert (described / "b.txt").read_text() == "coffee, a cup\n"
    output, captions = run("--overwrite", "--txt")
    assert captions == said and "your own" not in output
    assert run()[1] == said


def test_a_kill_while_captions_are_written_makes_them_nobodys_own(described):
    caption(described, *SENTENCES)
    written = Written(described, described / ".captions" / "written.json")
    before = (described / "metadata.jsonl").read_text()
    new = {"a.png": "new", "b.png": "new", "c.png": "new", "d.png": "new"}
    written.begin(new, {}, ())
    for text in (before, "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in new.items())):
        (described / "metadata.jsonl").write_text(text)
        own = Written(described, described / ".captions" / "written.json").by_hand(
            ["a.png", "b.png", "d.png"]
        )
        assert not own.names and not own.others


def test_captions_of_an_earlier_version_are_taken_for_ours_where_they_are_the_same(described):
    caption(described, *SENTENCES)
    (described / ".captions" / "written.json").unlink()
    (described / "metadata.jsonl").write_text(
        (described / "metadata.jsonl").read_text().replace("a cup", "a mug")
    )
    assert "1 captions of your own kept" in caption(described, *SENTENCES)[1]
    _, output, _ = caption(described, *SENTENCES, "--product-type", "tea")
    assert read_lines(described / "metadata.jsonl") == {
        "a.png": "tea, a bottle, by Claude Monet, 8k",
        "b.png": "a mug",
        "c.png": "tea, by Claude Monet",
    }


def test_a_folder_in_which_nothing_was_described_is_free(place, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    code, _, errors = caption(tmp_path, *options(place, "--clip", place / "names.txt"))
    assert code == 2 and "no such model" in errors
    assert CaptionedFolder(tmp_path, CaptionSettings("caption", captioner="blip")).missing() == ["a.png"]
    code, _, errors = caption(tmp_path, *options(place))
    assert code == 0, errors
    with pytest.raises(UserError, match="holds captions of another mode"):
        CaptionedFolder(tmp_path, CaptionSettings("caption", captioner="blip"))


def test_damaged_captions_are_told_or_replaced(described):
    (described / "metadata.jsonl").write_text("mine\n")
    code, _, errors = caption(described, *SENTENCES)
    assert code == 2 and "metadata.jsonl, line 1" in errors and len(errors.splitlines()) == 1
    code, _, errors = caption(described, *SENTENCES, "--overwrite")
    assert code == 0 and len(read_lines(described / "metadata.jsonl")) == 3


def test_text_files_are_not_shared(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    settings = CaptionSettings("caption", captioner="blip")
    CaptionedFolder(tmp_path, settings).check_text_files()
    Image.new("RGB", (32, 32)).save(tmp_path / "b.jpg")
    with pytest.raises(UserError, match=r"b.txt: would be the caption of 2 images"):
        CaptionedFolder(tmp_path, settings).check_text_files()


def test_no_pictures(tmp_path):
    with pytest.raises(UserError, match="no images in this folder"):
        CaptionedFolder(tmp_path, CaptionSettings("caption", captioner="blip"))
    with pytest.raises(UserError, match="no such folder"):
        CaptionedFolder(tmp_path / "none", CaptionSettings("caption", captioner="blip"))


def test_length_is_counted_as_clip_does():
    clean = CleaningSettings(maximum_tokens=6).prepare()
    assert clean("a.png", "a red heart, glossy, shiny, bright").text == "a red heart, glossy"
