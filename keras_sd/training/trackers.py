"""Where a run's figures and images go beside its own files: TensorBoard, and Weights & Biases (wandb)."""

import io
import os
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from keras_sd.errors import UserError, require

TRACKERS = ("tensorboard", "wandb")
_WANDB_ID = "wandb-id.txt"  # in the folder of logs, so that a resumed run is the same run there


class Tracker(Protocol):
    """What a log passes its figures on to."""

    def log(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Take the figures of several steps: a list of (step, name -> number)."""

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Take a uint8 (height, width, 3) image."""

    def close(self) -> None:
        """Take no more."""


def checked_trackers(report_to: str) -> tuple[str, ...]:
    """Return the trackers that a text names, separated by commas; "all" names all and "none" none.

    Raises:
        UserError: one is unknown.
    """
    names = [name.strip().lower() for name in report_to.split(",") if name.strip()]
    if names == ["all"]:
        return TRACKERS
    if names == ["none"]:
        return ()
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report_to {name!r}: unknown; use {', '.join(TRACKERS)}, all or none")
    if not names:
        raise UserError(f"report_to {report_to!r}: names nothing; use {', '.join(TRACKERS)}, all or none")
    return tuple(dict.fromkeys(names))


def check_wandb() -> None:
    """Check that figures can be sent to wandb: the package is installed, and logged in unless it is offline.

    Raises:
        UserError: it is not.
    """
    require("wandb")
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False):
        raise UserError(
            "report_to wandb: no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
        )


class TensorBoardEvents:
    """Writes TensorBoard's event files.

    Args:
        folder: that of the logs.
        initial_step: later steps of earlier files are dropped by TensorBoard.
    """

    def __init__(self, folder: Path, initial_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        now = time.time()
        start = Event(wall_time=now, step=initial_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write([Event(wall_time=now, file_version="brain.Event:2"), start])

    def log(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        events = []
        now = time.time()
        for step, values in records:
            event = self._event(step=step, wall_time=now)
            for name, value in values.items():
                event.summary.value.add(tag=name, simple_value=value)
            events.append(event)
        self._write(events)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        event = self._event(step=step, wall_time=time.time())
        value = event.summary.value.add(tag=name)
        value.image.height, value.image.width, value.image.colorspace = image.shape
        value.image.encoded_image_string = encoded.getvalue()
        self._write([event])

    def close(self) -> None:
        """Do nothing: the file is opened for each write, so that no buffer holds data back."""

    def _write(self, events):
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


class WandbRun:
    """A run of wandb; a resumed run of training is the same run there.

    Args:
        folder: that of the logs; files of the offline mode are in its `wandb`.
        project, name: of the run on wandb; without a name it is that of the run folder.
        config: JSON values that describe the run.
        is_new: whether the run begins, and is not resumed.

    Raises:
        UserError: wandb cannot start the run.
    """

    def __init__(
        self, folder: Path, project: str, name: str | None, config: dict[str, Any], *, is_new: bool
    ) -> None:
        import wandb

        self._wandb = wandb
        path = folder / _WANDB_ID
        if is_new or not path.is_file():
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=name or folder.parent.resolve().name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=folder,
                config=config,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"report_to wandb: the run cannot start ({reason}); see `wandb login` and the network, or "
                "set WANDB_MODE=offline"
            ) from error

    def log(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for step, values in records:
            self._send(step, dict(values))

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._send(step, {name: self._wandb.Image(image)})

    def _send(self, step, values):
        try:
            self._run.log(values, step=step)
        except self._wandb.errors.Error as error:  # training is worth more than its report
            reason = " ".join(str(error).split())
            warnings.warn(f"wandb: step {step} is not reported ({reason})", stacklevel=3)

    def close(self) -> None:
        self._run.finish()
