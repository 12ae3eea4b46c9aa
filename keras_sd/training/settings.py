"""The training settings that all methods share, and which of them may change when a run is resumed."""

import dataclasses
import numbers
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from keras_sd.arguments import checked_path, shown
from keras_sd.errors import UserError
from keras_sd.training.learning_rate import SCHEDULES
from keras_sd.training.optimizer_options import OPTIONS, TITLES, default_learning_rate
from keras_sd.training.post_hoc_ema import DTYPES
from keras_sd.training.rate_factors import parse_block_factors
from keras_sd.training.trackers import checked_trackers

PRECISIONS = {"no": "float32", "fp16": "mixed_float16", "bf16": "mixed_bfloat16"}

# Settings that may change when a run is resumed; the run prints the changes and uses the new values.
MAY_CHANGE = (
    "learning_rate",
    "text_encoder_lr",
    "learning_rate_by_block",
    "max_grad_norm",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    # These change what a run leaves behind, and no weights.
    "checkpointing_steps",
    "checkpoints_total_limit",
    "evaluation_steps",
    "validation_steps",
    "post_hoc_ema",
    "report_to",
)
# Settings that change no result of a run, apart from rounding.
_CHANGES_NOTHING = {
    "output_dir",
    "resume_from_checkpoint",
    "sample_at_first",
    "tracker_project_name",
    "wandb_run_name",
    "jit_compile",
    "gradient_checkpointing",
    "offload_ema",
}

# Learning rates of parts of the model.
_OF_PARTS = ("text_encoder_lr", "learning_rate_by_block")

# Settings of one learning-rate schedule alone.
_OF_SCHEDULE = {"lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial"}

