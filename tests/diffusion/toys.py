"""Denoisers for the tests of samplers, and what a process of another backend is asked to compute."""

import sys

import keras
import numpy as np
from keras import ops

from keras_sd.diffusion.denoiser import Denoiser, NoiseStreams
from keras_sd.diffusion.samplers import SAMPLERS
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.diffusion.spacing import training_sigmas
from keras_sd.models.unet import UNet
from tests import tiny

SHAPE = (4, 3, 2)
SEEDS = (0, 7)


class ToyUNet(keras.layers.Layer):
    """A denoiser of no use; remembers the batch size of each trace."""

    def __init__(self):
        super().__init__()
        self.gain = self.add_weight(shape=(), initializer="ones", name="gain")
        self.batches = []

    def call(self, inputs):
        latents, timesteps, *contexts = inputs
        self.batches.append(latents.shape[0])
        time = ops.reshape(timesteps, (-1, 1, 1, 1)) / 1000
        outputs = self.gain * (0.4 * ops.sin(2 * latents) + 0.3 * latents - 0.2 * time)
        for context in contexts:
            outputs = outputs * (1 + ops.mean(context, axis=(1, 2))[:, None, None, None])
        return outputs


class GaussianUNet(keras.layers.Layer):
    """Predicts the sample, exactly, for data that is normal with this mean and deviation.

    As a consistency function, where the probability-flow ODE ends; otherwise the sample's expectation.
    """

    def __init__(self, schedule, mean, deviation, is_consistency=False):
        super().__init__()
        self.log_sigmas = np.log(training_sigmas(schedule)).astype("float32")
        self.mean, self.deviation, self.is_consistency = mean, deviation, is_consistency

    def call(self, inputs):
        latents, timesteps = inputs
        below = ops.minimum(ops.cast(timesteps, "int32"), len(self.log_sigmas) - 2)
        share = timesteps - ops.cast(below, "float32")
        low, high = ops.take(self.log_sigmas, below), ops.take(self.log_sigmas, below + 1)
        sigma = ops.reshape(ops.exp(low + share * (high - low)), (-1, 1, 1, 1))
        return ode_end(latents, sigma, self.mean, self.deviation, 1 if self.is_consistency else 2)


def ode_end(latents, sigma, mean, deviation, power=1):
    """Where the probability-flow ODE takes latents of Gaussian data; with power 2 the expected sample."""
    ratio = deviation / (deviation**2 + sigma**2) ** 0.5
    return mean + ratio**power * (latents * (1 + sigma**2) ** 0.5 - mean)


def last(steps):
    *_, result = steps
    return ops.convert_to_numpy(result.latents)


def of_every_sampler(num_inference_steps=20):
    """What each sampler makes of the same noise with `ToyUNet`."""
    denoiser = Denoiser(ToyUNet(), NoiseSchedule(SchedulerConfig(prediction_type="v_prediction")))
    results = {}
    for name in SAMPLERS:
        streams = NoiseStreams(SEEDS)
        noise = streams.draw(SHAPE)
        results[name] = last(
            denoiser.steps(noise, sampler=name, num_inference_steps=num_inference_steps, streams=streams)
        )
    assert denoiser.unet.batches == [len(SEEDS)]  # one program for all of them
    return results


def of_reuse():
    """What steps make of noise that reuse the deep features of a tiny UNet."""
    unet = tiny.randomize(UNet(tiny.SD1_UNET), scale=0.2)
    denoiser = Denoiser(unet, NoiseSchedule(SchedulerConfig(prediction_type="v_prediction")))
    noise = NoiseStreams(SEEDS).draw((4, 4, 4))
    context, negative = np.random.default_rng(0).standard_normal((2, 2, 6, 16)).astype("float32")
    return last(
        denoiser.steps(noise, context, negative, guidance_scale=3.0, num_inference_steps=5, reuse_interval=2)
    )


if __name__ == "__main__":
    np.savez(sys.argv[1], backend=keras.backend.backend(), reuse=of_reuse(), **of_every_sampler())
