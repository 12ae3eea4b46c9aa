"""Keras callbacks of a training run, on TensorFlow and on JAX.

A step is one update of the weights: one batch, or several whose gradients are accumulated. `fit()` may be
called several times in a run; steps are counted from `initial_step`. Reading a loss waits for the device, so
the callbacks collect the logs of several steps and read them together. `StepCallbackList` keeps Keras from
reading them earlier.

Order in the list: `StopOnSignal`, `logs.MetricsLog`, `StopOnNonFiniteLoss`, `CheckpointCallback`, the rest.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from keras_sd import backend, interruption
from keras_sd.errors import UserError
from keras_sd.progress import is_terminal
from keras_sd.training import slices
from keras_sd.training.checkpoints import Checkpoints


class StepCallbackList(keras.callbacks.CallbackList):
    """A callback list that passes the logs of a step on without copying them from the device.

    Keras' own list converts every log to a float after every step, which waits for the device. Use:
    `model.fit(..., callbacks=StepCallbackList(callbacks, model=model))`.
    """

    def on_train_batch_end(self, batch, logs=None):
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs)


class StepCallback(keras.callbacks.Callback):
    """Counts steps across epochs and calls `on_step` after each; `self.step` is the number of steps done."""

    batches_per_step = 1  # more if gradients are accumulated
    _trained = None

    def __init__(self, initial_step: int = 0):
        super().__init__()
        self.step = initial_step
        self._epoch_start = initial_step

    @property
    def model(self):
        """The model; on JAX its variables are empty until `backend.sync_state`.

        Keras' own property synchronises at each access. That takes time in every step, and it fails if a
        signal interrupts a step, whose inputs have been donated.
        """
        return self._trained

    def set_model(self, model):
        super().set_model(model)
        self._trained = model

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_start = self.step

    def on_train_batch_end(self, batch, logs=None):
        steps, remainder = divmod(batch + 1, self.batches_per_step)
        if not remainder:
            self.step = self._epoch_start + steps
            self.on_step(logs or {})

    def on_step(self, logs: Mapping) -> None:
        """Handle the end of a step (for subclasses). `logs`: name → number, or scalar on the device."""


class BufferedCallback(StepCallback):
    """Collects the logs of several steps and calls `read` with them, as reading a log waits for the device.

    Args:
        initial_step: number of steps done before.
        every: number of steps whose logs are read together.
    """

    def __init__(self, initial_step: int = 0, every: int = 10):
        super().__init__(initial_step)
        self.every = every
        self._pending: list[tuple[int, Mapping]] = []

    def on_step(self, logs):
        self._pending.append((self.step, logs))
        if len(self._pending) >= self.every:
            self.flush()

    def on_epoch_end(self, epoch, logs=None):
        self.flush()

    def flush(self) -> None:
        """Read the logs collected so far."""
        pending, self._pending = self._pending, []
        self.read(pending)

    def read(self, records: list[tuple[int, Mapping]]) -> None:
        """Handle the logs of several steps (for subclasses): a list of (step, logs)."""


class ProgressCallback(StepCallback):
    """A progress bar with images per second, time left and the loss as an exponential moving average.

    If standard error is not a terminal, it prints a line after the first step and then every `line_seconds`.
    The rate excludes compilation and the time inside `paused()`.

    Args:
        total_steps: number of steps of the whole run.
        initial_step: number of steps done before.
        batch_size: images per step.
        line_seconds: seconds between two lines.
    """

    bar_seconds = 0.5
    smoothing = 0.7  # weight of the past in loss and rate

    def __init__(self, total_steps: int, initial_step: int, batch_size: int, line_seconds: float = 30.0):
        super().__init__(initial_step)
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.line_seconds = line_seconds
        self._bar = None
        self._logs = {}
        self._loss: Any = None
        self._rate: Any = None
        self._since: Any = None  # (time, step) of the last reading

    def on_train_begin(self, logs=None):
        self._since = None
        if is_terminal():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=self.total_steps, initial=self.step, bar_format=layout, file=sys.stderr)

    @contextmanager
    def paused(self):
        """Exclude the time inside the block from the rate, for an evaluation."""
        paused = time.monotonic()
        yield
        if self._since:
            began, step = self._since
            self._since = began + time.monotonic() - paused, step

    def on_step(self, logs):
        self._logs = logs
        if self._since is None:  # the first step, which compiles
            if not self._bar:
                loss = float(logs.get("loss", math.nan))
                print(f"step {self.step}/{self.total_steps}, loss {loss:.4f}", file=sys.stderr, flush=True)
            self._since = time.monotonic(), self.step
        elif time.monotonic() - self._since[0] >= (self.bar_seconds if self._bar else self.line_seconds):
            self._report()

    def on_train_end(self, logs=None):
        if self._since and self.step > self._since[1]:
            self._report()
        if self._bar:
            self._bar.close()
            self._bar = None

    def _report(self) -> None:
        self._loss = self._smooth(self._loss, float(self._logs.get("loss", math.nan)))
        now = time.monotonic()  # after reading the loss, which waits until the steps are done
        began, step = self._since
        self._rate = self._smooth(self._rate, (self.step - step) / (now - began))
        self._since = now, self.step
        left = tqdm.format_interval((self.total_steps - self.step) / self._rate)
        figures = f"{self._rate * self.batch_size:.1f} images/s, mean loss {self._loss:.4f}, {left} left"
        if self._bar:
            self._bar.n = self.step
            self._bar.set_postfix_str(figures)
        else:
            print(f"step {self.step}/{self.total_steps}, {figures}", file=sys.stderr, flush=True)

    def _smooth(self, past: float | None, value: float) -> float:
        return value if past is None else self.smoothing * past + (1 - self.smoothing) * value


class CheckpointCallback(StepCallback):
    """Saves a checkpoint every `every` steps, when training is stopped, and at its end.

    Of several processes the first one writes, and where the state is split among them, all.

    Args:
        checkpoints: `Checkpoints` of the run.
        gather_state: () -> (groups, position), see `Checkpoints.save`; called when the variables are up to
            date.
        every: steps between two checkpoints.
        initial_step: number of steps done before.
        total_steps: the last step, after which a checkpoint is always saved.
        flush_before: callbacks with collected logs, flushed before each save, so that the log is complete up
            to every checkpoint, and no checkpoint is saved after a loss that is not finite.
        before_save: called with the step and the groups before a checkpoint of a multiple of `every` and of
            the last step is saved, in the same process; None for nothing.

    Raises:
        UserError: the state is not finite, or the disk is full; earlier checkpoints stay unchanged.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        gather_state: Callable[[], tuple[dict, dict]],
        every: int,
        initial_step: int = 0,
        flush_before: Sequence[BufferedCallback] = (),
        total_steps: int | None = None,
        before_save: Callable[[int, dict], object] | None = None,
    ):
        super().__init__(initial_step)
        self.before_save = before_save
        self.checkpoints = checkpoints
        self.gather_state = gather_state
        self.every = every
        self.total_steps = total_steps
        self.flush_before = flush_before
        self._saved_step = initial_step

    def on_step(self, logs):
        due = self.step // self.every > self._saved_step // self.every
        if due or self.model.stop_training or self.step == self.total_steps:
            self.save()

    def on_train_end(self, logs=None):
        if self.step != self._saved_step:
            self.save()

    def save(self) -> None:
        """Save the current state."""
        with interruption.phase(f"saving checkpoint-{self.step}"):
            for callback in self.flush_before:
                callback.flush()
            backend.sync_state(self.model)
            groups, position = self.gather_state()
            self._check_finite(groups)
            if backend.process_index() == 0 or slices.is_sliced(groups):
                is_regular = self.step % self.every == 0 or self.step == self.total_steps
                if self.before_save is not None and is_regular:
                    self.before_save(self.step, groups)
                self.checkpoints.save(self.step, groups, position)
            self._saved_step = self.step

    def _check_finite(self, groups):
        """Raise UserError for a number that is not finite, in all processes."""
        # A loss belongs to the weights before its step; the step itself may have broken them.
        broken = [
            f"{group}/{name}"
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
            if not all(np.isfinite(array).all() for array in slices.arrays_of(tensor))
        ]
        if slices.is_sliced(groups):
            found = map(json.loads, backend.exchanged_texts(json.dumps(broken[:1])))
            broken = [name for names in found for name in names]
        if broken:
            raise diverged(f"{broken[0]} is not finite after step {self.step}", self.checkpoints)


