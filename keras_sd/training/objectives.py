"""Training objectives: a network with its loss, as Keras models for `fit()`.

An objective's `call` maps a batch, a dictionary of arrays, to one loss per example. A batch holds its own
noise and timesteps, so the compiled step is a pure function.
"""

import bisect
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.arguments import Tensor, shown
from keras_sd.diffusion import prediction
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.layers import dense
from keras_sd.models.pixels import images_to_unit
from keras_sd.models.quantization import refuse_quantized
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.training.diffusion_settings import DiffusionSettings


class Objective(keras.Model):
    """Base of all objectives: the model's output is the loss `(n,)`, float32 in every precision.

    An output may also be a dictionary of figures for the log, the `loss` among them; such an objective has a
    `compute_loss` of its own.

    Attributes:
        phase_starts: steps after which the objective changes, in order; the step is compiled anew there.
        phase: how many of these changes the run has passed. The trainer sets it.
        on_compiled: called with the `backend.ProgramMemory` of each step that JAX compiles, before it runs;
            None, or what the trainer sets.
    """

    phase_starts: tuple[int, ...] = ()
    phase = 0
    on_compiled: Callable[[backend.ProgramMemory], object] | None = None

    def __init__(self, **kwargs: Any) -> None:
        # Noise and targets stay in float32; only the networks run in half precision.
        super().__init__(autocast=False, **kwargs)
        # The networks are built. Otherwise Keras on JAX would trace the forward pass once more at each start.
        self.built = True

    def compile(self, *arguments: Any, **options: Any) -> None:
        refuse_quantized("training", self)
        super().compile(*arguments, **options)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        return ops.mean(y_pred)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        # Those of this batch alone: Keras' own mean over the epoch would differ between a resumed run and an
        # uninterrupted one.
        figures = y_pred if isinstance(y_pred, dict) else {"loss": y_pred}
        return {name: ops.mean(values) for name, values in figures.items()}

    def enter_phase_of(self, step: int) -> bool:
        """Enter the phase of a run that has taken `step` steps; return whether it is another one."""
        phase = bisect.bisect_right(self.phase_starts, step)
        is_new = phase != self.phase
        self.phase = phase
        return is_new

    def make_train_function(self, force: bool = False) -> None:
        if self.train_function is None or force:
            is_compiled = self.jit_compile and not self.run_eagerly and self.steps_per_execution == 1
            self.train_function = backend.train_function_by_shape(
                self._new_train_function,
                self.train_step,
                self._variables_of_step,
                functools.partial(backend.identity_of, "training step", self, self.optimizer)
                if is_compiled
                else None,
                functools.partial(backend.state_shardings, self),
                self.on_compiled,
            )

    def _variables_of_step(self):
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return [*self.variables, *self.metrics_variables, *self.optimizer.variables]

    def _new_train_function(self):
        kept, step = self.train_function, self.train_step

        def train_step(*arguments):
            return step(*arguments)

        # A function of its own: JAX remembers the trace of each function, and would give that of an earlier
        # phase back for the same one.
        self.train_step = train_step
        try:
            super().make_train_function(force=True)
        finally:
            self.train_step = step
        made, self.train_function = self.train_function, kept
        return made


def at_timesteps(table, timesteps):
    """Return each example's entry of a table `(T,)`, with the shape `(n, 1, 1, 1)` for broadcasting."""
    return ops.take(table, timesteps)[:, None, None, None]


