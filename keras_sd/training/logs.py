"""Logs of a training run: `logs/metrics.jsonl`, TensorBoard events beside it, and folders of images."""

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import TypedDict

from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json
from keras_sd.files.writing import replaced
from keras_sd.training.callbacks import BufferedCallback
from keras_sd.training.checkpoints import disk_fault


class LogRecord(TypedDict):
    """The schema of a line of `logs/metrics.jsonl`."""

    step: int


class MetricsLog(BufferedCallback):
    """Writes the numbers of a run to `logs/metrics.jsonl` and to TensorBoard, and its images.

    As a callback it logs the results of every step. The model should return figures of the step's own batch
    (`compute_metrics`), not Keras' mean over the epoch: then the file of a resumed run equals that of an
    uninterrupted one, apart from the times.

    Args:
        run_folder: the run folder.
        initial_step: the step to resume from; later lines, of a run that was killed, are removed. With 0 the
            file starts empty.
        every: number of steps that are read and written together.
    """

    def __init__(self, run_folder, initial_step: int = 0, every: int = 10):
        super().__init__(initial_step, every)
        self._initial_step = initial_step
        self._run_folder = Path(run_folder)
        folder = self._run_folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._events_path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        # Names that are already logged for the resumed step, for instance by the evaluation after its
        # checkpoint. They are not written again.
        try:
            self.resumed_names = self._cut(initial_step)
        except OSError as error:
            raise UserError(disk_fault(self.path, error)) from error
        # The second event makes TensorBoard drop later steps of earlier files.
        now = time.time()
        start = Event(wall_time=now, step=initial_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write([], [Event(wall_time=now, file_version="brain.Event:2"), start])

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log name → number (or scalar on the device) as one line."""
        self.flush()
        self.read([(step, values)])

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 (height, width, 3) image to TensorBoard and to `name/step-N.png`."""
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        folder = self._run_folder / name
        with replaced(folder / f"step-{step:06}.png") as staging:
            staging.write_bytes(encoded.getvalue())
        event = Event(step=step, wall_time=time.time())
        value = event.summary.value.add(tag=name)
        value.image.height, value.image.width, value.image.colorspace = image.shape
        value.image.encoded_image_string = encoded.getvalue()
        self._write([], [event])

    def read(self, records):
        """Write the numbers of several steps."""
        lines, events = [], []
        now = time.time()
        for step, values in records:
            known = self.resumed_names if step == self._initial_step else ()
            scalars = {name: float(value) for name, value in values.items() if name not in known}
            if not scalars:
                continue
            lines.append(json.dumps({"step": step, "time": round(now, 3), **scalars}) + "\n")
            event = Event(step=step, wall_time=now)
            for name, value in scalars.items():
                event.summary.value.add(tag=name, simple_value=value)
            events.append(event)
        self._write(lines, events)

    def _write(self, lines: list[str], events: list[Event]) -> None:
        # The files are opened for each write, so that none stays open and no buffer holds data back.
        try:
            if lines:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            if events:
                with self._events_path.open("ab") as file:
                    writer = RecordWriter(file)
                    for event in events:
                        writer.write(event.SerializeToString())
        except OSError as error:
            raise UserError(disk_fault(self.path.parent, error)) from error

    def _cut(self, initial_step: int) -> set[str]:
        """Drop lines after the step and an incomplete line; return the names that are logged for the step."""
        lines, names = [], set()
        if initial_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                try:
                    record = parse_json(line, self.path, LogRecord)
                except UserError:
                    break  # incomplete, as the run was killed; later steps are written again
                if record["step"] <= initial_step and line.endswith("\n"):
                    lines.append(line)
                if record["step"] == initial_step:
                    names |= record.keys() - {"step", "time"}
        staging = self.path.with_suffix(".staging")
        staging.write_text("".join(lines), encoding="utf-8")
        staging.replace(self.path)
        return names


class SilentLog(BufferedCallback):
    """A `MetricsLog` that writes nothing, for all processes but the one that writes the files."""

    def on_step(self, logs):
        """Do nothing."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Do nothing."""