class StopOnNonFiniteLoss(BufferedCallback):
    """Stops at a NaN or infinite loss, with a UserError that names the step and the last good checkpoint.

    Args:
        checkpoints: `Checkpoints` of the run.
        initial_step, every: as in `BufferedCallback`.
    """

    def __init__(self, checkpoints: Checkpoints, initial_step: int = 0, every: int = 10):
        super().__init__(initial_step, every)
        self.checkpoints = checkpoints

    def read(self, records):
        for step, logs in records:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss} at step {step}", self.checkpoints)


def diverged(fault: str, checkpoints: Checkpoints) -> UserError:
    """Return the error for a run with non-finite numbers; it names the last good checkpoint."""
    last = checkpoints.last_good()
    remedy = f"resume from the last good checkpoint, {last}," if last else "start anew (no checkpoint yet)"
    return UserError(f"training: {fault}; {remedy} with a lower `learning_rate` or `max_grad_norm`")


class PhaseCallback(StepCallback):
    """Has the training step compiled anew after the steps where the objective changes.

    Args:
        objective: `objectives.Objective`, with `phase_starts`.
        initial_step: number of steps done before.
    """

    def __init__(self, objective: Any, initial_step: int = 0):
        super().__init__(initial_step)
        self._objective = objective
        self._compiling = contextlib.ExitStack()

    def on_train_batch_end(self, batch, logs=None):
        self._compiling.close()
        super().on_train_batch_end(batch, logs)

    def on_step(self, logs):
        if self._objective.enter_phase_of(self.step):
            self._objective.make_train_function(force=True)
            work = backend.first_call(self._objective.jit_compile)
            self._compiling.enter_context(interruption.phase(f"{work} the training step of the next phase"))


