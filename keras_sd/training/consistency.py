"""Latent consistency distillation (LCM, Luo et al., 2023) of LoRA weights: sampling in a few steps."""

import functools

import numpy as np
from keras import ops

from keras_sd.diffusion import spacing
from keras_sd.diffusion.guidance import checked_guidance_scale, gives_guidance, guided_prediction
from keras_sd.diffusion.prediction import add_noise, consistency_shares, to_sample_and_noise
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.lora import without_updates
from keras_sd.training.objectives import DiffusionObjective, at_timesteps
from keras_sd.training.text_to_image import diffusion_example, diffusion_identity
from keras_sd.training.trainer import Trainer


class ConsistencyObjective(DiffusionObjective):
    """Trains a network to predict the same sample at both ends of a step (Luo et al., 2023, algorithm 1).

    The teacher is the network without its low-rank updates; it takes a guided DDIM step. The student is the
    network with them. Its prediction at the start of the step is trained to match its prediction at the end,
    through which no gradient flows. So one step learns the result of many guided steps (LCM-LoRA, Luo et al.,
    2023b).

    A batch is that of `DiffusionObjective` with `context`, and also holds the `negative` context.

    Args:
        unet: the network with low-rank updates (`training.lora`).
        schedule: `NoiseSchedule`.
        num_ddim_timesteps: number of teacher steps from pure noise to a sample. Fewer steps carry what is
            learned at low noise levels to high ones faster.
        guidance_scale: guidance scale of the teacher; up to 1 there is no guidance.
        huber_c: scale of the pseudo-Huber loss (Song and Dhariwal, 2024, section 3.3), which changes from
            squared to absolute error there; None for squared error.
    """

    def __init__(self, unet, schedule, *, num_ddim_timesteps, guidance_scale, huber_c=None, **kwargs):
        super().__init__(unet, schedule, **kwargs)
        self.guidance_scale = checked_guidance_scale(guidance_scale)
        self.huber_c = huber_c
        self.stride = schedule.num_train_timesteps // num_ddim_timesteps
        shares = consistency_shares(np.arange(schedule.num_train_timesteps))
        self.shares_of_noisy, self.shares_of_sample = (share.astype("float32") for share in shares)

    def call(self, batch):
        context = batch["context"]
        starts = batch["timesteps"]
        ends = ops.maximum(starts - self.stride, 0)
        rates = self._rates(starts)
        noisy = add_noise(batch["samples"], batch["noise"], *rates)
        with without_updates(self.unet):
            negative = batch["negative"] if gives_guidance(self.guidance_scale) else None
            guided = guided_prediction(self.unet, noisy, starts, context, negative, self.guidance_scale)
        sample, noise = to_sample_and_noise(self.prediction_type, guided, noisy, *rates)
        less_noisy = add_noise(sample, noise, *self._rates(ends))
        target = ops.stop_gradient(self._consistent_sample(less_noisy, ends, context))
        errors = self._consistent_sample(noisy, starts, context) - target
        losses = ops.square(errors)
        if self.huber_c is not None:
            losses = ops.sqrt(losses + self.huber_c**2) - self.huber_c
        return ops.mean(losses, axis=(1, 2, 3))

    def _rates(self, timesteps):
        return at_timesteps(self.signal_rates, timesteps), at_timesteps(self.noise_rates, timesteps)

    def _consistent_sample(self, noisy, timesteps, context):
        """Return the consistency function: the sample that the network predicts from a noisy one."""
        prediction = self.unet([noisy, timesteps, context])
        sample, _ = to_sample_and_noise(self.prediction_type, prediction, noisy, *self._rates(timesteps))
        of_noisy, of_sample = (
            at_timesteps(shares, timesteps) for shares in (self.shares_of_noisy, self.shares_of_sample)
        )
        return of_noisy * noisy + of_sample * sample


def consistency_example(example, generator, timesteps, noise):
    """Draw the arrays of one training example: those of `diffusion_example` and the empty caption.

    Args:
        example: an example of an `encodings.EncodedSource`.
        timesteps: the timesteps to draw from, int `(n,)`.
        noise: `NoiseDrawing` of so many timesteps.
    """
    drawn = diffusion_example(example, generator, noise=noise)
    return drawn | {
        "timesteps": np.int32(timesteps[drawn["timesteps"]]),
        "negative": example["empty_context"],
    }


def train_consistency(
    settings,
    unet,
    scheduler_config,
    source,
    *,
    num_ddim_timesteps=10,
    guidance_scale,
    huber_c=None,
    identity=None,
    repeats=None,
    make_evaluation=None,
    export=None,
):
    """Train the LoRA updates of a UNet on encoded examples for the sampler `lcm`.

    Args:
        settings: `trainer.Settings`.
        unet: with LoRA updates (`training.lora`).
        scheduler_config: `SchedulerConfig`: noise schedule and prediction type.
        source: `encodings.EncodedSource` with encoded captions.
        num_ddim_timesteps, guidance_scale, huber_c: as `ConsistencyObjective` takes them.
        identity, repeats, make_evaluation, export: as `text_to_image.train_text_to_image` takes them.

    Returns:
        Whether training reached its end.
    """
    schedule = NoiseSchedule(scheduler_config)
    timesteps = spacing.distilled_timesteps(schedule)
    distillation = {
        "num_ddim_timesteps": num_ddim_timesteps,
        "guidance_scale": guidance_scale,
        "huber_c": huber_c,
    }
    trainer = Trainer(
        ConsistencyObjective(unet, schedule, **distillation),
        settings,
        diffusion_identity("lcm", unet, scheduler_config, source, repeats, **distillation) | (identity or {}),
    )
    return trainer.run(
        source,
        functools.partial(
            consistency_example,
            timesteps=timesteps,
            noise=NoiseDrawing(DiffusionSettings(), len(timesteps)),
        ),
        repeats=repeats,
        make_evaluation=make_evaluation,
        export=export,
    )
