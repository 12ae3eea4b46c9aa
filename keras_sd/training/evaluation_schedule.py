"""When a run is evaluated: every so many steps, at its end, and perhaps before its first step."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras_sd import backend, interruption
from keras_sd.training.callbacks import ProgressCallback, StepCallback

_CORES_FOR_TWO_COMPILATIONS = 4


class Evaluation(NamedTuple):
    """How an evaluation is made, with what compiles its programs ahead.

    Attributes:
        make: `make(trainer)` returns `evaluate(step)`.
        compile: calls the programs of the evaluation with inputs of the same shapes, and has no other effect
            (`backend.CompilationAhead`).
    """

    make: Callable[[Any], Callable[[int], object]]
    compile: Callable[[], object]

    def __call__(self, trainer: Any) -> Callable[[int], object]:
        """Return `evaluate(step)`."""
        return self.make(trainer)


class EvaluationSchedule:
    """Calls an evaluation when it is due; a resumed run makes up for one that is missing.

    Args:
        trainer: the `Trainer`.
        make: `make(trainer)` returns `evaluate(step)`; it is called before the first evaluation. None for no
            evaluation. The programs of an `Evaluation` are compiled beside training.
        record: the `run_folder.RunRecord` of the run.
        name: what the record and messages call it.
        setting: the setting of `Settings` that says how many steps are between two evaluations, 0 for none.
        at_first: whether to evaluate before the first step, too.
    """

    def __init__(
        self,
        trainer: Any,
        make: Callable[[Any], Callable[[int], object]] | None,
        record: Any,
        name: str,
        setting: str,
        *,
        at_first: bool = False,
    ) -> None:
        self.every = 0 if make is None else getattr(trainer.settings, setting)
        self._trainer, self._make, self._record = trainer, make, record
        self._name, self._setting, self._at_first = name, setting, at_first
        self._evaluate = None
        self._ahead: backend.CompilationAhead | None = None

    def compile_ahead(self) -> None:
        """Start to compile the programs of the first evaluation in a thread (`backend.compiles_ahead`)."""
        is_needed = self._evaluate is None and self._ahead is None and isinstance(self._make, Evaluation)
        if is_needed and self.every:
            self._ahead = backend.CompilationAhead(self._make.compile)

    def cancel_compilation(self) -> None:
        """Compile no further programs ahead."""
        if self._ahead is not None:
            self._ahead.cancel()

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation at this step, the first or last of the process, is still due."""
        if not self.every or self._record.last(self._name) >= step:
            return False
        if step == 0:
            return self._at_first
        return step % self.every == 0 or step >= self._trainer.settings.max_train_steps

    def run_if_due(self, step: int) -> bool:
        """Evaluate at the first or last step of the process, if that is due; return whether it was."""
        is_due = self.is_due(step)
        if is_due:
            self(step)
        return is_due

    def __call__(self, step: int) -> None:
        """Evaluate; warn of a failure and continue."""
        is_validation = self._name == "validated"
        phase, noun = ("validating", "validation") if is_validation else ("evaluating", "evaluation")
        try:
            with interruption.interruptible(), interruption.phase(phase):
                if self._ahead is not None:
                    with interruption.phase("compiling the programs of evaluations"):
                        self._ahead.wait()
                if self._evaluate is None:
                    self._evaluate = self._make(self._trainer)
                self._evaluate(step)
        except Exception as error:
            if self._trainer.ema.swapped_in:  # the raw weights could not be restored; training cannot go on
                raise
            fault = "out of memory" if backend.is_out_of_memory(error) else _first_line(error)
            warnings.warn(
                f"{noun} at step {step}: failed ({fault}); training continues, `{self._setting}=0` "
                f"turns {noun}s off",
                stacklevel=2,
            )
        else:
            if self._trainer.is_writer:
                self._record.write(self._name, step)


class CompilationCallback(StepCallback):
    """Compiles the programs of evaluations beside training.

    With few cores that begins after the first step, whose own compilation would only be slower.
    """

    def __init__(self, schedules: Sequence[EvaluationSchedule], initial_step: int) -> None:
        super().__init__(initial_step)
        self.schedules = schedules

    def on_train_begin(self, logs=None):
        if (os.cpu_count() or 1) >= _CORES_FOR_TWO_COMPILATIONS:
            self.on_step({})

    def on_step(self, logs):
        for schedule in self.schedules:
            schedule.compile_ahead()


class EvaluationCallback(StepCallback):
    """Evaluates by an `EvaluationSchedule` in a run, except at its last step, with all variables up to date.

    A run that was signalled to stop is not evaluated first; the evaluation follows when it is resumed.
    """

    def __init__(
        self, schedule: EvaluationSchedule, progress: ProgressCallback, initial_step: int, total_steps: int
    ) -> None:
        super().__init__(initial_step)
        self.schedule, self.progress, self.total_steps = schedule, progress, total_steps

    def on_step(self, logs):
        if self.step % self.schedule.every or self.step == self.total_steps or self.model.stop_training:
            return
        backend.sync_state(self.model)
        with self.progress.paused():
            self.schedule(self.step)


def _first_line(error):
    """Return the type and the message of an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
