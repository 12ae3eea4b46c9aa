"""The training loop: Keras' `fit()` on an objective, resumable to the bit, measured on the way."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import keras
import numpy as np

from keras_sd import backend
from keras_sd.data.datasets import batches
from keras_sd.errors import UserError
from keras_sd.models.recomputation import enable_gradient_checkpointing, recomputing_layers
from keras_sd.training import distribution
from keras_sd.training.callbacks import (
    CheckpointCallback,
    EMACallback,
    MetricsLog,
    ProgressCallback,
    SilentLog,
    StepCallback,
    StepCallbackList,
    StopOnNonFiniteLoss,
    StopOnSignal,
    sync_state,
)
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.training.offloaded_average import OffloadedEMACallback
from keras_sd.training.optimizer import AdamW, PerUpdate
from keras_sd.weights.rules import parameter_paths

PRECISIONS = {"no": "float32", "fp16": "mixed_float16", "bf16": "mixed_bfloat16"}
SCHEDULES = ("cosine", "constant")

# Settings that may differ between a run and its resumption: they change no number in it but by rounding.
_MAY_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "evaluation_steps",
    "jit_compile",
    "gradient_checkpointing",
    "offload_ema",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train, whatever is trained. Names are those of diffusers' training scripts.

    A step is one update of the weights, made of `gradient_accumulation_steps` batches.
    """

    output_dir: Path
    max_train_steps: int = 1000
    train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    mixed_precision: str = "no"
    jit_compile: bool = True
    gradient_checkpointing: bool = False
    offload_ema: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    evaluation_steps: int = 1000

    def __post_init__(self):
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "evaluation_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: too small; give at least 1")
        if self.mixed_precision not in PRECISIONS:
            raise UserError(f"mixed_precision {self.mixed_precision!r}: unknown; use {', '.join(PRECISIONS)}")
        if self.lr_scheduler not in SCHEDULES:
            raise UserError(f"lr_scheduler {self.lr_scheduler!r}: unknown; use {', '.join(SCHEDULES)}")

    def use_precision(self):
        """Sets Keras' precision policy; call it before the models are made."""
        keras.config.set_dtype_policy(PRECISIONS[self.mixed_precision])

    def identity(self):
        """What a checkpoint must share with the run that resumes it, as JSON values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _MAY_CHANGE}


class EvaluationCallback(StepCallback):
    """Calls `evaluate(step)` every `every` steps and after the last one, with all variables in place."""

    def __init__(self, evaluate, progress, *, every, initial_step, total_steps):
        super().__init__(initial_step)
        self.evaluate = evaluate
        self.progress = progress
        self.every = every
        self.total_steps = total_steps

    def on_step(self, logs):
        if self.step % self.every == 0 or self.step == self.total_steps:
            sync_state(self.model)
            with self.progress.paused():
                self.evaluate(self.step)


def _fingerprint(objective):
    """The SHA-256 of the weights that stay frozen, which a checkpoint does not hold; None without any."""
    trained = {id(variable) for variable in objective.trainable_variables}
    frozen = [parameter for parameter in parameter_paths(objective) if id(parameter.variable) not in trained]
    digest = hashlib.sha256()
    for parameter in frozen:
        digest.update(parameter.name.encode())
        digest.update(np.ascontiguousarray(backend.to_numpy(parameter.variable)).view(np.uint8))
    return digest.hexdigest() if frozen else None


class Trainer:
    """Trains one objective under one run folder.

    Args:
        objective: the network and its loss (`training.losses`).
        settings: `Settings`.
        identity: JSON values that say what is trained on what; a checkpoint of another is refused.
    """

    def __init__(self, objective, settings, identity):
        self.objective = objective
        self.settings = settings
        distribution.split_weights(objective)
        identity = {**identity, **settings.identity(), "frozen": _fingerprint(objective)}
        self.checkpoints = Checkpoints(settings.output_dir, identity, settings.checkpoints_total_limit)
        self.optimizer = self._make_optimizer()
        if settings.gradient_checkpointing:
            if not recomputing_layers(objective):
                raise UserError(
                    "--gradient-checkpointing: this model has no blocks for it; leave the flag out"
                )
            enable_gradient_checkpointing(objective)
        # In float16 Keras wraps the optimizer in one that scales the loss.
        objective.compile(optimizer=self.optimizer, jit_compile=settings.jit_compile)
        with self._with_memory_advice():
            # Variables born inside the first traced step would make TensorFlow trace it twice.
            objective.optimizer.build(objective.trainable_variables)
            self.ema = self._make_average()
        self.step = self._resume() if settings.resume_from_checkpoint else self._begin()
        self.is_writer = backend.process_index() == 0
        self.log = MetricsLog(settings.output_dir, self.step) if self.is_writer else SilentLog(self.step)

    def _make_optimizer(self):
        settings = self.settings
        warmup = min(settings.lr_warmup_steps, settings.max_train_steps)
        decay = settings.max_train_steps - warmup
        # The constant schedule is the cosine one that ends where it began.
        learning_rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else settings.learning_rate,
            decay_steps=max(decay, 1),
            alpha=1.0 if settings.lr_scheduler == "constant" else 0.0,
            warmup_target=settings.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
        accumulation = settings.gradient_accumulation_steps
        return AdamW(
            PerUpdate(learning_rate, accumulation),
            ema_decay=None if settings.offload_ema else settings.ema_decay,
            beta_1=settings.adam_beta1,
            beta_2=settings.adam_beta2,
            weight_decay=settings.adam_weight_decay,
            global_clipnorm=settings.max_grad_norm,
            gradient_accumulation_steps=accumulation if accumulation > 1 else None,
        )

    def _make_average(self):
        variables = self.objective.trainable_variables
        if self.settings.offload_ema:
            return OffloadedEMACallback(self.optimizer, variables, self.settings.ema_decay)
        return EMACallback(self.optimizer, variables)

    def _state(self):
        """What the run changes as groups of name -> variable (or, of averages in host memory, array), named
        alike in every process."""
        names = {id(parameter.variable): parameter.name for parameter in parameter_paths(self.objective)}
        averages = {id(variable) for variable in self.optimizer.ema_variables}
        trained = [names[id(variable)] for variable in self.objective.trainable_variables]
        # Keras numbers an optimizer's variables after the layers of its process, so they go by position.
        others = [variable for variable in self.objective.optimizer.variables if id(variable) not in averages]
        return {
            "weights": dict(zip(trained, self.objective.trainable_variables, strict=True)),
            "ema": dict(zip(trained, self.ema.averages, strict=True)),
            "optimizer": {f"{index:05}": variable for index, variable in enumerate(others)},
        }

    def gather_state(self):
        """Copies the state to the host: `(groups, position)` as a checkpoint takes them."""
        groups = {
            group: {name: backend.to_numpy(variable) for name, variable in variables.items()}
            for group, variables in self._state().items()
        }
        return groups, {"batch": self.log.step * self.settings.gradient_accumulation_steps}

    def _begin(self):
        if self.checkpoints.latest() is not None:
            raise UserError(
                f"{self.settings.output_dir}: holds checkpoints of an earlier run; "
                "go on with --resume-from-checkpoint latest or choose another --output-dir"
            )
        return 0

    def _resume(self):
        path = self.checkpoints.resolve(self.settings.resume_from_checkpoint)
        checkpoint = self.checkpoints.load(path)
        for group, variables in self._state().items():
            for name, variable in variables.items():
                value = checkpoint.groups[group][name]
                if isinstance(variable, np.ndarray):
                    variable[...] = value
                else:
                    variable.assign(value)
        return checkpoint.step

    def run(self, source, draw, *, repeats=None, evaluate=None):
        """Trains to `max_train_steps` and returns whether it got there.

        Args:
            source, draw, repeats: examples and what is drawn for each, as `data.datasets.batches` takes them.
            evaluate: `evaluate(step)`, called with the weights in place every `evaluation_steps`.

        Raises:
            UserError: the loss is not finite, no checkpoint can be written, or memory is not enough.
        """
        settings = self.settings
        remaining = settings.max_train_steps - self.step
        if remaining <= 0:
            return True
        training_batches = batches(
            source,
            batch_size=settings.train_batch_size,
            seed=settings.seed,
            draw=draw,
            start=self.step * settings.gradient_accumulation_steps,
            repeats=repeats,
            process_index=backend.process_index(),
            process_count=backend.process_count(),
        )
        with self._with_memory_advice(), StopOnSignal() as stop:
            callbacks = self._callbacks(stop, evaluate)
            self.objective.fit(
                training_batches,
                steps_per_epoch=remaining * settings.gradient_accumulation_steps,
                verbose=0,
                shuffle=False,  # Grain has done it
                callbacks=StepCallbackList(callbacks, add_history=True, model=self.objective),
            )
        self.step = self.log.step
        return self.step == settings.max_train_steps

    def export(self, write):
        """Calls `write(folder)` with the averaged weights in place, in the process that writes the files."""
        with self.ema.applied():
            if self.is_writer:
                write(self.settings.output_dir / "model")

    @contextlib.contextmanager
    def _with_memory_advice(self):
        """Turns what is raised inside for want of memory into a line that names the flags that help."""
        try:
            yield
        except Exception as error:
            if not backend.is_out_of_memory(error):
                raise
            flags = list(self._memory_savers()) or ["a smaller model or smaller images"]
            raise UserError(f"training: out of memory; take {', or '.join(flags)}") from error

    def _memory_savers(self):
        """The flags that are off and spare memory on the device, the cheapest ones first."""
        settings = self.settings
        if settings.mixed_precision == "no":
            yield "--mixed-precision bf16"
        if not settings.gradient_checkpointing and recomputing_layers(self.objective):
            yield "--gradient-checkpointing"
        if settings.train_batch_size > 1:
            size = settings.train_batch_size
            parts = next(divisor for divisor in range(2, size + 1) if size % divisor == 0)
            accumulation = settings.gradient_accumulation_steps * parts
            yield f"--train-batch-size {size // parts} --gradient-accumulation-steps {accumulation}"
        if not settings.offload_ema and backend.has_accelerator():
            yield "--offload-ema"

    def _callbacks(self, stop, evaluate):
        """The callbacks in the order in which each step calls them."""
        settings = self.settings
        guard = StopOnNonFiniteLoss(self.checkpoints, self.step)
        progress = ProgressCallback(
            settings.max_train_steps,
            self.step,
            settings.train_batch_size * settings.gradient_accumulation_steps,
        )
        callbacks = [
            stop,
            self.ema,
            self.log,
            guard,
            CheckpointCallback(
                self.checkpoints,
                self.gather_state,
                settings.checkpointing_steps,
                self.step,
                flush_before=[self.log, guard],
            ),
            *([progress] if self.is_writer else []),
        ]
        if evaluate is not None:
            callbacks.append(
                EvaluationCallback(
                    evaluate,
                    progress,
                    every=settings.evaluation_steps,
                    initial_step=self.step,
                    total_steps=settings.max_train_steps,
                )
            )
        for callback in callbacks:
            callback.batches_per_step = settings.gradient_accumulation_steps
        return callbacks
