"""The training loop: Keras' `fit()` on an objective, with checkpoints, exact resumption and evaluations."""

import contextlib
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_sd import backend, interruption
from keras_sd.arguments import shown
from keras_sd.data.sources import batches
from keras_sd.errors import UserError
from keras_sd.models.gradient_checkpointing import enable_gradient_checkpointing, recomputing_layers
from keras_sd.models.parameters import parameter_paths
from keras_sd.progress import print_above_bars
from keras_sd.training import distribution, post_hoc_ema, resuming
from keras_sd.training.callbacks import (
    CheckpointCallback,
    EMACallback,
    PhaseCallback,
    ProgressCallback,
    StepCallbackList,
    StopOnNonFiniteLoss,
    StopOnSignal,
)
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.training.data_faults import fault_of_data, save_before_fault
from keras_sd.training.evaluation_schedule import (
    CompilationCallback,
    Evaluation,
    EvaluationCallback,
    EvaluationSchedule,
)
from keras_sd.training.logs import MetricsLog, SilentLog
from keras_sd.training.objectives import Objective
from keras_sd.training.offloaded_ema import OffloadedEMACallback
from keras_sd.training.optimizers import log_figures, make_optimizer
from keras_sd.training.rate_factors import RateFactors
from keras_sd.training.run_folder import (
    MODEL,
    RunRecord,
    claim_output_dir,
    is_described,
    release_output_dir,
    restore_folder,
    write_description,
    write_whole_folder,
)
from keras_sd.training.settings import MAY_CHANGE, PRECISIONS, Settings
from keras_sd.training.slices import Sliced
from keras_sd.training.trackers import checked_trackers
from keras_sd.weights.rules import weights_fingerprint

__all__ = ["PRECISIONS", "Settings", "Trainer"]


