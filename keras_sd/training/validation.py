"""Validation loss: the training loss on fixed images, noise and timesteps, for EMA and raw weights.

Everything but the weights is the same in each validation, so two of them differ by the weights alone. Losses
of single examples differ by orders of magnitude, mostly by their timestep: with fresh noise that hides what
training changes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_sd import backend
from keras_sd.arguments import whole_number
from keras_sd.errors import UserError
from keras_sd.models.batches import equal_batches
from keras_sd.progress import print_above_bars
from keras_sd.training.diffusion_settings import NoiseDrawing
from keras_sd.training.distribution import num_replicas

NUM_BINS = 4
"""Equal ranges of timesteps whose losses are told apart."""

_STREAM = 0x76616C6964  # keeps the noise apart from that of training, whose generators have the same seed


@dataclasses.dataclass(frozen=True)
class Validation:
    """What the validation loss is measured on.

    Attributes:
        sets: name, such as "train" or "held_out", -> examples as the method trains on them. Of a source with
            buckets only the largest bucket is taken.
        count: number of (example, noise, timestep) in each set. A set of fewer examples shows them several
            times, each time with another noise and timestep.

    Raises:
        UserError: a set is empty, or the count is not positive.
    """

    sets: dict[str, Sequence[Any]]
    count: int = 64

    def __post_init__(self) -> None:
        whole_number("validation_examples", self.count, 1)
        for name, examples in self.sets.items():
            if not len(examples):
                raise UserError(f"validation set {name}: has no examples; leave it out")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean loss, and its standard error: how far the mean over all images and noises may be from it."""

    mean: float
    standard_error: float


