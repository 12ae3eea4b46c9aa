"""Optimizers with EMA weights inside the compiled step, on every backend.

Keras has a Lion and an Adafactor of its own. They are not used: they update variable by variable, cannot keep
the warmed-up EMA weights, and differ from what the field compares with. Keras' Adafactor has another decay
rate and another clipping than transformers', and its Lion applies the weight decay to all variables first.
"""

import keras
from keras import ops

from keras_sd.training.learning_rate import LearningRate
from keras_sd.training.optimizers.adafactor import Adafactor
from keras_sd.training.optimizers.adamw import AdamW
from keras_sd.training.optimizers.adamw8bit import AdamW8bit
from keras_sd.training.optimizers.base import EMAOptimizer, PerUpdate, young_decay
from keras_sd.training.optimizers.lion import Lion
from keras_sd.training.optimizers.prodigy import Prodigy

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "EMAOptimizer",
    "Lion",
    "PerUpdate",
    "Prodigy",
    "log_figures",
    "make_optimizer",
    "young_decay",
]

_CLASSES = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "prodigy": Prodigy,
}
# Names of settings and, where they differ, of the optimizers' arguments.
_ARGUMENTS = {
    "adam_beta1": "beta_1",
    "adam_beta2": "beta_2",
    "adam_epsilon": "epsilon",
    "lion_beta1": "beta_1",
    "lion_beta2": "beta_2",
    "adafactor_beta1": "beta_1",
    "prodigy_beta3": "beta_3",
    "adam_weight_decay": "weight_decay",
}


def make_optimizer(settings):
    """Return the optimizer of a run's `Settings`."""
    schedule = LearningRate(
        1.0 if settings.learning_rate is None else settings.learning_rate,
        "constant" if settings.learning_rate is None else settings.lr_scheduler,
        settings.max_train_steps,
        0 if settings.learning_rate is None else min(settings.lr_warmup_steps, settings.max_train_steps),
        settings.lr_num_cycles or 1,
        settings.lr_power or 1.0,
    )
    accumulation = settings.gradient_accumulation_steps
    options = {
        _ARGUMENTS.get(name, name.removeprefix(f"{settings.optimizer}_")): value
        for name, value in settings.optimizer_options().items()
    }
    return _CLASSES[settings.optimizer](
        PerUpdate(schedule, accumulation),
        ema_decay=None if settings.offload_ema else settings.ema_decay,
        global_clipnorm=settings.max_grad_norm or None,
        gradient_accumulation_steps=accumulation if accumulation > 1 else None,
        **options,
    )


def log_figures(objective, optimizer):
    """Add learning rate, gradient norm and the optimizer's other figures to the logs of a training step.

    They come out of the compiled step beside the loss. The norm is the one before clipping.

    Args:
        objective: a compiled Keras model.
        optimizer: the `EMAOptimizer` in it, perhaps inside a loss-scaling one.
    """
    train_step = objective.train_step

    def step(*arguments):
        if keras.backend.backend() != "jax":
            logs = train_step(*arguments)
            return logs | {name: ops.convert_to_tensor(figure) for name, figure in optimizer.figures.items()}
        logs, state = train_step(*arguments)
        values = dict(zip(map(id, objective.optimizer.variables), state[2], strict=True))
        return logs | {name: values[id(figure)] for name, figure in optimizer.figures.items()}, state

    objective.train_step = step