class DiffusionObjective(Objective):
    """Weighted squared error of a UNet's prediction from noisy samples (Ho et al., 2020).

    A batch holds `samples` (scaled latents, or uint8 images for a pixel-space model), `noise` of the same
    shape and `timesteps (n,)`. It may also hold:

    - `context (n, tokens, features)`, or `token_ids (n, tokens)` if the text encoder is trained, too;
    - `channels (n, h, w, c)`, additional input channels, and `class_labels (n,)`: an upscaler has both;
    - `mask (n, h, w, 1)`, the weight of each latent in the loss, 0 to 1;
    - `input_noise`, which is added to the samples in place of `noise`, the target (input perturbation, Ning
      et al., 2023).

    Args:
        unet: the network.
        schedule: `NoiseSchedule`.
        diffusion: `DiffusionSettings`, whose weights of the timesteps are taken; None for equal weights.
        text_encoder: encodes `token_ids`; None if batches hold `context`.

    Raises:
        UserError: the prediction type cannot be trained with this schedule or these weights.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        diffusion: DiffusionSettings | None = None,
        text_encoder: TextEncoder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        diffusion = DiffusionSettings() if diffusion is None else diffusion
        for name, value, kind in (
            ("unet", unet, keras.Model),
            ("schedule", schedule, NoiseSchedule),
            ("diffusion", diffusion, DiffusionSettings),
        ):
            if not isinstance(value, kind):
                raise UserError(f"{name} {shown(value)}: not a {kind.__name__}; give one")
        schedule.check_learnable()
        self.unet = unet
        self.text_encoder = text_encoder
        self.prediction_type = schedule.prediction_type
        self.signal_rates = schedule.signal_rates
        self.noise_rates = schedule.noise_rates
        self.weights_by_timestep = diffusion.weights(schedule)

    def call(self, batch: dict[str, Any]) -> Any:
        noisy, target, weight = self._noised(batch)
        return self._denoising_losses(self._predict(noisy, batch), target, weight, batch)

    def _noised(self, batch):
        """Return the noisy samples, the target of the prediction and the weight of its squared error."""
        samples = batch["samples"]
        if keras.backend.standardize_dtype(samples.dtype) == "uint8":
            samples = images_to_unit(samples)
        timesteps, noise = batch["timesteps"], batch["noise"]
        signal_rate, noise_rate, weight = (
            at_timesteps(table, timesteps)
            for table in (self.signal_rates, self.noise_rates, self.weights_by_timestep)
        )
        noisy = prediction.add_noise(samples, batch.get("input_noise", noise), signal_rate, noise_rate)
        target = prediction.target(self.prediction_type, samples, noise, signal_rate, noise_rate)
        return noisy, target, weight

    def _denoising_losses(self, predicted, target, weight, batch):
        errors = weight * ops.square(predicted - target)
        return ops.mean(batch["mask"] * errors if "mask" in batch else errors, axis=(1, 2, 3))

    def _predict(self, noisy, batch, **options):
        """Return what the UNet makes of the noisy samples of a batch; the options are those of its call."""
        if "channels" in batch:
            noisy = ops.concatenate([noisy, batch["channels"]], axis=-1)
        inputs = [noisy, batch["timesteps"]]
        if "token_ids" in batch:
            inputs.append(self.text_encoder(batch["token_ids"]))
        elif "context" in batch:
            inputs.append(batch["context"])
        labels = {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}
        return self.unet(inputs, **labels, **options)


class PriorPreservationObjective(DiffusionObjective):
    """DreamBooth's loss with prior preservation (Ruiz et al., 2023, equation 2).

    Every array of a batch has a second axis of two: an image of the subject and an image of the class.
    """

    def __init__(self, *arguments, prior_loss_weight=1.0, **options):
        super().__init__(*arguments, **options)
        self.prior_loss_weight = prior_loss_weight

    def call(self, batch):
        losses = super().call({name: _one_axis(pairs) for name, pairs in batch.items()})
        subject, prior = ops.unstack(ops.reshape(losses, (-1, 2)), axis=1)
        return subject + self.prior_loss_weight * prior


def _one_axis(pairs):
    return ops.reshape(pairs, (-1, *pairs.shape[2:]))


class ContrastiveObjective(Objective):
    """CLIP's symmetric cross entropy between images and captions (Radford et al., 2021).

    A batch holds uint8 `images` and `token_ids (n, tokens)`; all others in the batch are negatives.
    """

    def __init__(self, text_encoder, image_encoder, **kwargs):
        super().__init__(**kwargs)
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        width = text_encoder.config.hidden_size
        self.text_projection = dense(width, image_encoder.config.projection_dim, use_bias=False)
        self.logit_scale = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(np.log(1 / 0.07)), name="logit_scale"
        )

    def call(self, batch):
        images = self.image_encoder(images_to_unit(batch["images"]))
        captions = self.text_projection(self.text_encoder.pooled(batch["token_ids"]))
        images, captions = (
            ops.normalize(ops.cast(vectors, "float32"), axis=-1) for vectors in (images, captions)
        )
        # CLIP limits the scale to 100, too, to keep training stable.
        logits = ops.minimum(ops.exp(self.logit_scale), 100.0) * (images @ ops.transpose(captions))
        own = ops.diagonal(logits)
        by_image = ops.logsumexp(logits, axis=1) - own
        by_caption = ops.logsumexp(logits, axis=0) - own
        return 0.5 * (by_image + by_caption)
