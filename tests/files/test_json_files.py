"""JSON files that are damaged, absurd or of another shape: one line each, and nothing is taken on trust."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typing_extensions import TypedDict

import keras_sd
from keras_sd.errors import UserError
from keras_sd.files import json_files
from keras_sd.files.json_files import read_json, read_json_lines, read_lines, shape_fault


class Person(TypedDict):
    """A shape with keys that are used."""

    name: str
    ages: dict[str, int]


GOOD = {"name": "Ada", "ages": {"then": 36}, "more": [1, None]}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fault_of(read, *arguments, **options):
    with pytest.raises(UserError) as raised:
        read(*arguments, **options)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_a_file_is_returned_as_it_stands(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(GOOD))
    assert read_json(path) == GOOD
    assert read_json(path, Person) == GOOD
    assert read_json(write(path, "\ufeff[1e3]"), list[float]) == [1000]
    assert read_json(tmp_path / "none.json", default=None) is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b'{"a": "\xff"}', "not a JSON file"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "more than 32 nested lists"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "more than 32 nested lists"),
        (b'{"a": ' + b"9" * 4301 + b"}", "a number of 4301 characters"),
        (b'{"a": 0.' + b"9" * 4301 + b"}", "a number of 4303 characters"),
        (b'{"a": 1e' + b"9" * 4301 + b"}", "a number of 4303 characters"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\u0000": 1}', "NUL"),
        (b"[1]", "not a JSON dictionary"),
        (b" " * (json_files.LARGEST_FILE + 1), "larger than 4 MiB"),
    ],
    ids=str,
)
def test_damaged_files_end_in_one_line(tmp_path, content, fault):
    path = write(tmp_path / "a.json", content)
    message = fault_of(read_json, path, remedy="write it anew")
    assert message.startswith(str(path)) and fault in message and message.endswith("write it anew")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": 3}, "name 3: input should be a valid string"),
        ({"ages": {"then": "36"}}, "ages.then '36': input should be a valid integer"),
        ({"ages": {"then": True}}, "ages.then True: input should be a valid integer"),
        ({"ages": []}, "ages: not a JSON dictionary"),
        ({"ages": {"x" * 100_000: None}}, "input should be a valid integer"),
    ],
    ids=["text", "number", "boolean", "dictionary", "long"],
)
def test_other_shapes_end_in_one_line(tmp_path, changes, fault):
    path = write(tmp_path / "a.json", json.dumps(GOOD | changes))
    assert fault in fault_of(read_json, path, Person)


def test_missing_keys_are_named():
    assert shape_fault({"name": "Ada"}, Person) == "has no ages"
    assert shape_fault([], Person) == "not a JSON dictionary"


def test_what_is_no_file_ends_in_one_line(tmp_path):
    assert "not found; look again" in fault_of(read_json, tmp_path / "none", absent="look again")
    assert "a folder" in fault_of(read_json, tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert "not a plain file" in fault_of(read_json, tmp_path / "pipe")
    assert "not found" in fault_of(read_json, write(tmp_path / "a", "") / "b")
    assert "cannot be read" in fault_of(read_json, tmp_path / ("x" * 300))
    assert "no name of a file" in fault_of(read_json, "a\0b")


def test_a_folder_in_place_of_lines_is_told_once(tmp_path):
    assert fault_of(lambda: list(read_lines(tmp_path))).count("cannot be read") == 1


def test_lines_are_read_one_by_one(tmp_path):
    lines = [json.dumps(GOOD), "", json.dumps(GOOD, indent=None)]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(lines))
    assert list(read_json_lines(path, Person)) == [(lines[0], GOOD), (lines[2], GOOD)]
    with path.open("ab") as file:
        file.write(b'\n{"name": "Ada"}\n')
    assert f"{path}, line 4: has no ages" in fault_of(lambda: list(read_json_lines(path, Person)))
    write(path, b"1\n\xff\n")
    assert "line 2: not UTF-8" in fault_of(lambda: list(read_json_lines(path, int)))
    write(path, b"1\n" + b" " * (json_files.LARGEST_LINE + 1))
    assert "line 2: longer than 1 MiB" in fault_of(lambda: list(read_json_lines(path, int)))


def test_names_that_are_no_utf8_pass_where_file_names_stand(tmp_path):
    path = write(tmp_path / "a.jsonl", '["\\udcff"]\n')
    assert [value for _, value in read_json_lines(path, list, file_names=True)] == [["\udcff"]]
    write(path, '["\\ud8ff"]\n')
    assert "surrogate" in fault_of(lambda: list(read_json_lines(path, list, file_names=True)))


def test_the_worst_file_of_its_size_takes_little_time(tmp_path):
    count = json_files.LARGEST_FILE // 3 - 1
    path = write(tmp_path / "a.json", "[" + "[]," * count + "0]")
    began = time.process_time()
    assert len(read_json(path, list)) == count + 1
    assert time.process_time() - began < 8


def test_pydantic_is_imported_when_a_file_is_read_only(tmp_path):
    path = write(tmp_path / "a.json", '{"a": "b"}')
    code = f"""if True:
        import sys
        import keras_sd.train, keras_sd.__main__, keras_sd.config, keras_sd.files.json_files
        assert "pydantic" not in sys.modules
        keras_sd.files.json_files.read_json({str(path)!r}, dict[str, str])
        assert "pydantic" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What the package has written itself in the same process or its own files, or has checked before.
OWN_JSON = {
    *("files/json_files.py", "parity/reference.py", "captions/workers.py", "captions/edited_captions.py"),
    "cli/ray_program.py",  # lines of the command that has started it
    *(
        "data/encoding_store.py",
        "data/emoji/source.py",
        "data/emoji/names.py",
        "models/tokenizer.py",
        "training/checkpoints.py",
        "weights/safetensors_files.py",
    ),
}


def test_no_other_module_reads_json():
    package = Path(keras_sd.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))
    }
    assert found <= OWN_JSON, "read it by keras_sd.files.json_files"
