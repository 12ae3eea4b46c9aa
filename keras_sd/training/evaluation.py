"""What a generating run measures on its way: a grid of samples, KID and CLIP score of raw and EMA weights."""

import contextlib

import numpy as np

from keras_sd import interruption
from keras_sd.metrics.features import extract
from keras_sd.metrics.kid import KernelInceptionDistance


class SampleEvaluation:
    """Draws samples with the weights of the moment and compares them with real images.

    Args:
        trainer: the `Trainer` of the run.
        grid: `grid()` gives one uint8 image that shows the validation prompts.
        sets: name of a set, such as "train" or "held_out" -> its examples, with `image`.
        generate: called with the examples of a set; gives as many images, made for them.
        extractor: what KID looks through (`metrics.features`); needed where there are sets.
        score: `metrics.clip_score.ClipScore` of the sets' captions, or None to leave it out.
    """

    def __init__(self, trainer, grid, *, sets=None, generate=None, extractor=None, score=None):
        self.trainer = trainer
        self.grid = grid
        self.sets = sets or {}
        self.generate = generate
        self.kid = KernelInceptionDistance(extractor, name=extractor.name) if self.sets else None
        self.score = score
        self.real_features = {
            name: extract(extractor, np.stack([example["image"] for example in examples]))
            for name, examples in self.sets.items()
        }

    def __call__(self, step):
        figures = {}
        for weights in ("ema", "raw"):
            applied = self.trainer.ema.applied() if weights == "ema" else contextlib.nullcontext()
            with applied:
                if weights == "ema":
                    with interruption.phase("evaluating: samples"):
                        self.trainer.log.log_image(step, "samples", self.grid())
                for name, examples in self.sets.items():
                    with interruption.phase("evaluating: KID"):
                        figures |= self._figures(name, examples, weights)
        self.trainer.log.log_scalars(step, figures)

    def _figures(self, name, examples, weights):
        """KID, and the CLIP score, of one set with the weights of the moment."""
        images = self.generate(examples)
        kid = self.kid.of_pairs(self.real_features[name], images)
        figures = {f"{self.kid.name}_{name}_{weights}": kid.mean}
        if self.score is not None:
            figures[f"clip_score_{name}_{weights}"] = self.score(name, images)
        return figures
