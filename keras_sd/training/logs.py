"""Logs of a training run: `logs/metrics.jsonl`, trackers such as TensorBoard, and folders of images."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json
from keras_sd.files.writing import replaced
from keras_sd.training.callbacks import BufferedCallback
from keras_sd.training.checkpoints import disk_fault
from keras_sd.training.trackers import TensorBoardEvents, Tracker, WandbRun


class LogRecord(TypedDict):
    """The schema of a line of `logs/metrics.jsonl`."""

    step: int


class MetricsLog(BufferedCallback):
    """Writes the numbers of a run to `logs/metrics.jsonl` and to trackers, and its images.

    As a callback it logs the results of every step. The model should return figures of the step's own batch
    (`compute_metrics`), not Keras' mean over the epoch: then the file of a resumed run equals that of an
    uninterrupted one, apart from the times.

    Args:
        run_folder: the run folder.
        initial_step: the step to resume from; later lines, of a run that was killed, are removed. With 0 the
            file starts empty.
        every: number of steps that are read and written together.
        trackers: names in `trackers.TRACKERS`.
        tracker_options: arguments of `WandbRun`: project, name and config.

    Raises:
        UserError: a file cannot be written, or a tracker cannot start.
    """

    def __init__(
        self,
        run_folder,
        initial_step: int = 0,
        every: int = 10,
        trackers=("tensorboard",),
        tracker_options=None,
    ):
        super().__init__(initial_step, every)
        self._initial_step = initial_step
        self._run_folder = Path(run_folder)
        folder = self._run_folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # Names that are already logged for the resumed step, for instance by the evaluation after its
        # checkpoint. They are not written again.
        try:
            self.resumed_names = self._cut(initial_step)
        except OSError as error:
            raise UserError(disk_fault(self.path, error)) from error
        self._trackers: list[Tracker] = []
        with self._disk_faults():
            if "tensorboard" in trackers:
                self._trackers.append(TensorBoardEvents(folder, initial_step))
            if "wandb" in trackers:
                options = tracker_options or {"project": "keras-sd", "name": None, "config": {}}
                self._trackers.append(WandbRun(folder, **options, is_new=initial_step == 0))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log name → number (or scalar on the device) as one line."""
        self.flush()
        self.read([(step, values)])

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 (height, width, 3) image to the trackers and to `name/step-N.png`."""
        with replaced(self._run_folder / name / f"step-{step:06}.png") as staging:
            Image.fromarray(image).save(staging, "PNG")
        with self._disk_faults():
            for tracker in self._trackers:
                tracker.log_image(step, name, image)

    def read(self, records):
        """Write the numbers of several steps."""
        new = []
        for step, values in records:
            known = self.resumed_names if step == self._initial_step else ()
            scalars = {name: float(value) for name, value in values.items() if name not in known}
            if scalars:
                new.append((step, scalars))
        if not new:
            return
        now = round(time.time(), 3)
        lines = [json.dumps({"step": step, "time": now, **scalars}) + "\n" for step, scalars in new]
        with self._disk_faults():
            # Opened for each write, so that no file stays open and no buffer holds data back.
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            for tracker in self._trackers:
                tracker.log(new)

    def close(self) -> None:
        """End a run of wandb; event files take more, as `metrics.jsonl` does."""
        with self._disk_faults():
            for tracker in self._trackers:
                tracker.close()
        self._trackers = [tracker for tracker in self._trackers if isinstance(tracker, TensorBoardEvents)]

    @contextlib.contextmanager
    def _disk_faults(self):
        try:
            yield
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

    def close(self) -> None:
        """Do nothing."""
