"""Data sets of the `datasets` library, from files as people have them; the hub is never reached."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import click
import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from keras_sd.cli.train.main import train
from keras_sd.data.caption_files import CaptionFiles
from keras_sd.data.dataset_library import open_dataset, open_streams
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import available_splits, load_source
from keras_sd.errors import BadSamples, UserError

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
TEXTS = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    open_dataset.cache_clear()
    open_streams.cache_clear()


def encoded(colour, size=(40, 30), **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG", **options)
    return file.getvalue()


def table(images=None, **columns):
    images = images or [encoded(colour) for colour in COLOURS]
    columns = columns or {"text": TEXTS}
    values = {"image": [{"bytes": one, "path": None} for one in images], **columns}
    features = {name: None for name in values}
    whole = datasets.Dataset.from_dict(values)
    features = whole.features.copy()
    features["image"] = datasets.Image()
    return whole.cast(features)


def save(whole, folder, kind, name="train-00000"):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        whole.to_parquet(folder / f"{name}.parquet")
    elif kind == "saved":
        whole.save_to_disk(folder)
    elif kind == "arrow":
        whole.save_to_disk(folder / "saved")
        (path,) = (folder / "saved").glob("*.arrow")
        path.rename(folder / f"{name}.arrow")
        for other in (folder / "saved").iterdir():
            other.unlink()
        (folder / "saved").rmdir()
    else:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            rows = whole.cast_column("image", datasets.Image(decode=False))
            for index, row in enumerate(rows):
                for ending, content in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def fault(folder, split="train", **columns):
    with pytest.raises(UserError) as caught:
        load_source(str(folder), split, 16, caption_files=CaptionFiles(**columns))
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", ["parquet", "saved", "arrow", "tar"])
def test_kinds_of_files(tmp_path, kind):
    folder = save(table(), tmp_path / "data", kind)
    if kind != "saved":
        save(table(), folder, kind, "validation-00000")
        assert sorted(available_splits(str(folder))) == ["train", "validation"]
    for place in (str(folder), folder):
        source = load_source(place, "train", 16)
        assert len(source) == 3 and source.captions() == [(text,) for text in TEXTS]
    for index, colour in enumerate(COLOURS):
        assert source[index]["image"].shape == (16, 16, 3) and (source[index]["image"] == colour).all()
    assert source.sizes().tolist() == [[30, 40]] * 3
    assert len(set(source.content_keys())) == 3
    framed = FramedSource(source.at_size(32), Framing(16, aspect_ratio_buckets=3, bucket_upscale=True))
    assert framed[1]["captions"] == ("green",) and "train 1" in framed[1]["path"]
    # Of the contents, wherever they are.
    moved = save(table(), tmp_path / "moved", "parquet" if kind != "parquet" else "saved")
    assert load_source(str(moved), "train", 16).fingerprint() == source.fingerprint()
    changed = save(table(text=["red", "green", "sky"]), tmp_path / "changed", "parquet")
    assert load_source(str(changed), "train", 16).fingerprint() != source.fingerprint()


def test_one_file_and_a_pattern(tmp_path):
    save(table(), tmp_path / "data", "parquet")
    save(table(), tmp_path / "data", "parquet", "train-00001")
    assert len(load_source(str(tmp_path / "data" / "train-00000.parquet"), "train", 16)) == 3
    assert len(load_source(str(tmp_path / "data" / "train-*.parquet"), "train", 16)) == 6


def test_a_folder_of_images_is_one_whatever_lies_beside_them(tmp_path):
    save(table(), tmp_path, "parquet")
    (tmp_path / "a.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "a.txt").write_text("grey")
    assert load_source(str(tmp_path), "train", 16).captions() == [("grey",)]


def test_columns(tmp_path):
    whole = table(label=[1, 2, 3], words=[["a", "b"], ["c"], ["d"]], caption=TEXTS)
    folder = save(whole, tmp_path / "data", "parquet")
    assert load_source(str(folder), "train", 16).captions()[0] == ("red",)
    source = load_source(str(folder), "train", 16, caption_files=CaptionFiles(caption_column="words"))
    assert source.captions() == [("a", "b"), ("c",), ("d",)]
    assert any("words holds lists, and each text is a caption" in note for note in source.notes)
    assert load_source(str(folder), "train", 16, need_captions=False).captions() == [()] * 3
    line = fault(folder, caption_column="prompt")
    assert line.startswith("caption_column 'prompt': not in the data set") and "image, label, words" in line
    assert "caption_column 'label': holds int64" in fault(folder, caption_column="label")
    assert "image_column 'picture': not in the data set" in fault(folder, image_column="picture")
    assert "image_column 'label': holds int64" in fault(folder, image_column="label")
    assert "no split 'test'; it has train" in fault(folder, split="test")
    assert "caption_lines: has no effect on" in fault(folder, caption_lines="first")
    other = save(table(words=TEXTS), tmp_path / "other", "parquet")
    assert "no column of captions, only image, words; name the `caption_column`" in fault(other)
    nested = save(table(text=[[["a"]], [["b"]], [["c"]]]), tmp_path / "nested", "parquet")
    assert "caption_column 'text': holds" in fault(nested)


def test_columns_of_other_programs(tmp_path):
    """pandas writes the bytes and the path of an image without the library's note of what they are."""
    rows = [{"bytes": encoded(colour), "path": "a.png"} for colour in COLOURS]
    parquet.write_table(pyarrow.table({"image": rows, "text": TEXTS}), tmp_path / "pandas.parquet")
    source = load_source(str(tmp_path / "pandas.parquet"), "train", 16)
    assert source.captions() == [(text,) for text in TEXTS]
    assert [tuple(example["image"][0, 0]) for example in source] == COLOURS
    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.binary()), "text": pyarrow.array([], "string")})
    parquet.write_table(empty, tmp_path / "empty.parquet")
    assert "empty.parquet: holds no examples; give files with images" in fault(tmp_path / "empty.parquet")


