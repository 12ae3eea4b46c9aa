"""The sampling loop that all samplers share, around one compiled step."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_sd import backend, interruption
from keras_sd.arguments import (
    Floats,
    Tensor,
    checked_interval,
    checked_rescale,
    checked_seed,
    float_array,
    share,
    shown,
    switch_or_none,
    whole_number,
)
from keras_sd.diffusion.finite import check_inputs, check_result
from keras_sd.diffusion.guidance import checked_guidance_scale, gives_guidance, guided_prediction
from keras_sd.diffusion.prediction import add_noise, to_sample_and_noise
from keras_sd.diffusion.rows import MEMORY_SIZE
from keras_sd.diffusion.samplers import Sampler, find_sampler
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.diffusion.thresholding import limited
from keras_sd.errors import UserError


class NoiseStreams:
    """Standard-normal noise for a batch of images, one random stream per image.

    An image's noise is a function of its own seed alone (NumPy's Philox with the seed as key), so it does not
    depend on the rest of the batch or on the backend.

    Args:
        seeds: the seed of each image, 0 to 2**64 - 1.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self._streams = [np.random.Generator(np.random.Philox(key=checked_seed(seed))) for seed in seeds]

    def __len__(self) -> int:
        return len(self._streams)

    def draw(self, shape: tuple[int, ...]) -> Floats:
        """Return the next noise of every image, float32 `(n, *shape)`."""
        return np.stack([stream.standard_normal(shape, dtype="float32") for stream in self._streams])


class Denoised(NamedTuple):
    """The loop's output after each step: the step's number, from 1, and the latents `(n, h, w, c)`."""

    step: int
    latents: object


class Known(NamedTuple):
    """The content that inpainting keeps.

    After each step, latents where `mask` is 0 are replaced by `sample`, with `noise` added at the step's
    level. The mask is float32 `(n or 1, h, w, 1)` and 1 where new content is generated; the others are `(n,
    h, w, c)`.
    """

    mask: object
    sample: object
    noise: object


