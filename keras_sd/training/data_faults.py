"""What a run does when its data fails on the way: it saves a checkpoint and says how to go on."""

from collections.abc import Iterable, Sequence

import keras

from keras_sd import backend, interruption
from keras_sd.errors import UserError
from keras_sd.training.checkpoints import Checkpoints


def fault_of_data(error: Exception, faults: Sequence[UserError]) -> UserError | None:
    """Return the fault of the data that an exception of `fit()` is about, or None.

    TensorFlow raises an exception of its own, with the text of the fault. Examples are read ahead, so there
    may be faults of which the exception is none.

    Args:
        error: the exception.
        faults: what `data.sources.batches` has reported.
    """
    return next((fault for fault in faults if str(fault) in str(error)), None)


def save_before_fault(
    fault: UserError,
    checkpoints: Checkpoints,
    callbacks: Iterable[keras.callbacks.Callback],
    optimizer: keras.optimizers.Optimizer,
) -> UserError:
    """Save the steps that were taken before an example could not be read; return the error to raise.

    With several processes nothing is saved, as the others wait for this one inside a step.

    Args:
        fault: the fault.
        checkpoints: those of the run.
        callbacks: of `fit()`; at the end of training they save a checkpoint.
        optimizer: without loss scaling.

    Raises:
        UserError: the state is not finite or cannot be saved.
    """
    if backend.process_count() == 1:
        # Examples of a step that was begun are seen again.
        backend.drop_partial_update(optimizer)
        for callback in callbacks:
            callback.on_train_end()
    last = checkpoints.last_good()
    if last is None:
        return UserError(f"{fault}; there is no checkpoint yet")
    command = interruption.command_to_resume()
    how = f"with: {command}" if command else "with `resume_from_checkpoint='latest'`"
    return UserError(f"{fault}; the steps before are in {last}; once that is mended, resume {how}")