def test_faulty_examples(tmp_path):
    images = [encoded(COLOURS[0]), encoded(COLOURS[1])[:60], b"no image"]
    folder = save(table(images, text=["red", "green", "blue"]), tmp_path / "data", "parquet")
    with pytest.raises(BadSamples) as caught:
        load_source(str(folder), "train", 16)
    assert ["train 1: truncated or damaged" in caught.value.faults[0], len(caught.value.faults)] == [True, 2]
    source = load_source(str(folder), "train", 16, on_bad_sample="skip")
    assert source.captions() == [("red",)] and (source[0]["image"] == COLOURS[0]).all()
    assert any("2 faulty examples are left out" in note for note in source.notes)
    empty = save(table(text=["red", " ", None]), tmp_path / "empty", "parquet")
    line = fault(empty)
    assert "2 faulty examples, the first is data set" in line and "train 1: text: empty" in line


def test_the_command_names_its_flags(tmp_path):
    folder = save(table(words=TEXTS), tmp_path / "data", "parquet")
    for options, line in (
        (["--caption-column", "text"], "--caption-column 'text': not in the data set"),
        ([], "name the --caption-column"),
        (
            ["--caption-column", "words", "--dataset-config-name", "a"],
            "--dataset-config-name: has no effect on",
        ),
        (["--max-train-samples", "0"], "0 is not in the range 1"),
        (["--caption-column", "words", "--caption-lines", "each"], "--caption-lines: has no effect on"),
    ):
        arguments = ["lora", "--dataset-name", str(folder), "--output-dir", str(tmp_path / "run"), *options]
        with pytest.raises((UserError, click.BadParameter), match=line):
            train.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_files_that_are_cut_short(tmp_path, kind):
    folder = save(table(), tmp_path / "data", kind)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 - 300])
    line = fault(folder)
    if kind == "tar":
        assert line == f"{path}: a tar without its end, so it was cut short; fetch it again"
    else:
        assert line.startswith(f"data set {folder}: cannot be read (")
        assert line.endswith("fetch its files again")


@pytest.mark.parametrize("members", [2, 3, 4])
def test_a_tar_that_is_cut_between_its_members(tmp_path, members):
    """The library reads what is there, and says nothing."""
    (path,) = save(table(), tmp_path / "data", "tar").iterdir()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[members].offset
    path.write_bytes(path.read_bytes()[: end + 100 * (members % 2)])
    assert fault(path) == f"{path}: a tar without its end, so it was cut short; fetch it again"


def test_a_caption_with_a_nul_and_a_path_to_a_pipe(tmp_path):
    line = fault(save(table(text=["a\0b", *TEXTS[1:]]), tmp_path / "nul", "parquet"))
    assert line.endswith("text: has a NUL character; write it as plain text")
    os.mkfifo(tmp_path / "pipe")
    whole = table()
    images = [{"bytes": None, "path": str(tmp_path / "pipe")} for _ in range(len(whole))]
    piped = datasets.Dataset.from_dict({"image": images, "text": TEXTS})
    features = piped.features.copy()
    features["image"] = datasets.Image()
    line = fault(save(piped.cast(features), tmp_path / "piped", "parquet"))
    assert f"{tmp_path / 'pipe'} is no file; put it back" in line


def test_a_second_start_decodes_no_image(tmp_path, monkeypatch):
    folder = save(table(), tmp_path / "data", "parquet")
    first = load_source(str(folder), "train", 16)
    keys = first.content_keys()
    second = load_source(str(folder), "train", 16)
    second._images = None  # none is read any more
    assert second.content_keys() == keys and second.fingerprint() == first.fingerprint()


OFFLINE = """
import sys, time
from pathlib import Path
import datasets
from keras_sd.data.sources import load_source
from keras_sd.errors import UserError

began = time.monotonic()
try:
    load_source("nobody/no-such-data", "train", 16)
except UserError as error:
    print(error)
assert time.monotonic() - began < 5
kept = load_source("owner/kept", "train", 16)  # was downloaded earlier
print(kept.captions())
assert not datasets.config.HF_HUB_OFFLINE
"""