class Denoiser:
    """The sampling loop around one UNet: XLA compiles one step, the caller owns the loop.

    Prompts, seeds, guidance, the sampler and its number of steps are inputs of the compiled step, so changing
    them compiles nothing. A program is compiled for each shape of the latents, with and without guidance, and
    with and without each optional input (`channels`, `class_labels`, `known`). Reuse of deep features needs
    two more programs: one for steps that compute the features and one for steps that reuse them.

    Args:
        unet: `keras_sd.models.unet.UNet`, conditional or not. Its weights may change between calls.
        schedule: the `NoiseSchedule` it was trained on.
        jit_compile: whether to compile with XLA on TensorFlow; None where it is faster. JAX always does.
        engine: "keras", or "openvino" to let OpenVINO compute the UNet for shapes where that is faster.
    """

    def __init__(
        self, unet: Any, schedule: NoiseSchedule, jit_compile: bool | None = None, engine: str = "keras"
    ) -> None:
        self.unet = unet
        self.schedule = schedule
        self._predict = unet
        jit_compile = backend.compiles(switch_or_none("jit_compile", jit_compile), unet.compute_dtype)
        self._first_call = backend.first_call(jit_compile)
        programs = [self._step, self._storing_step, self._reusing_step]
        if backend.check_engine(engine, unet.compute_dtype) == "keras":
            programs = [
                backend.jit(
                    step,
                    unet.variables,
                    jit_compile,
                    title="sampling step",
                    identity=functools.partial(
                        backend.identity_of, step.__name__, schedule.prediction_type, unet
                    ),
                )
                for step in programs
            ]
        else:
            # A step is then no program, so that its sums keep their precision: only the UNet is one.
            self._predict = self._for_engine(engine, jit_compile)
        self._program, self._storing_program, self._reusing_program = programs

    def _for_engine(self, engine, jit_compile):
        """Return the UNet, as steps call it, for an engine."""

        def plain(inputs, class_labels, deep):
            return self.unet(inputs, class_labels=class_labels, deep=deep)

        def storing(inputs, class_labels):
            return self.unet(inputs, class_labels=class_labels, returns_deep=True)

        plain, storing = (
            backend.jit_for_engine(
                engine,
                "UNet",
                self.unet.compute_dtype,
                function,
                self.unet.variables,
                jit_compile,
                identity=functools.partial(backend.identity_of, function.__name__, self.unet),
            )
            for function in (plain, storing)
        )

        def predict(inputs, class_labels=None, deep=None, returns_deep=False):
            if returns_deep:
                return storing(inputs, class_labels)
            return plain(inputs, class_labels, deep)

        return predict

    def steps(
        self,
        latents: Tensor,
        context: Tensor = None,
        negative: Tensor = None,
        *,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        reuse_interval: int = 1,
        sampler: str | Sampler | None = None,
        num_inference_steps: int = 30,
        eta: float = 0.0,
        streams: NoiseStreams | None = None,
        first_step: int = 0,
        channels: Tensor = None,
        class_labels: Tensor = None,
        known: Known | None = None,
    ) -> Iterator[Denoised]:
        """Return an iterator over `Denoised(step, latents)`, one per step; the last one is the result.

        Args:
            latents: initial latents, float32 `(n, h, w, c)`: standard-normal noise or the result of `noisy`.
            context, negative: text encodings `(n, tokens, width)`. The negative ones are used only if
                `guidance_scale` is above 1, and then double the work.
            guidance_scale: scale of classifier-free guidance; there is none up to 1.
            guidance_rescale: 0 to 1; reduces the overexposure of strong guidance.
            guidance_interval: (start, end) as shares of the steps, 0 to 1, between which guidance is applied
                (Kynkäänniemi et al., 2024). A step outside evaluates `context` alone, in half the time.
            reuse_interval: the whole UNet runs at every `reuse_interval`-th step (DeepCache, Ma et al.,
                2024). The steps between run only its outermost level, on the deep features of the last whole
                evaluation. The count starts at the first step, and again where guidance begins or ends. All
                evaluations of one step are of the same kind.
            sampler: a name in `samplers.SAMPLERS`; None for the sampler of the model's own file.
            num_inference_steps: number of steps from pure noise to the sample.
            eta: 0 to 1, the share of fresh noise at each step of DDIM and TCD.
            streams: `NoiseStreams` for fresh noise, drawn once for each row of the sampler's tables that
                needs it.
            first_step: number of steps to skip at the beginning.
            channels: additional input channels of the UNet, float32 `(n, h, w, k)`, or None.
            class_labels: int `(n,)` for a UNet with `num_class_embeds`, or None.
            known: `Known` content that is restored after each evaluation, or None.

        Raises:
            UserError: on the call, for an unknown sampler, a number out of range, inputs that are not finite
                or do not fit each other, `streams` that are missing, or no `negative` where there is
                guidance; at the last step, for a result that is not finite.
        """
        guidance_scale = checked_guidance_scale(guidance_scale)
        guidance_rescale = checked_rescale(guidance_rescale)
        start, end = checked_interval(guidance_interval)
        whole_number("reuse_interval", reuse_interval, 1)
        whole_number("num_inference_steps", num_inference_steps, 1, self.schedule.num_train_timesteps)
        eta = share("eta", eta, "0 (deterministic) to 1")
        chosen = find_sampler(sampler, self.schedule.config)
        tables = chosen.tables(self.schedule, num_inference_steps, eta, first_step)
        self._check_predictable(tables.rows)
        latents = float_array("latents", latents, None, None, None, None)
        count, *size, _ = latents.shape
        if streams is None and any(row.draws for row in tables.rows):
            raise UserError(f"sampler {chosen.name}: draws noise; give streams")
        if streams is not None and (not isinstance(streams, NoiseStreams) or len(streams) != count):
            raise UserError(f"streams {shown(streams)}: do not fit; give NoiseStreams of {count} seeds")
        if not gives_guidance(guidance_scale):
            negative = None
        elif negative is None:
            raise UserError(
                f"guidance_scale {guidance_scale:g}: needs a negative text encoding; give one, or scale 1"
            )
        if context is not None or negative is not None:
            context = float_array("text encoding", context, count, None, None)
        if negative is not None:
            negative = float_array("negative text encoding", negative, *np.shape(context))
        if channels is not None:
            channels = float_array("channels", channels, count, *size, None)
        if known is not None:
            known = _checked_known(known, latents.shape)
        guidance = {
            "context": context,
            "negative": negative,
            "scale": np.asarray(guidance_scale, "float32"),
            "rescale": np.asarray(guidance_rescale, "float32"),
            "class_labels": class_labels,
        }
        check_inputs(
            {"initial latents": latents, "text encoding": context, "negative text encoding": negative}
            | {"channels": channels, "sample to keep": known and known.sample}
        )
        # A step has guidance if its start lies in the interval.
        guided = [
            start <= (first_step + step) / num_inference_steps < end
            for step in range(num_inference_steps - first_step)
        ]
        kinds = _kinds(guided, reuse_interval)
        steps = self._run(tables, latents, guidance, guided, kinds, channels, known, streams)
        return interruption.first_is_phase(f"{self._first_call} a sampling step", steps)

    def noisy(
        self,
        sample: Tensor,
        noise: Tensor,
        *,
        sampler: str | Sampler | None = None,
        num_inference_steps: int = 30,
        first_step: int = 0,
    ) -> Tensor:
        """Return initial latents for `steps` that start from a noisy `sample`, as image-to-image needs.

        Args:
            sample, noise: float32 `(n, h, w, c)`.
            sampler, num_inference_steps, first_step: the same values as for `steps`.
        """
        chosen = find_sampler(sampler, self.schedule.config)
        start, rows, _ = chosen.tables(self.schedule, num_inference_steps, first_step=first_step)
        # `steps` multiplies the initial latents by `start`.
        signal_rate, noise_rate = (float(rate / start) for rate in rows[0].level)
        return add_noise(sample, noise, signal_rate, noise_rate)

    def _check_predictable(self, rows):
        """Raise a UserError if noise is predicted where the signal rate is 0: it gives no sample there."""
        if self.schedule.prediction_type == "epsilon" and any(row.level[0] == 0 for row in rows):
            raise UserError(
                "prediction_type epsilon: with rescale_betas_zero_snr the last timestep is pure noise, "
                "from which predicted noise gives no sample; use v_prediction, or timestep_spacing leading"
            )

    def _run(self, tables, latents, guidance, guided, kinds, channels, known, streams):
        latents = ops.convert_to_numpy(latents) * np.float32(tables.start)
        memory = np.zeros((MEMORY_SIZE, *latents.shape), "float32")
        no_noise = np.zeros_like(latents)
        unguided = guidance | {"negative": None}
        step, deep = 0, None
        for index, row in enumerate(tables.rows):
            is_last = index == len(tables.rows) - 1
            numbers = {
                "timestep": row.timestep,
                "level": np.array(row.level),
                # The result of the last row counts as clean.
                "end": np.array([1.0, 0.0] if is_last else row.end),
                "weights": row.weights,
            }
            numbers |= tables.limits
            numbers = {name: np.asarray(value, "float32") for name, value in numbers.items()}
            random = streams.draw(latents.shape[1:]) if row.draws else no_noise
            guidance_of_step = guidance if guided[step] else unguided
            inputs = (latents, memory, random, numbers, guidance_of_step, channels, known)
            if kinds[step] == "plain":
                latents, memory = self._program(*inputs)
            elif kinds[step] == "storing":
                latents, memory, deep = self._storing_program(*inputs)
            else:
                latents, memory = self._reusing_program(deep, *inputs)
            if is_last:
                check_result(latents, self.unet, "UNet", guidance_scale=float(guidance["scale"]))
            if row.ends_step:
                step += 1
                yield Denoised(step, latents)

    def _storing_step(self, *inputs):
        """Return the results of `_step` and the deep features of the UNet."""
        found = []

        def unet(*arguments, **options):
            prediction, deep = self._predict(*arguments, **options, returns_deep=True)
            found.append(deep)
            return prediction

        return *self._step(*inputs, unet=unet), *found

    def _reusing_step(self, deep, *inputs):
        """Return the results of `_step`, computed with the deep features of an earlier step."""
        return self._step(*inputs, unet=functools.partial(self._predict, deep=deep))

    def _step(self, latents, memory, random, numbers, guidance, channels, known, unet=None):
        """Compute one row of the tables: evaluate the UNet, and form the weighted sums of the row."""
        signal_rate, noise_rate = numbers["level"][0], numbers["level"][1]
        unet_input = latents if channels is None else ops.concatenate([latents, channels], axis=-1)
        timesteps = ops.broadcast_to(numbers["timestep"], (latents.shape[0],))
        prediction = guided_prediction(unet or self._predict, unet_input, timesteps, **guidance)
        sample, noise = to_sample_and_noise(
            self.schedule.prediction_type, prediction, latents, signal_rate, noise_rate
        )
        bounds = {name: numbers[name] for name in ("clip_range", "ratio", "largest") if name in numbers}
        sample = limited(sample, **bounds)
        # An elementwise product and a sum: a matrix multiplication may run in lower precision.
        terms = ops.concatenate([latents[None], memory, ops.stack([sample, noise, random])])
        weights = ops.reshape(numbers["weights"], (*numbers["weights"].shape, 1, 1, 1, 1))
        results = ops.sum(weights * terms[None], axis=1)
        latents, memory = results[0], results[1:]
        if known is not None:
            kept = add_noise(known.sample, known.noise, numbers["end"][0], numbers["end"][1])
            latents = kept + known.mask * (latents - kept)
        return latents, memory


def _checked_known(known, shape):
    """Return `Known` content for latents of this shape as arrays."""
    if not isinstance(known, Known):
        raise UserError(f"known {shown(known)}: of another type; give a Known(mask, sample, noise)")
    count = 1 if np.shape(known.mask)[:1] == (1,) else shape[0]
    return Known(
        float_array("mask of what to keep", known.mask, count, *shape[1:3], 1),
        float_array("sample to keep", known.sample, *shape),
        float_array("noise of the sample to keep", known.noise, *shape),
    )


def _kinds(guided, reuse_interval):
    """Return the kind of each step: "storing" or "reusing" deep features; "plain" if no step reuses any.

    Args:
        guided: list of bool, whether the step has guidance; with it, the features have twice the batch size.
    """
    if reuse_interval == 1:
        return ["plain"] * len(guided)
    kinds, since = [], 0
    for step, is_guided in enumerate(guided):
        if step == 0 or is_guided != guided[step - 1] or since == reuse_interval:
            since = 0
        kinds.append("reusing" if since else "storing")
        since += 1
    return kinds
