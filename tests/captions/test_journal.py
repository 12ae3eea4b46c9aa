"""A journal under SIGKILL: no line is lost that was said to be on disk, none is there twice, none is torn."""

import signal
import subprocess
import sys

import pytest

from keras_sd.captions import journal
from keras_sd.captions.journal import Journal, read_journal
from keras_sd.errors import UserError

WRITER = """if True:
    import sys
    from pathlib import Path
    from keras_sd.captions.journal import Journal, read_journal
    path = Path(sys.argv[1])
    with Journal(path) as journal:
        start = len(read_journal(path))
        print("ready", flush=True)
        for number in range(start, start + 100000):
            journal.append([{"number": number, "text": "é" * 200}])
            print(number, flush=True)
"""


def test_survives_sigkill(tmp_path):
    path, acknowledged = tmp_path / "journal.jsonl", -1
    for lines in (3, 40, 11):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert writer.stdout.readline() == "ready\n"
        for _ in range(lines):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        writer.wait()
        numbers = [entry["number"] for entry in read_journal(path)]
        assert numbers == list(range(len(numbers))) and len(numbers) > acknowledged
    assert acknowledged >= 53


def test_torn_line_is_taken_away(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"number": 0}\n{"numb')
    assert read_journal(path) == [{"number": 0}]
    with Journal(path) as opened:
        opened.append([{"number": 1}])
    assert path.read_bytes() == b'{"number": 0}\n{"number": 1}\n'


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_PATIENCE", 0.1)
    with Journal(tmp_path / "journal.jsonl"):
        with pytest.raises(UserError, match="another run is working on this shard"):
            with Journal(tmp_path / "journal.jsonl"):
                pass
    with Journal(tmp_path / "journal.jsonl"):
        pass


def test_damaged_lines_are_left_out_and_told(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [b'{"number": 1}', b"[1]", b'{"number": ' + b"9" * 5000 + b"}", b"\xff", b'{"number": "2"}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match="4 damaged lines are left out, the first is line 2: "):
        assert read_journal(path, dict[str, int]) == [{"number": 1}]