class ValidationLoss:
    """Measures the loss of the current weights on fixed examples, by the objective of the run.

    The timesteps are stratified: they are quantiles of the run's own distribution of timesteps, one in each
    of `count` equal shares. Example i has the same noise and timestep in every set.

    Args:
        trainer: the `Trainer` of the run.
        validation: `Validation`.
        draw: `draw(example, generator)` makes the arrays of an example, as in training, with no caption
            dropped.
        noise: the `NoiseDrawing` that `draw` uses.
    """

    def __init__(
        self,
        trainer: Any,
        validation: Validation,
        draw: Callable[[Any, np.random.Generator], dict[str, Any]],
        noise: NoiseDrawing,
    ) -> None:
        self.trainer = trainer
        self.num_timesteps = noise.num_timesteps
        objective, settings = trainer.objective, trainer.settings
        self._losses = backend.jit(
            lambda batch: objective.call(batch),
            objective.variables,
            settings.jit_compile,
            title="validation loss",
        )
        # Each device computes the whole batch, whose weights are the same everywhere.
        self._limit = max(1, settings.train_batch_size // num_replicas())
        self.sets = {
            name: fixed_examples(examples, validation.count, settings.seed, draw, noise)
            for name, examples in validation.sets.items()
        }

    def __call__(self, step: int) -> None:
        """Measure with EMA and raw weights; log all figures, and print the means."""
        found = {}
        for weights in ("ema", "raw"):
            applied = self.trainer.ema.applied() if weights == "ema" else contextlib.nullcontext()
            with applied:
                for name in self.sets:
                    found[name, weights] = self.measure(name)
        figures = {}
        for (name, weights), (whole, bins) in found.items():
            title = f"validation_loss_{name}_{weights}"
            for ending, estimate in {"": whole, **bins}.items():
                figures[f"{title}{ending}"] = estimate.mean
                figures[f"{title}{ending}_standard_error"] = estimate.standard_error
        self.trainer.log.log_scalars(step, figures)
        if self.trainer.is_writer:
            print_above_bars(f"validated step {step}: {'; '.join(self._parts(found))}")

    def _parts(self, found):
        for name in self.sets:
            ema, raw = (found[name, weights][0] for weights in ("ema", "raw"))
            title = name.replace("_", "-")
            yield f"{title} loss {ema.mean:.5f} ± {ema.standard_error:.5f} (EMA), {raw.mean:.5f} (raw)"

    def losses(self, name: str) -> np.ndarray:
        """Return the loss of each example of a set with the current weights, float32 `(count,)`."""
        examples = self.sets[name]
        count = len(examples["timesteps"])
        parts = [
            backend.to_numpy(self._losses({key: array[batch] for key, array in examples.items()}))
            for batch in equal_batches(count, self._limit)
        ]
        return np.concatenate(parts)[:count]

    def measure(self, name: str) -> tuple[Estimate, dict[str, Estimate]]:
        """Return the mean loss of a set, and those of the bins as `_timesteps_FIRST_LAST` -> mean.

        Raises:
            UserError: a loss is not finite.
        """
        losses = self.losses(name).astype("float64")
        if not np.isfinite(losses).all():
            raise UserError(f"validation loss of {name}: not a finite number; the weights have diverged")
        timesteps = self.sets[name]["timesteps"].reshape(len(losses), -1)[:, 0]
        return estimates(losses, timesteps, self.num_timesteps)


def validation_maker(validation, draw, noise):
    """Return `make_validation` of `Trainer.run`; None without a `Validation`."""
    if validation is None:
        return None
    return lambda trainer: ValidationLoss(trainer, validation, draw, noise)


def estimates(losses, timesteps, num_timesteps, num_bins=NUM_BINS):
    """Return the mean of losses, and those of bins of the timestep that are not empty.

    The standard error of the whole is that of a stratified sample (Cochran, 1977, equation 5.13 without the
    finite correction), whose strata are the bins: what differs between bins is no error, as the share of
    each is fixed.

    Args:
        losses, timesteps: of each example, `(n,)`.
        num_timesteps: number of timesteps of the noise schedule.
        num_bins: number of bins of equal width.
    """
    places = timesteps.astype("int64") * num_bins // num_timesteps
    bins, variance = {}, 0.0
    for place in range(num_bins):
        inside = losses[places == place]
        if not len(inside):
            continue
        # Of a single loss no deviation is known; that of all is the most it could be.
        sample = inside if len(inside) > 1 else losses
        deviation = float(np.std(sample, ddof=1)) if len(sample) > 1 else 0.0
        error = deviation / len(inside) ** 0.5
        variance += (len(inside) / len(losses) * error) ** 2
        first, end = (-(-edge * num_timesteps // num_bins) for edge in (place, place + 1))
        bins[f"_timesteps_{first}_{end - 1}"] = Estimate(float(inside.mean()), error)
    return Estimate(float(losses.mean()), variance**0.5), bins


def fixed_examples(examples, count, seed, draw, noise):
    """Return the arrays of `count` training examples, stacked, as functions of the seed and their place.

    Args:
        examples: the source; if it has fewer than `count`, they are taken in turns, otherwise evenly. They
            are neither flipped nor cropped at random.
        count: number of training examples.
        seed: the run's.
        draw, noise: as `ValidationLoss` takes them.
    """
    order = np.random.Generator(np.random.Philox(key=(seed, _STREAM)))
    strata, jitter = order.permutation(count), order.random(count)
    places, drawn = _places(examples), []
    for index in range(count):
        place = places[index * len(places) // count if len(places) >= count else index % len(places)]
        generator = np.random.Generator(np.random.Philox(key=(seed, _STREAM), counter=(0, 0, 0, index + 1)))
        arrays = draw(examples[int(place)], generator)
        timestep = noise.timestep_at((strata[index] + jitter[index]) / count)
        drawn.append(arrays | {"timesteps": np.full_like(arrays["timesteps"], timestep)})
    batch = {name: np.stack([arrays[name] for arrays in drawn]) for name in drawn[0]}
    return examples.encode_batch(batch) if hasattr(examples, "encode_batch") else batch


def _places(examples):
    """Return the indices of the examples, or of those in the largest bucket."""
    buckets = getattr(examples, "buckets", None)
    if buckets is None:
        return np.arange(len(examples))
    return np.flatnonzero(buckets == np.argmax(np.bincount(buckets)))
