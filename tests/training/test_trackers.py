"""Where figures go beside metrics.jsonl: TensorBoard and wandb, which is tested offline."""

import json
import struct
import time

import numpy as np
import pytest
import wandb
from PIL import Image

from keras_sd.cli.train.main import main
from keras_sd.errors import UserError
from keras_sd.training.logs import MetricsLog
from keras_sd.training.settings import Settings
from keras_sd.training.trackers import checked_trackers

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype="uint8")
OPTIONS = {"project": "mine", "name": None, "config": {"seed": 3}}


def log_records(data):
    """The records of a file in LevelDB's log format: blocks of 32 KiB, a header of wandb's in the first."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind == 0:  # the rest of a block
            at = (at // 2**15 + 1) * 2**15
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if 2**15 - at % 2**15 < 7:
            at = (at // 2**15 + 1) * 2**15
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(folder):
    """What the files of the offline mode hold: the figures of each step, in order, and the runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.append((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                found.append(values)
    return found, ids


def written(folder, count):
    """The `history`, once it has so many steps: wandb's own process writes it, also after the run's end."""
    end = time.monotonic() + 20
    while len(history(folder)[0]) < count and time.monotonic() < end:
        time.sleep(0.05)
    return history(folder)


def test_all_that_is_logged_goes_to_wandb_and_a_resumed_run_is_the_same_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "my-run"
    log = MetricsLog(folder, trackers=("tensorboard", "wandb"), tracker_options=OPTIONS)
    for step in (1, 2):
        log.log_scalars(step, {"loss": step / 4, "learning_rate": 1e-4})
    log.log_scalars(2, {"kid": 0.5})
    log.log_image(2, "samples", IMAGE)
    log.close()
    time.sleep(1.1)  # wandb names the files of its offline mode by the second
    resumed = MetricsLog(folder, initial_step=2, trackers=("wandb",), tracker_options=OPTIONS)
    resumed.log_scalars(2, {"kid": 0.5})  # again, as the run was killed before it was recorded
    resumed.log_scalars(3, {"loss": 0.75})
    resumed.close()

    found, ids = written(folder / "logs", 3)
    assert len(set(ids)) == 1 and ids[0][1:] == ("mine", "my-run")
    numbers = [
        {name: value for name, value in values.items() if name in ("_step", "loss", "kid", "learning_rate")}
        for values in found
    ]
    assert numbers == [
        {"_step": 1, "loss": 0.25, "learning_rate": 1e-4},
        {"_step": 2, "loss": 0.5, "learning_rate": 1e-4, "kid": 0.5},
        {"_step": 3, "loss": 0.75},
    ]
    lines = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    (media,) = (folder / "logs").rglob("samples_2*.png")
    np.testing.assert_array_equal(Image.open(media), IMAGE)
    np.testing.assert_array_equal(Image.open(folder / "samples" / "step-000002.png"), IMAGE)
    assert len(list((folder / "logs").glob("events.out.tfevents.*"))) == 1
    again = MetricsLog(folder, trackers=("wandb",), tracker_options=OPTIONS)
    again.log_scalars(1, {"loss": 0.1})
    again.close()
    assert len(set(written(folder / "logs", 4)[1])) == 2  # a new run is another one


def test_names_of_trackers():
    assert checked_trackers("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert checked_trackers("all") == ("tensorboard", "wandb") and checked_trackers("none") == ()
    for text in ("comet_ml", "wandb,none", ""):
        with pytest.raises(UserError, match="report_to"):
            checked_trackers(text)
    with pytest.raises(UserError, match="wandb_run_name x: has no effect without `report_to='wandb'`"):
        Settings("run", wandb_run_name="x")


def test_without_a_login_nothing_begins(tmp_path, monkeypatch, run_program):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # forgets the settings of other tests
    output = tmp_path / "run"
    code, _, errors = run_program(main, "lora", "--report-to", "wandb", "--output-dir", output)
    assert code == 2 and not output.exists()
    assert errors.splitlines()[-1].endswith(
        "--report-to wandb: no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
    )
    wandb.teardown()
    given = ("lora", "--wandb-run-name", "x", "--output-dir", output)
    code, _, errors = run_program(main, *given)
    assert code == 2 and "--wandb-run-name: has no effect without --report-to wandb" in errors