# Types of the settings, and their names in messages.
_TYPES = {
    bool: ((bool, np.bool_), "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}

# The smallest and the largest normal float32.
_SMALLEST, _LARGEST = (float(getattr(np.finfo("float32"), name)) for name in ("tiny", "max"))

_COUNT = (lambda value: value >= 1), "1 or more"
_SHARE = (lambda value: 0 <= value < 1), "a number from 0 to just below 1"
_POSITIVE = (lambda value: value > 0), "a number above 0"
_RANGE_OF = {
    "share": _SHARE,
    "positive": _POSITIVE,
    "not negative": ((lambda value: value >= 0), "0 or more"),
    "factor": ((lambda value: value >= 1), "1 or more"),
}
_RANGES = {
    "max_train_steps": _COUNT,
    "train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _POSITIVE,
    "text_encoder_lr": _POSITIVE,
    "lr_warmup_steps": ((lambda value: value >= 0), "0 or more"),
    "lr_num_cycles": _COUNT,
    "lr_power": _POSITIVE,
    **{name: _RANGE_OF[option.range] for name, option in OPTIONS.items() if option.range},
    "max_grad_norm": ((lambda value: value >= 0), "a number above 0, or 0 for no clipping"),
    "ema_decay": _SHARE,
    "seed": ((lambda value: 0 <= value < 2**32), f"one from 0 to {2**32 - 1}"),
    "checkpointing_steps": _COUNT,
    "checkpoints_total_limit": _COUNT,
    "evaluation_steps": ((lambda value: value >= 0), "1 or more, or 0 for no evaluations"),
    "validation_steps": ((lambda value: value >= 0), "1 or more, or 0 for no validation"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training settings of all methods, named as in diffusers' training scripts.

    A step is one update of the weights, made of `gradient_accumulation_steps` batches.

    Attributes:
        output_dir: the run's folder: checkpoints, logs, samples and, at the end, the exported model.
        max_train_steps: number of steps of the whole run.
        train_batch_size: examples in a batch, over all devices.
        gradient_accumulation_steps: batches whose mean gradient makes one step.
        optimizer: "adamw", "adamw8bit" (moments of 8 bits), "adafactor", "lion" or "prodigy".
        learning_rate: the highest, reached at the end of the warm-up; None is 1e-4, 2e-5 for Lion and 1 for
            Prodigy. `adafactor_relative_step` replaces it and its schedule.
        text_encoder_lr: that of the text encoder, where it is trained; None is `learning_rate`.
        learning_rate_by_block: factors of the learning rate of blocks of the UNet, such as "down_blocks=0.5
            up_blocks.2=0"; the longest name counts, and 0 freezes. None is 1 for all.
        lr_scheduler: what follows the warm-up: "constant" ("constant_with_warmup" is the same), or a fall to
            0 at the last step: "linear", "cosine", "cosine_with_restarts" or "polynomial".
        lr_warmup_steps: number of steps in which the learning rate rises linearly from 0.
        lr_num_cycles: how often "cosine_with_restarts" falls to 0; None is 1.
        lr_power: exponent of "polynomial"; None is 1, which is linear.
        adam_beta1, adam_beta2: decay rates of the first and second moments, 0 to just below 1; of AdamW, in
            8 bits too, and of Prodigy. None is the optimizer's default, here and below.
        adam_weight_decay: decoupled weight decay of any optimizer (Loshchilov and Hutter, 2019).
        adam_epsilon: what is added to the root of the second moment.
        lion_beta1, lion_beta2, adafactor_..., prodigy_...: arguments of `Lion`, `Adafactor` and `Prodigy` in
            `training.optimizers`. A setting of another optimizer is refused.
        max_grad_norm: norm to which the gradient of all weights together is clipped; 0 does not clip.
        ema_decay: decay rate of the EMA weights for each step, 0 to just below 1.
        mixed_precision: "no" (float32), "fp16" or "bf16", of the computation; weights stay float32.
        jit_compile: whether XLA compiles on TensorFlow; on JAX it always does.
        gradient_checkpointing: whether the backward pass recomputes activations: less memory, more time.
        offload_ema: whether the EMA weights are in the host's memory and not in the device's.
        seed: of the order of examples, noise, timesteps and initial weights, 0 to 2**32 - 1.
        checkpointing_steps: number of steps from one checkpoint to the next.
        checkpoints_total_limit: number of newest checkpoints to keep; None keeps all.
        resume_from_checkpoint: a checkpoint folder's name, or "latest"; None begins a new run.
        evaluation_steps: number of steps from one evaluation to the next; 0 evaluates at no step.
        sample_at_first: whether to evaluate before the first step, too.
        post_hoc_ema: "float16" or "float32" keeps snapshots of two power-function averages with each
            checkpoint, from which averages of any length can be made after the run
            (`training.post_hoc_ema`); None keeps none.
        report_to: where figures and images go beside the run folder's own files, separated by commas:
            "tensorboard", "wandb" (Weights & Biases), "all" or "none".
        tracker_project_name, wandb_run_name: the project and the run on wandb; None is "keras-sd" and the
            run folder's name.
        validation_steps: number of steps from one measurement of the validation loss to the next; 0 measures
            it at no step.

    Raises:
        UserError: a value is out of range.
    """

    output_dir: Path
    max_train_steps: int = 1000
    train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    text_encoder_lr: float | None = None
    learning_rate_by_block: str | None = None
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    lr_num_cycles: int | None = None
    lr_power: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_weight_decay: float | None = None
    adam_epsilon: float | None = None
    lion_beta1: float | None = None
    lion_beta2: float | None = None
    adafactor_relative_step: bool | None = None
    adafactor_scale_parameter: bool | None = None
    adafactor_warmup_init: bool | None = None
    adafactor_beta1: float | None = None
    prodigy_beta3: float | None = None
    prodigy_d0: float | None = None
    prodigy_d_coef: float | None = None
    prodigy_growth_rate: float | None = None
    prodigy_decouple: bool | None = None
    prodigy_use_bias_correction: bool | None = None
    prodigy_safeguard_warmup: bool | None = None
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
    sample_at_first: bool = False
    validation_steps: int = 0
    post_hoc_ema: str | None = None
    report_to: str = "tensorboard"
    tracker_project_name: str | None = None
    wandb_run_name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "output_dir", checked_path("output_dir", self.output_dir))
        self._check_types()
        self._choose_optimizer_options()
        for name, (fits, range_) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_computed(value, _WHOLE[name]):
                held = "of 64 bits" if _WHOLE[name] else "that float32 holds (0, or 1.2e-38 to 3.4e38)"
                raise UserError(f"{name} {shown(value)}: out of range; give {range_}, {held}")
            # A share just below 1 may round to 1 in float32.
            if not fits(value if _WHOLE[name] else float(np.float32(value))):
                raise UserError(f"{name} {shown(value)}: out of range; give {range_}")
        if self.mixed_precision not in PRECISIONS:
            raise UserError(f"mixed_precision {self.mixed_precision!r}: unknown; use {', '.join(PRECISIONS)}")
        if self.lr_scheduler not in SCHEDULES:
            raise UserError(f"lr_scheduler {self.lr_scheduler!r}: unknown; use {', '.join(SCHEDULES)}")
        self._check_schedule_options()
        self._check_post_hoc_ema()
        if "wandb" not in checked_trackers(self.report_to):
            for name in ("tracker_project_name", "wandb_run_name"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} {getattr(self, name)}: has no effect without `report_to='wandb'`; leave it "
                        "out"
                    )
        if self.learning_rate_by_block is not None:
            parse_block_factors(self.learning_rate_by_block)

    def _check_post_hoc_ema(self):
        if self.post_hoc_ema is None:
            return
        if self.post_hoc_ema not in DTYPES:
            raise UserError(f"post_hoc_ema {self.post_hoc_ema!r}: unknown; use {' or '.join(DTYPES)}")
        if self.offload_ema:
            raise UserError(
                f"post_hoc_ema {self.post_hoc_ema}: its averages are kept in the device's memory, which "
                "`offload_ema=True` is to save; leave one out"
            )

    def _check_schedule_options(self):
        for name, schedule in _OF_SCHEDULE.items():
            value = getattr(self, name)
            if value is not None and self.lr_scheduler != schedule:
                raise UserError(
                    f"{name} {value:g}: has no effect with `lr_scheduler='{self.lr_scheduler}'`; leave it "
                    f"out, or use `lr_scheduler='{schedule}'`"
                )
        if self.lr_num_cycles is not None and self.lr_num_cycles > self.max_train_steps:
            raise UserError(
                f"lr_num_cycles {self.lr_num_cycles}: more than the {self.max_train_steps} steps of the run; "
                "give fewer"
            )

    def _choose_optimizer_options(self):
        """Set the optimizer's defaults, and refuse the settings of others."""
        object.__setattr__(self, "optimizer", self.optimizer.lower())
        if self.optimizer not in TITLES:
            raise UserError(f"optimizer {self.optimizer!r}: unknown; use {', '.join(TITLES)}")
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if self.optimizer in option.defaults:
                object.__setattr__(self, name, option.defaults[self.optimizer] if value is None else value)
            elif value is not None:
                raise UserError(
                    f"{name} {value}: has no effect with `optimizer='{self.optimizer}'`; leave it out"
                )
        if self.optimizer == "prodigy" and self.prodigy_safeguard_warmup is None:
            object.__setattr__(self, "prodigy_safeguard_warmup", self.lr_warmup_steps > 0)
        if self.optimizer == "adafactor":
            self._check_relative_step()
        if self.learning_rate is None and not self.adafactor_relative_step:
            object.__setattr__(self, "learning_rate", default_learning_rate(self.optimizer, 1e-4))

    def _check_relative_step(self):
        if self.adafactor_scale_parameter is None:
            object.__setattr__(self, "adafactor_scale_parameter", self.adafactor_relative_step)
        if not self.adafactor_relative_step:
            if self.adafactor_warmup_init:
                raise UserError(
                    "adafactor_warmup_init True: has no effect without `adafactor_relative_step=True`; leave "
                    "it out"
                )
            return
        # Of the schedule only values other than the defaults are known to be given.
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("learning_rate", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", *_OF_SCHEDULE):
            if getattr(self, name) != defaults[name]:
                raise UserError(
                    f"{name} {getattr(self, name)}: has no effect with `adafactor_relative_step=True`; leave "
                    "it out"
                )

    def optimizer_options(self) -> dict[str, Any]:
        """Return the settings that belong to the optimizer, as name -> value."""
        return {
            name: getattr(self, name) for name, option in OPTIONS.items() if self.optimizer in option.defaults
        }

    def _check_types(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), get_args(field.type) or (field.type,)
            if kind[0] not in _TYPES or (value is None and type(None) in kind):
                continue
            accepted, title = _TYPES[kind[0]]
            is_bool = isinstance(value, bool | np.bool_)
            if not isinstance(value, accepted) or is_bool != (kind[0] is bool):
                range_ = _RANGES[field.name][1] if field.name in _RANGES else title
                raise UserError(f"{field.name} {shown(value)}: not {title}; give {range_}")

    def use_precision(self) -> None:
        """Set Keras' precision policy; call it before the models are made."""
        keras.config.set_dtype_policy(PRECISIONS[self.mixed_precision])

    def identity(self) -> dict[str, Any]:
        """Return the settings that a checkpoint must share with the run that resumes it, as JSON values."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _CHANGES_NOTHING
            and not (value is None and (name in _OF_SCHEDULE or name in OPTIONS or name in _OF_PARTS))
            and (name, value) != ("optimizer", "adamw")  # which checkpoints of earlier versions do not name
        }


_WHOLE = {field.name: field.type in (int, int | None) for field in dataclasses.fields(Settings)}


def _is_computed(value, is_whole):
    """Return whether a training step can represent the value: as int64 or as a normal float32.

    Devices flush subnormal numbers to 0.
    """
    if is_whole:
        return -(2**63) <= value < 2**63
    return value == 0 or _SMALLEST <= abs(value) <= _LARGEST