def test_no_connection_is_a_line_within_seconds(tmp_path):
    """A port that nobody listens on in place of the hub."""
    table(text=TEXTS).to_parquet(str(tmp_path / "a.parquet"))
    kept = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
    folder = Path(kept["train"].cache_files[0]["filename"]).parent
    shutil.copytree(folder, tmp_path / "owner___kept" / "default" / "0.0.0" / ("a" * 40))
    (tmp_path / "owner___kept" / "default" / "0.0.0" / ("a" * 40) / "parquet-train.arrow").rename(
        tmp_path / "owner___kept" / "default" / "0.0.0" / ("a" * 40) / "kept-train.arrow"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_DATASETS_CACHE": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    line, captions = run.stdout.splitlines()
    assert line.startswith("data set nobody/no-such-data: no such folder, and the hub cannot be reached (")
    assert captions == str([(text,) for text in TEXTS])
    assert "Retrying" not in run.stderr


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_streaming_keeps_images_and_captions(tmp_path, kind):
    columns = {"text": TEXTS} if kind == "tar" else {"text": TEXTS, "heavy": ["x" * 1000] * 3}
    folder = save(table(**columns), tmp_path / "data", kind)
    options = {"caption_files": CaptionFiles(caption_column="txt")} if kind == "tar" else {}
    plain = load_source(str(folder), "train", 16, **options)
    source = load_source(str(folder), "train", 16, streaming=True, **options)
    assert source.captions() == plain.captions() and source.sizes().tolist() == plain.sizes().tolist()
    assert (source[2]["image"] == plain[2]["image"]).all()
    assert source.fingerprint() == plain.fingerprint() and source.content_keys() == plain.content_keys()
    assert available_splits(str(folder), streaming=True) == ("train",)
    kept = sorted((tmp_path / "library" / "generator").rglob("*.arrow"))
    assert len(kept) == 1 and b"xxxx" not in kept[0].read_bytes()
    state = kept[0].stat().st_mtime_ns
    open_streams.cache_clear()
    load_source(str(folder), "train", 16, streaming=True, **options)
    assert kept[0].stat().st_mtime_ns == state  # nothing was fetched again
    first = load_source(str(folder), "train", 16, streaming=True, max_samples=2, **options)
    assert first.captions() == plain.captions()[:2] and first.notes == []
    (path,) = folder.iterdir()
    os.utime(path, ns=(state, state))  # as if the file had changed
    load_source(str(folder), "train", 16, streaming=True, **options)
    assert len(list((tmp_path / "library" / "generator").rglob("*.arrow"))) == 3


def test_streaming_that_has_no_effect_or_breaks_off(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    saved = save(table(), tmp_path / "saved", "saved")
    for place in (tmp_path, saved):
        with pytest.raises(UserError, match="streaming: has no effect on .*; leave it out"):
            load_source(place, "train", 16, streaming=True)
    folder = save(table(), tmp_path / "data", "parquet")
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:4] + bytes(40) + path.read_bytes()[44:])
    with pytest.raises(UserError, match=f"data set {folder}: cannot be read .*; fetch its files again"):
        load_source(str(folder), "train", 16, streaming=True)


def test_some_of_the_examples(tmp_path):
    for index in range(9):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"number {index}")
    source, again = (load_source(tmp_path, "train", 16, max_samples=4, seed=1) for _ in range(2))
    other = load_source(tmp_path, "train", 16, max_samples=4, seed=2)
    assert len(source) == len(set(source.captions())) == len(source.sizes()) == 4
    assert source.captions() == again.captions() and source.fingerprint() == again.fingerprint()
    assert source.captions() != other.captions() and source.fingerprint() != other.fingerprint()
    assert source.notes == ["4 of 9 examples are taken"]
    assert [source[index]["captions"] for index in range(4)] == source.captions()
    assert [Path(source.details(index)["path"]).stem for index in range(4)] == [
        text.split()[1] for (text,) in source.captions()
    ]
    framed = FramedSource(source, Framing(16))
    assert len(framed) == len(framed.content_keys()) == 4 and framed[3]["image"].shape == (16, 16, 3)
    assert len(load_source(tmp_path, "train", 16, max_samples=20)) == 9


def test_the_hub_without_a_connection(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fault("nobody/No-Such-Data")
    assert line.startswith("data set nobody/No-Such-Data: no such folder, and the hub cannot be reached (")
    with pytest.raises(UserError, match="dataset_config_name: has no effect on emoji"):
        load_source("emoji", "train", 16, config_name="plain")


def test_the_library_prints_nothing_of_files_on_this_disk(tmp_path, capfd):
    whole = save(table(), tmp_path / "data", "parquet")
    (path,) = save(table(), tmp_path / "cut", "parquet").iterdir()
    path.write_bytes(path.read_bytes()[:300])
    capfd.readouterr()
    datasets.enable_progress_bars()
    load_source(str(whole), "train", 16)
    fault(tmp_path / "cut")
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
