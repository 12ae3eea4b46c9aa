"""Keeps the EMA weights in host memory, for devices without room for them."""

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.training.callbacks import EMACallback, StepCallback
from keras_sd.training.optimizers import young_decay


def _host_copy(values):
    return np.array(backend.to_numpy(values))


class OffloadedEMACallback(EMACallback, StepCallback):
    """Updates the EMA weights after each step like `optimizers.EMAOptimizer`, but in NumPy arrays.

    Every step copies the trained weights to the host, which is slow.

    Args:
        optimizer: an `EMAOptimizer` without EMA weights.
        trainable_variables: the model's; the EMA weights start as copies of them.
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
        backend.sync_state(self.model)
        before, self._updates = self._updates, int(self._optimizer.iterations)
        if self._updates == before:  # a step whose float16 gradients overflowed has changed no weight
            return
        change = np.float32(1.0 - min(self._decay, young_decay(before)))
        for average, variable in zip(self._averages, self._variables, strict=True):
            average -= change * (average - ops.convert_to_numpy(variable))
