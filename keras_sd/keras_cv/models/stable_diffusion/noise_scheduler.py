"""DDPM's noise schedule (Ho et al., 2020, arXiv:2006.11239) with the methods of KerasCV's scheduler."""

import keras
import numpy as np
from keras import ops

from keras_sd.errors import UserError

_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


class NoiseScheduler:
    """A noise schedule that adds noise to latents, and removes it step by step.

    Args:
        train_timesteps: number of timesteps.
        beta_start, beta_end: variance of the noise of the first and the last timestep.
        beta_schedule: "linear", or "scaled_linear", which is linear in the square roots.
        variance_type: variance of the noise that `step` adds: "fixed_small" (of the posterior) or
            "fixed_large" (beta). With "_log" appended it is the same.
        clip_sample: whether `step` clips the sample that it predicts to [-1, 1].

    Raises:
        UserError: an unknown schedule or variance; learned variances are not supported.
    """

    def __init__(
        self,
        train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="fixed_small",
        clip_sample=True,
    ):
        if beta_schedule not in ("linear", "scaled_linear"):
            raise UserError(f"beta_schedule {beta_schedule!r}: unknown; use linear or scaled_linear")
        if variance_type not in _VARIANCES:
            raise UserError(f"variance_type {variance_type!r}: not supported; use {' or '.join(_VARIANCES)}")
        power = 0.5 if beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(beta_start**power, beta_end**power, train_timesteps) ** (1 / power)
        self.train_timesteps = train_timesteps
        self.betas = ops.convert_to_tensor(betas.astype("float32"))
        self.alphas = ops.convert_to_tensor((1 - betas).astype("float32"))
        self.alphas_cumprod = ops.convert_to_tensor(np.cumprod(1 - betas).astype("float32"))
        self.variance_type, self.clip_sample = variance_type, clip_sample
        self.seed_generator = keras.random.SeedGenerator(42)

    def __len__(self):
        return self.train_timesteps

    def add_noise(self, original_samples, noise, timesteps):
        """Return samples `(n, h, w, c)` with noise added according to their timesteps `(n,)`."""
        kept = ops.reshape(ops.take(self.alphas_cumprod, timesteps), (-1, 1, 1, 1))
        return (
            ops.cast(ops.sqrt(kept), original_samples.dtype) * original_samples
            + ops.cast(ops.sqrt(1 - kept), noise.dtype) * noise
        )

    def step(self, model_output, timestep, sample, predict_epsilon=True):
        """Return the samples at the previous timestep.

        Args:
            model_output: prediction of the model: the noise, or the sample.
            timestep: a whole number.
            sample: the noisy samples at this timestep.
            predict_epsilon: whether the model predicts noise.
        """
        kept, beta = self.alphas_cumprod[timestep], self.betas[timestep]
        before = self.alphas_cumprod[timestep - 1] if timestep > 0 else 1.0
        if predict_epsilon:
            clean = (sample - (1 - kept) ** 0.5 * model_output) / kept**0.5
        else:
            clean = model_output
        if self.clip_sample:
            clean = ops.clip(clean, -1.0, 1.0)
        # Equation (7): the posterior mean of the previous sample, given this one and the clean one.
        mean = before**0.5 * beta / (1 - kept) * clean
        mean += self.alphas[timestep] ** 0.5 * (1 - before) / (1 - kept) * sample
        if timestep == 0:
            return mean
        small = ops.clip((1 - before) / (1 - kept) * beta, 1e-20, 1.0)
        variance = small if self.variance_type.startswith("fixed_small") else beta
        noise = keras.random.normal(model_output.shape, seed=self.seed_generator)
        return mean + variance**0.5 * noise
