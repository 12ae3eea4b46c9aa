"""Callbacks on a real `fit()` of a tiny model on one backend and, in a second process, on the other."""

import contextlib
import functools
import io
import itertools
import json
import os
import re
import select
import signal
import struct
import sys
import termios
import threading

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.training.callbacks import (
    CheckpointCallback,
    EMACallback,
    ProgressCallback,
    StepCallback,
    StepCallbackList,
    StopOnNonFiniteLoss,
    StopOnSignal,
)
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.training.logs import MetricsLog
from keras_sd.training.objectives import Objective
from keras_sd.training.optimizers import AdamW
from tests.programs import run_python

BATCH = 4


class Regression(Objective):
    """Two dense layers with batch statistics (a state that is not trained); `poison` breaks the loss."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, kernel_initializer=keras.initializers.GlorotUniform(1))
        self.normalization = keras.layers.BatchNormalization()
        self.out = keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(2))
        self.hidden.build((None, 3))
        self.normalization.build((None, 5))
        self.out.build((None, 5))
        self.built = True

    def call(self, batch, training=False):
        hidden = ops.tanh(self.normalization(self.hidden(batch["x"]), training=training))
        return ops.mean(ops.square(self.out(hidden) - batch["y"]), axis=-1) * batch["poison"]


def batches(start, poisoned_step=None):
    """Endless batches, each a function of its number."""
    number = start
    while True:
        generator = np.random.default_rng(number)
        x = generator.normal(size=(BATCH, 3)).astype("float32")
        number += 1
        poison = np.full(BATCH, np.nan if number == poisoned_step else 1.0, "float32")
        yield ({"x": x, "y": np.sin(x.sum(axis=1, keepdims=True)), "poison": poison},)


class Run:
    """A miniature of the trainer: model, optimizer and callbacks, resumed if the folder has a checkpoint.

    Tests in which no number matters run eagerly, which saves compiling.
    """

    def __init__(self, folder, every=4, accumulation=1, eager=False):
        self.model = Regression()
        self.accumulation = accumulation
        self.optimizer = AdamW(0.05, gradient_accumulation_steps=accumulation if accumulation > 1 else None)
        self.optimizer.build(self.model.trainable_variables)
        self.model.compile(optimizer=self.optimizer, jit_compile=False, run_eagerly=eager)
        self.checkpoints = Checkpoints(folder, {})
        self.step = 0
        latest = self.checkpoints.latest()
        if latest:
            checkpoint = self.checkpoints.load(latest)
            self.step = checkpoint.step
            for group, variables in self.groups().items():
                for variable, value in zip(variables, checkpoint.groups[group].values(), strict=True):
                    variable.assign(value)
        self.log = MetricsLog(folder, self.step, every=3)
        self.stop = StopOnSignal()
        self.ema = EMACallback(self.optimizer, self.model.trainable_variables)
        guard = StopOnNonFiniteLoss(self.checkpoints, self.step)
        save = CheckpointCallback(self.checkpoints, self.gather_state, every, self.step, [self.log, guard])
        self.callbacks = [self.stop, self.ema, self.log, guard, save]

    def groups(self):
        return {"weights": self.model.weights, "optimizer": self.optimizer.variables}

    def gather_state(self):
        groups = {
            group: {f"{i:02}": ops.convert_to_numpy(v) for i, v in enumerate(variables)}
            for group, variables in self.groups().items()
        }
        return groups, {"step": self.log.step}

    def fit(self, steps, *more, epochs=1, poisoned_step=None):
        callbacks = [*self.callbacks, *more]
        for callback in callbacks:
            callback.batches_per_step = self.accumulation
        with contextlib.ExitStack() as stack:
            stack.push(self._leave)
            self.model.fit(
                batches(self.step * self.accumulation, poisoned_step),
                epochs=epochs,
                steps_per_epoch=steps * self.accumulation,
                callbacks=StepCallbackList(callbacks, model=self.model, add_history=True),
                shuffle=False,  # which a generator cannot
                verbose=0,
            )
        return self

    def _leave(self, exception, *details):
        if exception is not None:  # without one, `fit` restores the signal handlers by itself
            self.stop.__exit__(exception, *details)


class AtStep(StepCallback):
    """Calls a function after a step."""

    def __init__(self, step, function):
        super().__init__()
        self.at = step
        self.function = function

    def on_step(self, logs):
        if self.step == self.at:
            self.function()


def assert_same_state(one: dict, other: dict):
    for group in one:
        assert list(one[group]) == list(other[group])
        for name, value in one[group].items():
            assert value.tobytes() == other[group][name].tobytes(), name


def records(run_folder):
    lines = [json.loads(line) for line in (run_folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def load(checkpoints, step):
    return checkpoints.load(checkpoints.run_folder / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Accumulated batches -> an uninterrupted run with a checkpoint after every one of its 13 steps."""

    @functools.cache
    def run(accumulation):
        return Run(tmp_path_factory.mktemp("whole"), every=1, accumulation=accumulation).fit(13)

    return run