class Trainer:
    """Trains one objective under one run folder.

    Args:
        objective: the network and its loss (`training.losses`).
        settings: `Settings`.
        identity: JSON values that identify the run; a checkpoint with other values is rejected.

    Raises:
        UserError: an argument is of another class, or as `Checkpoints` and `training.distribution`.

    Example:
        ```python
        objective = keras_sd.DiffusionObjective(unet, keras_sd.NoiseSchedule(scheduler_config))
        settings = keras_sd.Settings("runs/mine", max_train_steps=1000, train_batch_size=8)
        trainer = keras_sd.Trainer(objective, settings, {"data": "my images, version 1"})
        trainer.run(source, draw)  # `draw(example, generator)` makes one of a batch
        ```
    """

    def __init__(self, objective: keras.Model, settings: Settings, identity: dict[str, Any]) -> None:
        for name, value, kind in (("objective", objective, Objective), ("settings", settings, Settings)):
            if not isinstance(value, kind):
                raise UserError(f"{name} {shown(value)}: not of class {kind.__name__}; give one")
        try:
            json.dumps(identity, sort_keys=True)
            is_json = isinstance(identity, dict)
        except (TypeError, ValueError):
            is_json = False
        if not is_json:
            raise UserError(f"identity {shown(identity)}: no dictionary of JSON values; give one")
        self.objective = objective
        self.settings = settings
        # A plan writes nothing.
        self.is_writer = backend.process_index() == 0 and backend.plan() is None
        if backend.plan() is None:
            claim_output_dir(settings.output_dir, settings.resume_from_checkpoint, lock=self.is_writer)
        if is_described():  # started by a command that can be repeated
            interruption.set_run_folder(settings.output_dir, settings.resume_from_checkpoint)
        rates = RateFactors(objective, settings)
        distribution.split_weights(objective)
        if settings.offload_ema and any(map(backend.is_split, objective.trainable_variables)):
            raise UserError(
                "offload_ema True: needs all weights in each process, and they are split among "
                f"{backend.process_count()}; leave it out"
            )
        # A checkpoint does not hold the frozen weights, only their fingerprint.
        frozen = weights_fingerprint(objective, left_out=objective.trainable_variables)
        identity = {**identity, **settings.identity(), "frozen": frozen}
        self.checkpoints = Checkpoints(
            settings.output_dir, identity, settings.checkpoints_total_limit, may_change=MAY_CHANGE
        )
        self.snapshots = None
        if settings.post_hoc_ema:
            self.snapshots = Checkpoints(settings.output_dir / post_hoc_ema.FOLDER, identity)
        if any(map(backend.is_split, objective.trainable_variables)):
            self.checkpoints.check_shared()
        self.optimizer = make_optimizer(settings)
        if settings.post_hoc_ema:
            self.optimizer.post_hoc_gammas = tuple(map(post_hoc_ema.gamma_of, post_hoc_ema.SIGMAS))
        self.optimizer.rate_factors, self.optimizer.rate_figures = rates.factors, rates.figures
        if settings.gradient_checkpointing:
            if not recomputing_layers(objective):
                raise UserError("gradient_checkpointing: this model has no blocks for it; leave it out")
            enable_gradient_checkpointing(objective)
        # In float16 Keras wraps the optimizer in a loss-scaling one.
        objective.compile(optimizer=self.optimizer, jit_compile=settings.jit_compile)
        log_figures(objective, self.optimizer)
        with self._with_memory_advice():
            # Variables created inside the first traced step would make TensorFlow trace it twice.
            objective.optimizer.build(objective.trainable_variables)
            self.ema = self._make_average()
        self.step = self._first_batch = 0
        if settings.resume_from_checkpoint is not None:
            self._resume()
        self._resumed_step = self.step
        if self.is_writer:
            write_description(settings.output_dir)
        self._record = RunRecord(settings.output_dir, self.step)
        self._schedules: list[EvaluationSchedule] = []
        self.log = self._make_log(identity) if self.is_writer else SilentLog(self.step)

    def _make_log(self, identity):
        settings = self.settings
        of_wandb = {
            "project": settings.tracker_project_name or "keras-sd",
            "name": settings.wandb_run_name,
            "config": identity,
        }
        trackers = checked_trackers(settings.report_to)
        return MetricsLog(settings.output_dir, self.step, trackers=trackers, tracker_options=of_wandb)

    def _make_average(self):
        variables = self.objective.trainable_variables
        if self.settings.offload_ema:
            return OffloadedEMACallback(self.optimizer, variables, self.settings.ema_decay)
        return EMACallback(self.optimizer, variables)

    def _state(self):
        """Return all variables that the run changes as groups of name -> variable.

        Names are the same in every process. EMA weights in host memory are arrays.
        """
        names = {id(parameter.variable): parameter.name for parameter in parameter_paths(self.objective)}
        averages, figures = self.optimizer.ema_variables, self.optimizer.figures.values()
        post_hoc = self.optimizer.post_hoc_variables
        left_out = {id(variable) for variable in itertools.chain(averages, figures, *post_hoc)}
        trained = [names[id(variable)] for variable in self.objective.trainable_variables]
        # Keras' names of an optimizer's variables depend on the process, so they are named by position.
        others = [variable for variable in self.objective.optimizer.variables if id(variable) not in left_out]
        return {
            "weights": dict(zip(trained, self.objective.trainable_variables, strict=True)),
            "ema": dict(zip(trained, self.ema.averages, strict=True)),
            **{
                post_hoc_ema.group_of(sigma): dict(zip(trained, variables, strict=True))
                for sigma, variables in zip(post_hoc_ema.SIGMAS, post_hoc, strict=False)
            },
            "optimizer": {f"{index:05}": variable for index, variable in enumerate(others)},
        }

    def gather_state(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Copy the state to the host; return `(groups, position)` for a checkpoint.

        A tensor of which this process has no more than slices is a `slices.Sliced` of them.
        """
        groups = {
            group: {name: _held(variable) for name, variable in variables.items()}
            for group, variables in self._state().items()
        }
        settings = self.settings
        done = self.log.step - self._resumed_step
        batch = self._first_batch + done * settings.gradient_accumulation_steps
        return groups, {"batch": batch, "examples": batch * settings.train_batch_size}

    def save_snapshot(self, step: int, groups: dict[str, Any]) -> None:
        """Save the power-function averages of a checkpoint's groups where they stay."""
        dtype = self.settings.post_hoc_ema
        if self.snapshots is None:
            return
        names = map(post_hoc_ema.group_of, post_hoc_ema.SIGMAS)
        self.snapshots.save(
            step,
            {name: post_hoc_ema.narrowed(groups[name], dtype) for name in names},
            {post_hoc_ema.UPDATES: int(self.optimizer.iterations)},
        )

    def _resume(self):
        """Load the state of a checkpoint, and print its step and which settings have changed."""
        path = self.checkpoints.resolve(self.settings.resume_from_checkpoint)
        checkpoint = self.checkpoints.load(path)
        state = self._state()
        resuming.fit_state(path, checkpoint, state, self.objective.optimizer, self.optimizer, self.settings)
        for group, variables in state.items():
            for name, variable in variables.items():
                value = checkpoint.groups[group][name]
                if isinstance(variable, np.ndarray):
                    variable[...] = value
                else:
                    variable.assign(value)
        self.step = checkpoint.step
        if self.snapshots is not None:
            self.snapshots.resume_after(self.step, path)
        self._first_batch = resuming.first_batch(checkpoint, self.settings)
        if self.is_writer and self.step < self.settings.max_train_steps:
            print(resuming.describe(checkpoint, self.settings), file=sys.stderr, flush=True)

    def run(
        self,
        source: Any,
        draw: Callable[..., dict[str, Any]],
        *,
        repeats: int | None = None,
        make_evaluation: Callable[[Any], Callable[[int], object]] | None = None,
        make_validation: Callable[[Any], Callable[[int], object]] | None = None,
        prepare_export: Callable[[], object] | None = None,
        export: Callable[[Path], object] | None = None,
    ) -> bool:
        """Train to `max_train_steps`.

        After the last step come a checkpoint, the export and an evaluation, in this order, so that a failure
        loses as little as possible. A resumed run makes up for an export or evaluation that is missing.

        Args:
            source, draw, repeats: as in `data.sources.batches`. An attribute `buckets` of the source is the
                number of each example's bucket; the step is compiled once for each bucket.
            make_evaluation: `make_evaluation(trainer)` returns `evaluate(step)`, which is called every
                `evaluation_steps` and at the end, and with `sample_at_first` before the first step. It is
                called before the first evaluation; with `evaluation_steps` 0 there is none. A failing
                evaluation is a warning.
            make_validation: the same for `validation_steps`; also called before the first step.
            prepare_export: called in every process before the export, with the EMA weights swapped in.
            export: `export(folder)` writes the model in one process, with the EMA weights swapped in; the
                folder becomes `output_dir/model` once it is complete.

        Returns:
            Whether training reached `max_train_steps`. A process that plans (`backend.start_plan`) compiles
            the programs of a step and of an evaluation, and returns False.

        Raises:
            UserError: the loss is not finite, an example cannot be read (the steps before are saved), no
                checkpoint can be written, or memory is not sufficient.
        """
        settings = self.settings
        if backend.plan() is not None:
            self._plan(source, draw, repeats, make_evaluation)
            return False
        self.objective.on_compiled = functools.partial(self._tell_memory, source)
        self._schedules = [
            EvaluationSchedule(
                self, make_validation, self._record, "validated", "validation_steps", at_first=True
            ),
            EvaluationSchedule(
                self,
                make_evaluation,
                self._record,
                "evaluated",
                "evaluation_steps",
                at_first=settings.sample_at_first,
            ),
        ]
        try:
            with self._with_memory_advice(source), StopOnSignal() as stop:
                if self.step < settings.max_train_steps:
                    for schedule in self._schedules:
                        if stop.signal_received is None:
                            schedule.run_if_due(self.step)
                    if stop.signal_received is None:
                        self._fit(source, draw, repeats, self._callbacks(stop))
                if self.step >= settings.max_train_steps and stop.signal_received is None:
                    did_more = self._finish(prepare_export, export)
                    if self._resumed_step == self.step and not did_more and self.is_writer:
                        warnings.warn(
                            f"{settings.output_dir}: complete, as step {self.step} is the last; give a "
                            "larger `max_train_steps` to train on",
                            stacklevel=2,
                        )
        finally:
            for schedule in self._schedules:
                schedule.cancel_compilation()
            self.log.close()
            release_output_dir(settings.output_dir)
        return self.step >= settings.max_train_steps and stop.signal_received is None

    def _batches(self, source, draw, repeats, on_fault=None):
        """Return the training batches from where the run goes on."""
        return batches(
            source,
            batch_size=self.settings.train_batch_size,
            seed=self.settings.seed,
            draw=draw,
            start=self._first_batch,
            repeats=repeats,
            buckets=getattr(source, "buckets", None),
            process_index=backend.process_index(),
            process_count=backend.process_count(),
            on_fault=on_fault,
        )

    def _plan(self, source, draw, repeats, make_evaluation):
        """Compile the step for the first batch, and the programs of an evaluation, and run neither."""
        batch = next(iter(self._batches(source, draw, repeats)))
        if hasattr(source, "encode_batch"):
            batch = source.encode_batch(batch)
        shapes = [array.shape for name, array in batch.items() if name in ("samples", "images")]
        backend.plan().facts = {
            "batch_size": self.settings.train_batch_size,
            "sample_shape": list(shapes[0][1:]) if shapes else [],
            "mixed_precision": self.settings.mixed_precision,
        }
        self.objective.enter_phase_of(0)
        backend.plan_step("training step", self.objective, batch, distribution.work_parts())
        if self.settings.evaluation_steps and isinstance(make_evaluation, Evaluation):
            make_evaluation.compile()
        backend.plan().compile_pending()

    def _fit(self, source, draw, repeats, callbacks):
        settings = self.settings
        accumulation = settings.gradient_accumulation_steps
        buckets = getattr(source, "buckets", None)
        faults: list[UserError] = []
        training_batches = self._batches(source, draw, repeats, faults.append)
        if hasattr(source, "encode_batches"):  # a source that is not encoded yet
            training_batches = source.encode_batches(training_batches)
        self.objective.enter_phase_of(self.step)
        try:
            if buckets is not None and len(np.unique(buckets)) > 1:
                training_batches = backend.batches_of_shapes(training_batches)
            self.objective.fit(
                training_batches,
                steps_per_epoch=(settings.max_train_steps - self.step) * accumulation,
                verbose=0,
                shuffle=False,  # Grain has shuffled already
                callbacks=StepCallbackList(callbacks, add_history=True, model=self.objective),
            )
        except Exception as error:
            fault = fault_of_data(error, faults)
            if fault is None:
                raise
            raise save_before_fault(fault, self.checkpoints, callbacks, self.optimizer) from error
        self.step = self.log.step

    def _finish(self, prepare_export, export):
        """Export and evaluate after the last step, where not done before; return whether one was due."""
        export_is_due = export is not None and not self._is_exported()
        if export_is_due:
            with interruption.interruptible(), interruption.phase("exporting the model"), self.ema.applied():
                if prepare_export is not None:
                    prepare_export()
                with backend.whole_on_host(self.objective.variables, keep=self.is_writer):
                    if self.is_writer:
                        write_whole_folder(self.settings.output_dir / MODEL, export)
                        self._record.write("exported", self.step)
                        print(f"saved: {self.settings.output_dir / MODEL}", file=sys.stderr, flush=True)
        return export_is_due | any([schedule.run_if_due(self.step) for schedule in self._schedules])

    def _is_exported(self):
        model = self.settings.output_dir / MODEL
        if self.is_writer:
            restore_folder(model)
        return self._record.last("exported") == self.step and model.is_dir()

    def _tell_memory(self, source, memory):
        """Print the memory of a step that was compiled, and warn if the device has less."""
        if not self.is_writer:
            return
        total, temporary = memory.total / 2**30, memory.temporaries / 2**30
        print_above_bars(
            f"memory of the training step: {total:.2f} GiB on each device, {total - temporary:.2f} of them "
            f"weights, state and batch, {temporary:.2f} while it runs"
        )
        available = backend.device_bytes()
        if available is not None and memory.total > available:
            warnings.warn(
                f"the training step needs {total:.1f} GiB, and the device has "
                f"{available / 2**30:.1f}; use {self._memory_advice(source)}",
                stacklevel=2,
            )

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of an evaluation, and print them.

        Args:
            step: the step that was evaluated.
            figures: name -> number.
        """
        self.log.log_scalars(step, figures)
        if self.is_writer and figures:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print_above_bars(f"evaluated step {step}: {shown}")

    @contextlib.contextmanager
    def _with_memory_advice(self, source=None):
        """Turn out-of-memory errors inside the block into a UserError that names the arguments that help."""
        try:
            yield
        except Exception as error:
            if not backend.is_out_of_memory(error):
                raise
            raise UserError(f"training: out of memory; use {self._memory_advice(source)}") from error

    def _memory_advice(self, source):
        return ", or ".join(self._memory_savers(source)) or "a smaller model or smaller images"

    def _memory_savers(self, source):
        """Yield further arguments that save device memory, those with the least cost first."""
        settings = self.settings
        if settings.mixed_precision == "no":
            yield "`mixed_precision='bf16'`"
        if not settings.gradient_checkpointing and recomputing_layers(self.objective):
            yield "`gradient_checkpointing=True`"
        whole = isinstance(keras.distribution.distribution(), keras.distribution.DataParallel)
        if whole:
            yield "`distribution='fsdp'`"
        if hasattr(source, "encode_batches"):  # the VAE runs beside the step
            yield "`cache_latents='disk'`"
        if settings.train_batch_size > 1:
            size = settings.train_batch_size
            parts = next(divisor for divisor in range(2, size + 1) if size % divisor == 0)
            accumulation = settings.gradient_accumulation_steps * parts
            yield f"`train_batch_size={size // parts}` `gradient_accumulation_steps={accumulation}`"
        if not settings.offload_ema and backend.has_accelerator():
            yield "`offload_ema=True`"
        framing = getattr(source, "framing", None)
        if framing is not None:  # all buckets have its area, so their number matters little
            yield f"a `resolution` below {framing.resolution}"

    def _callbacks(self, stop):
        """Return the callbacks in the order in which each step calls them."""
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
                before_save=self.save_snapshot,
                total_steps=settings.max_train_steps,
            ),
            *([progress] if self.is_writer else []),
            PhaseCallback(self.objective, self.step),
            *([CompilationCallback(self._schedules, self.step)] if backend.compiles_ahead() else []),
        ]
        callbacks += [
            EvaluationCallback(schedule, progress, self.step, settings.max_train_steps)
            for schedule in self._schedules
            if schedule.every
        ]
        for callback in callbacks:
            callback.batches_per_step = settings.gradient_accumulation_steps
        return callbacks


def _held(variable):
    """Return what this process holds of a variable: the array, or `Sliced` where others hold the rest."""
    if backend.is_split(variable):
        return Sliced(tuple(variable.shape), tuple(backend.own_slices(variable)))
    return backend.to_numpy(variable)
