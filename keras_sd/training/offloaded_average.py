"""The exponential moving average (EMA) of the weights in host memory, where the device has no room for it."""

import numpy as np
from keras import ops

from keras_sd.training.callbacks import EMACallback, StepCallback, sync_state
from keras_sd.training.optimizer import young_decay


def _host_copy(values):
    return np.array(ops.convert_to_numpy(values))


class OffloadedEMACallback(EMACallback, StepCallback):
    """Averages the weights after each step as `optimizer.AdamW` does, in NumPy arrays.

    Every step copies the trained weights to the host, which takes its time.

    Args:
        optimizer: an `AdamW` without averages of its own.
        trainable_variables: of the model; the averages begin as copies of them.
        decay: the largest decay.
    """

    _copy = staticmethod(_host_copy)

    def __init__(self, optimizer, trainable_variables, decay):
        super().__init__(optimizer, trainable_variables)
        self._averages = [_host_copy(variable) for variable in self._variables]
        self._decay = decay
        self._updates = 0

    @property
    def averages(self):
        return self._averages

    def on_train_begin(self, logs=None):
        self._updates = int(self._optimizer.iterations)

    def on_step(self, logs):
        sync_state(self.model)
        before, self._updates = self._updates, int(self._optimizer.iterations)
        if self._updates == before:  # gradients that overflow in float16 leave the weights as they are
            return
        change = np.float32(1.0 - min(self._decay, young_decay(before)))
        for average, variable in zip(self._averages, self._variables, strict=True):
            average -= change * (average - ops.convert_to_numpy(variable))