def test_a_checkpoint_in_mid_epoch_holds_the_state_of_its_step(tmp_path, whole):
    run = Run(tmp_path).fit(5, epochs=2)  # saves at 4 and 8, both in mid-epoch, and at the end
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 8, 10)}
    assert_same_state(run.gather_state()[0], load(run.checkpoints, 10).groups)
    for step in (4, 8, 10):
        assert_same_state(load(run.checkpoints, step).groups, load(whole(1).checkpoints, step).groups)
        assert load(run.checkpoints, step).position == {"step": step}
    assert load(run.checkpoints, 8).groups["optimizer"]["00"] == 8  # iterations
    short = Run(tmp_path / "short", every=100).fit(4)
    assert_same_state(short.gather_state()[0], load(run.checkpoints, 4).groups)


@pytest.mark.parametrize("accumulation", [1, 2], ids=["plain", "accumulated"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, whole, accumulation):
    cut = Run(tmp_path, accumulation=accumulation)
    # As after a kill in step 7: the log goes on beyond the checkpoint and ends in a half-written line.
    with pytest.raises(ZeroDivisionError):
        cut.fit(13, AtStep(7, lambda: 1 // 0))
    cut.log.flush()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    with cut.log.path.open("a") as file:
        file.write('{"step": 8, "lo')
    resumed = Run(tmp_path, accumulation=accumulation)
    assert resumed.step == 4
    resumed.fit(13 - 4)
    for step in (8, 12, 13):
        expected = load(whole(accumulation).checkpoints, step).groups
        assert_same_state(load(resumed.checkpoints, step).groups, expected)
    assert records(tmp_path) == records(whole(accumulation).checkpoints.run_folder)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 14))


@pytest.mark.parametrize(
    "number, accumulation", [(signal.SIGTERM, 2), (signal.SIGINT, 1)], ids=["SIGTERM-accumulated", "SIGINT"]
)
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path, whole, number, accumulation, capsys):
    before = [signal.getsignal(each) for each in StopOnSignal.signals]
    run = Run(tmp_path, every=100, accumulation=accumulation)

    class InTheFirstBatchOfStep7(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 6 * accumulation:
                signal.raise_signal(number)

    run.fit(50, InTheFirstBatchOfStep7(), epochs=2)
    assert run.stop.signal_received == number
    assert run.checkpoints.latest().name == "checkpoint-7"
    assert [signal.getsignal(each) for each in StopOnSignal.signals] == before
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"{number.name}: stopping after this step"
    assert told[:-1] in ([], ["compiling the training step"])  # which is told if it takes long
    assert_same_state(load(run.checkpoints, 7).groups, load(whole(accumulation).checkpoints, 7).groups)


def test_a_signal_between_a_step_and_its_end_loses_nothing(tmp_path, whole):
    """On JAX the values before the step are gone by then, and those after it have not come to the model."""
    run = Run(tmp_path, every=100)

    class WhenStep7IsComputed(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            compute, numbers = self.model.train_function, itertools.count(1)

            def computing(*arguments):
                results = compute(*arguments)
                if next(numbers) == 7:
                    signal.raise_signal(signal.SIGTERM)
                return results

            self.model.train_function = computing

    run.fit(50, WhenStep7IsComputed())
    assert run.checkpoints.latest().name == "checkpoint-7"
    assert_same_state(load(run.checkpoints, 7).groups, load(whole(1).checkpoints, 7).groups)


@pytest.mark.parametrize("accumulation", [1, 2], ids=["plain", "accumulated"])
def test_a_signal_during_an_evaluation_adds_no_step(tmp_path, accumulation):
    run = Run(tmp_path, every=100, accumulation=accumulation, eager=True)
    run.fit(50, AtStep(3, lambda: signal.raise_signal(signal.SIGTERM)), epochs=2)
    assert run.checkpoints.latest().name == "checkpoint-3"


def test_a_second_interrupt_aborts_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path, every=100, eager=True)

    def interrupt_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a second one of these is still polite
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run.fit(50, AtStep(3, interrupt_twice))
    assert run.checkpoints.latest() is None
    assert signal.getsignal(signal.SIGINT) == before


def test_signal_handlers_as_a_context_outlive_fits_and_errors(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path, every=100, eager=True)
    with pytest.raises(ZeroDivisionError), run.stop:
        run.fit(2)
        assert signal.getsignal(signal.SIGTERM) == run.stop._handle
        run.fit(2, AtStep(1, lambda: 1 // 0))
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    run = Run(tmp_path, every=100, eager=True)
    thread = threading.Thread(target=run.fit, args=(3,))
    thread.start()
    thread.join()
    assert run.checkpoints.latest().name == "checkpoint-3"


def test_a_loss_that_is_not_finite_names_its_step_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"loss is nan at step 6; resume from .*checkpoint-4, with a lower"):
        Run(tmp_path, eager=True).fit(20, poisoned_step=6)
    with pytest.raises(UserError, match=r"loss is nan at step 1; start anew \(no checkpoint yet\) with a"):
        Run(tmp_path / "new", eager=True).fit(2, poisoned_step=1)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = Run(tmp_path, every=2, eager=True)

    def break_weights():
        backend.sync_state(run.model)
        run.model.out.bias.assign([np.inf])

    run.callbacks.insert(0, AtStep(4, break_weights))
    with pytest.raises(UserError, match=r"weights/\d+ is not finite after step 4; .*checkpoint-2, "):
        run.fit(20)
    assert run.checkpoints.latest().name == "checkpoint-2"


def hard_values(shape, seed):
    """Values that adding and subtracting would not bring back: huge beside tiny, -0, denormals, odd NaNs."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, size=shape, dtype=np.uint32).view("float32")
    return np.where(generator.random(shape) < 0.2, np.float32(-0.0), bits)


def test_ema_weights_are_lent_and_returned_bit_for_bit(tmp_path):
    run = Run(tmp_path)
    variables, averages = run.model.trainable_variables, run.optimizer.ema_variables

    def read(values):
        return [ops.convert_to_numpy(value).tobytes() for value in values]

    for i, (variable, average) in enumerate(zip(variables, averages, strict=True)):
        variable.assign(hard_values(variable.shape, i))
        average.assign(hard_values(variable.shape, -1 - i + 2**32))
    raw, ema = read(variables), read(averages)
    assert raw != ema
    for _ in range(2):
        with run.ema.applied():
            assert read(variables) == ema
            run.model.evaluate(batches(0), steps=2, verbose=0)
            with run.ema.applied():
                assert read(variables) == ema
            assert read(variables) == ema
        assert read(variables) == raw and read(averages) == ema
    with pytest.raises(ZeroDivisionError), run.ema.applied():
        raise ZeroDivisionError
    assert read(variables) == raw and read(averages) == ema
    run.optimizer.ema_variables = averages[:-1]
    with pytest.raises(ValueError), run.ema.applied():
        raise AssertionError("not reached")
    assert read(variables) == raw


def test_evaluating_with_ema_weights_in_mid_epoch_changes_nothing_in_the_training(tmp_path, whole):
    run = Run(tmp_path)
    losses = []

    def evaluate():
        for _ in range(2):
            with run.ema.applied():
                losses.append(run.model.evaluate(batches(1000), steps=3, verbose=0))
        losses.append(run.model.evaluate(batches(1000), steps=3, verbose=0))

    run.fit(9, AtStep(5, evaluate))
    assert_same_state(load(run.checkpoints, 9).groups, load(whole(1).checkpoints, 9).groups)
    assert losses[0] == losses[1] != losses[2]


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    def told(line_seconds):
        progress = ProgressCallback(40, 10, BATCH, line_seconds)
        progress.on_train_begin()
        for epoch in range(2):
            progress.on_epoch_begin(epoch)
            for batch in range(15):
                progress.on_train_batch_end(batch, {"loss": ops.convert_to_tensor(0.5)})
        progress.on_train_end()
        return capsys.readouterr().err.splitlines()

    pattern = r"step (\d+)/40, [\d.]+ images/s, mean loss 0\.5000, \d\d:\d\d left"
    first, *others = told(0.0)
    assert first == "step 11/40, loss 0.5000"  # which has compiled, and so has no rate yet
    assert [int(re.fullmatch(pattern, line)[1]) for line in others] == list(range(12, 41))
    assert others[-1].endswith("00:00 left")
    assert [int(re.fullmatch(pattern, line)[1]) for line in told(1000.0)[1:]] == [40]


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        Run(tmp_path, every=100, eager=True).fit(5, ProgressCallback(5, 0, BATCH))
        monkeypatch.undo()
        os.set_blocking(reader, False)
        shown = ""
        while "00:00 left" not in shown:
            assert select.select([reader], [], [], 10)[0], shown
            shown += os.read(reader, 100_000).decode()
    os.close(reader)
    assert re.search(r"100%\|.+\| 5/5, [\d.]+ images/s, mean loss \d+\.\d{4}, 00:00 left", shown)


def test_progress_counts_the_rate_without_pauses(capsys):
    progress = ProgressCallback(100, 0, 10, line_seconds=0.3)
    progress.on_epoch_begin(0)

    def step(batch, seconds):
        threading.Event().wait(seconds)
        progress.on_train_batch_end(batch, {"loss": 1.0})

    step(0, 0.5)  # compiles
    assert capsys.readouterr().err == "step 1/100, loss 1.0000\n"
    step(1, 0.1)
    with progress.paused():
        threading.Event().wait(1.0)
    step(2, 0.1)
    assert capsys.readouterr().err == ""
    step(3, 0.1)
    rate = float(re.search(r"([\d.]+) images/s", capsys.readouterr().err)[1])
    assert 60 < rate < 101


def events(folder):
    """All events in TFRecord format: length, checksum, content, checksum."""
    found = []
    for path in sorted((folder / "logs").glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            length, length_sum = struct.unpack_from("<QI", content)
            data, (data_sum,) = content[12 : 12 + length], struct.unpack_from("<I", content, 12 + length)
            assert (masked_crc32c(content[:8]), masked_crc32c(data)) == (length_sum, data_sum)
            found.append(Event.FromString(data))
            content = content[16 + length :]
    return found


def test_tensorboard_gets_scalars_and_images(tmp_path):
    log = MetricsLog(tmp_path, initial_step=20)
    log.log_scalars(21, {"loss": 0.5, "kid": ops.convert_to_tensor(0.25)})
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    log.log_image(21, "samples", image)
    version, start, scalars, picture = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 21 and start.session_log.status == 1
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {"loss": 0.5, "kid": 0.25}
    assert scalars.step == picture.step == 21
    [value] = picture.summary.value
    assert (value.tag, value.image.height, value.image.width) == ("samples", 6, 8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), image)
    assert records(tmp_path) == [{"step": 21, "loss": 0.5, "kid": 0.25}]


def test_log_is_cut_at_the_resumed_step_and_repeats_nothing(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log_scalars(step, {"loss": step / 10})
    log.log_scalars(2, {"kid": 0.5})
    resumed = MetricsLog(tmp_path, initial_step=2)
    assert resumed.resumed_names == {"loss", "kid"}
    kept = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 2, "kid": 0.5}]
    assert records(tmp_path) == kept
    resumed.log_scalars(2, {"kid": 0.5})  # an evaluation repeated
    resumed.log_scalars(2, {"kid": 0.5, "fid": 7})
    assert records(tmp_path) == kept + [{"step": 2, "fid": 7.0}]
    MetricsLog(tmp_path)
    assert records(tmp_path) == []


def test_full_disk_while_logging_is_told(tmp_path):
    log = MetricsLog(tmp_path)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="logs: cannot be saved: No space left on device; free some"):
        log.log_scalars(1, {"loss": 1.0})


def test_logs_come_to_callbacks_unread(tmp_path):
    kinds = set()

    class Look(StepCallback):
        def on_step(self, logs):
            kinds.add(type(logs["loss"]))

    Run(tmp_path, eager=True).fit(2, Look())
    assert float not in kinds and len(kinds) == 1


def test_the_same_on_the_other_backend():
    if "KERAS_SD_OTHER_BACKEND" in os.environ:
        imported = sys.modules.get("tensorflow") is not None
        assert imported == (keras.backend.backend() == "tensorflow")
        return
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    # Compiling accumulation takes JAX long.
    options = ("-q", "-p", "no:cacheprovider", "-k", "not accumulated")
    run_python(["-m", "pytest", *options, __file__], other, KERAS_SD_OTHER_BACKEND="1")