class StopOnSignal(StepCallback):
    """Stops training after the current step on SIGTERM or Ctrl-C; a second Ctrl-C aborts at once.

    The previous signal handlers are restored when `fit()` ends or, if this is used as a context manager
    around one or several `fit()`, at the end of the block, also after an exception. In other threads than the
    main one it does nothing, since Python delivers signals to the main thread only. With several processes,
    one that gets a signal notifies the others, and all stop after the same step, some steps later.

    In a command, `interruption` ends the process if stopping takes too long, as during the compilation of the
    first step, but never inside a step.

    Attributes:
        signal_received: the signal's number, or None.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        super().__init__()
        self.signal_received = None
        self._old_handlers = {}
        self._entered = False
        self._within_step = False
        self._compiling = contextlib.ExitStack()
        self._has_peers = backend.process_count() > 1

    def __enter__(self):
        self._entered = True
        self._install()
        return self

    def __exit__(self, *exception):
        self._entered = False
        self._restore()

    def on_train_begin(self, logs=None):
        self._install()
        work = backend.first_call(self.model.jit_compile)
        self._compiling.enter_context(interruption.phase(f"{work} the training step"))

    def on_train_batch_begin(self, batch, logs=None):
        self._within_step = True

    def on_train_batch_end(self, batch, logs=None):
        self._compiling.close()
        interruption.set_has_to_finish(True)
        super().on_train_batch_end(batch, logs)

    def on_step(self, logs):
        self._within_step = False
        # All processes must take the same number of steps, or they deadlock.
        if self._has_peers and backend.processes_stop_at(self.step):
            self._note(self.signal_received or signal.SIGTERM)
        elif self._has_peers:
            return
        if self.signal_received is not None:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        # The last checkpoint is still to be saved; `__exit__` restores the handlers after it.
        if not self._entered:
            self._restore()

    def _note(self, number: int) -> None:
        self.signal_received = number
        interruption.note(number)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal_received is not None and number == signal.SIGINT:
            self._note(number)
            self._restore()
            raise KeyboardInterrupt
        self._note(number)
        if self._has_peers:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes
        # Keras stops after any batch. Inside a step with further batches, `on_step` stops it later.
        elif self.model is not None and not self._within_step:
            self.model.stop_training = True
        when = " after this step" if interruption.has_to_finish() else ""
        print(f"{signal.Signals(number).name}: stopping{when}", file=sys.stderr, flush=True)

    def _install(self) -> None:
        if not self._old_handlers and threading.current_thread() is threading.main_thread():
            # With several processes, JAX handles SIGTERM.
            signals = self.signals[1:] if self._has_peers else self.signals
            self._old_handlers = {number: signal.signal(number, self._handle) for number in signals}
            interruption.set_has_to_finish(self._has_peers)

    def _restore(self) -> None:
        self._compiling.close()
        interruption.set_has_to_finish(False)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}


class EMACallback(keras.callbacks.Callback):
    """Swaps in the EMA weights: `with ema.applied(): ...` evaluates, samples or exports with them.

    The weights are copied in both directions, so the raw weights are restored bit for bit. (Keras'
    `SwapEMAWeights` adds and subtracts on TensorFlow, which rounds.) The model must not be trained inside the
    block.

    Args:
        optimizer: has `ema_variables`, in the order of `trainable_variables`.
        trainable_variables: the model's.

    Attributes:
        swapped_in: whether the model currently has the EMA weights.

    Example:
        ```python
        ema = keras_sd.EMACallback(optimizer, objective.trainable_variables)
        objective.fit(batches, steps_per_epoch=1000, callbacks=[ema])
        with ema.applied():
            images = keras_sd.sample_images(denoiser, 16)
        ```
    """

    _copy = staticmethod(ops.copy)

    def __init__(self, optimizer: Any, trainable_variables: Iterable[Any]) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._variables = list(trainable_variables)
        self.swapped_in = False

    @property
    def averages(self) -> list[Any]:
        """The EMA weights, in the order of the trainable variables."""
        return self._optimizer.ema_variables

    @contextmanager
    def applied(self) -> Iterator[None]:
        backend.sync_state(self.model)
        raw = [self._copy(variable) for variable in self._variables]
        before, self.swapped_in = self.swapped_in, True
        try:
            for variable, average in zip(self._variables, self.averages, strict=True):
                # A copy: `evaluate` on JAX donates the buffers of the model's variables, and assigning alone
                # would make the average's buffer one of them.
                variable.assign(self._copy(average))
            yield
        finally:
            backend.sync_state(self.model)
            for variable, value in zip(self._variables, raw, strict=True):
                variable.assign(value)
            self.swapped_in = before
