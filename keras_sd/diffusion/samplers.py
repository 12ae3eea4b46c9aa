"""Samplers, and the compiled loop that they all share.

A sampler is two pure functions. `tables` computes, in float64 on the host, the numbers that each step
needs; they enter the compiled step as inputs, one row a step, so that no number in them is part of the
program. `step` maps the state, the predicted sample and noise, and a row to the next state. It knows
neither the network nor its prediction type nor guidance.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.diffusion.guidance import guided_prediction
from keras_sd.diffusion.prediction import to_sample_and_noise
from keras_sd.errors import UserError


def spaced_timesteps(config, num_steps):
    """The timesteps at which the network is asked, falling, int64 `(num_steps,)`.

    Table 2 of Lin et al. (2023); `steps_offset` belongs to the leading spacing alone.

    Raises:
        UserError: `num_steps` is not between 1 and the number of training timesteps, or the config's
            spacing is unknown.
    """
    total = config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise UserError(f"num_steps {num_steps}: out of range; use 1 to {total}")
    if config.timestep_spacing == "leading":
        return np.arange(num_steps)[::-1] * (total // num_steps) + config.steps_offset
    if config.timestep_spacing == "trailing":
        # A range by a fractional step may come out one too long; halves are rounded as in diffusers.
        return np.round(np.arange(total, 0, -total / num_steps)[:num_steps]).astype("int64") - 1
    if config.timestep_spacing == "linspace":
        return np.round(np.linspace(0, total - 1, num_steps))[::-1].astype("int64")
    raise UserError(
        f"timestep_spacing {config.timestep_spacing!r}: unknown; use leading, trailing or linspace"
    )


class DDIM:
    """Denoising diffusion implicit models (Song et al., 2021), equation 12.

    `eta` 0 is deterministic; 1 adds as much noise each step as ancestral sampling does.
    """

    name = "DDIM"

    @staticmethod
    def tables(schedule, num_steps, eta=0.0):
        """Rows of the loop: a dictionary of arrays `(num_steps,)`, float64 but for the timesteps.

        A step ends at `T // num_steps` timesteps below its own, also where the next step begins elsewhere
        because `num_steps` does not divide `T`: what diffusers does, whose pictures these are to be.
        """
        timesteps = spaced_timesteps(schedule.config, num_steps)
        if timesteps[0] >= schedule.num_train_timesteps:
            raise UserError(
                f"num_steps {num_steps}: with steps_offset {schedule.config.steps_offset} it starts beyond "
                f"timestep {schedule.num_train_timesteps - 1}; use fewer steps"
            )
        before = timesteps - schedule.num_train_timesteps // num_steps
        final = 1.0 if schedule.config.set_alpha_to_one else schedule.alphas_cumprod[0]
        alpha = schedule.alphas_cumprod[timesteps]
        next_alpha = np.where(before >= 0, schedule.alphas_cumprod[np.maximum(before, 0)], final)
        variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
        deviation = eta * np.sqrt(variance)
        return {
            "timestep": timesteps,
            "signal_rate": np.sqrt(alpha),
            "noise_rate": np.sqrt(1 - alpha),
            "next_signal_rate": np.sqrt(next_alpha),
            # At eta 1 rounding may leave a little less than nothing under the root.
            "next_noise_rate": np.sqrt(np.maximum(1 - next_alpha - deviation**2, 0)),
            "deviation": deviation,
        }

    @staticmethod
    def start(noise):
        """The state before the first step, a dictionary with the noisy latents and any history."""
        return {"latents": noise}

    @staticmethod
    def step(state, sample, noise, row, random):
        """One step; `random` is fresh standard-normal noise, which a deterministic row ignores."""
        latents = row["next_signal_rate"] * sample + row["next_noise_rate"] * noise
        return {"latents": latents + row["deviation"] * random}


SAMPLERS = {"ddim": DDIM}


def find_sampler(name):
    """The sampler of that name.

    Raises:
        UserError: there is none; the line lists those there are.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r}: unknown; use one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


class NoiseStreams:
    """Standard-normal noise for a batch of pictures, from one stream for each.

    A picture's noise follows from its own seed alone (NumPy's Philox keyed by it), so it does not depend on
    the rest of the batch or on the backend.
    """

    def __init__(self, seeds):
        self._streams = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds]

    def draw(self, shape):
        """The next noise of every picture, each of `shape`: float32 `(n, *shape)`."""
        return np.stack([stream.standard_normal(shape, dtype="float32") for stream in self._streams])


class Denoised(NamedTuple):
    """What the loop yields after each step: its number from 1, and the latents `(n, h, w, c)`."""

    step: int
    latents: object


class Denoiser:
    """The sampling loop around one UNet: XLA compiles one step, the caller owns the loop.

    Prompts, seeds, guidance scale, number of steps and eta are inputs of the compiled step. It is
    compiled for each sampler, with and without guidance, and for each shape of the latents.

    Args:
        unet: `keras_sd.models.unet.UNet`, conditional or not. Its weights may change between calls.
        schedule: the `NoiseSchedule` it was trained on.
    """

    def __init__(self, unet, schedule):
        self.unet = unet
        self.schedule = schedule
        self._programs = {}

    def steps(
        self,
        latents,
        context=None,
        negative=None,
        *,
        guidance_scale=1.0,
        sampler="ddim",
        num_steps=30,
        eta=0.0,
        streams=None,
    ):
        """Generates `Denoised(step, latents)` after each step, the last of which is the result.

        Args:
            latents: the noise to begin with, float32 `(n, h, w, c)`.
            context, negative: text encodings `(n, tokens, width)`; the negative ones are used, and half
                of the work is theirs, if `guidance_scale` is not 1.
            sampler: a name in `SAMPLERS`.
            eta: from 0 to 1, the share of fresh noise at each step.
            streams: `NoiseStreams` to draw that noise from; needed if `eta` is not 0.

        Raises:
            UserError: an unknown sampler, or a number of steps or an eta out of range; on the call, before
                the first step.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta}: out of range; use 0 (deterministic) to 1")
        method = find_sampler(sampler)
        tables = method.tables(self.schedule, num_steps, eta)
        if guidance_scale == 1:
            negative = None
        conditions = (context, negative, np.asarray(guidance_scale, "float32"))
        return self._run(method, method.start(latents), conditions, tables, streams if eta else None)

    def _run(self, method, state, conditions, tables, streams):
        program = self._program(method)
        shape = state["latents"].shape
        random = np.zeros(shape, "float32")
        for index in range(len(tables["timestep"])):
            row = {name: np.asarray(column[index], "float32") for name, column in tables.items()}
            if streams is not None:
                random = streams.draw(shape[1:])
            state = program(state, *conditions, row, random)
            yield Denoised(index + 1, state["latents"])

    def _program(self, method):
        if method not in self._programs:

            def step(state, context, negative, guidance_scale, row, random):
                latents = state["latents"]
                timesteps = ops.broadcast_to(row["timestep"], (latents.shape[0],))
                prediction = guided_prediction(
                    self.unet, latents, timesteps, context, negative, guidance_scale
                )
                sample, noise = to_sample_and_noise(
                    self.schedule.prediction_type, prediction, latents, row["signal_rate"], row["noise_rate"]
                )
                if self.schedule.config.clip_sample:
                    sample = ops.clip(sample, -1.0, 1.0)
                return method.step(state, sample, noise, row, random)

            self._programs[method] = backend.jit(step, self.unet.variables)
        return self._programs[method]
