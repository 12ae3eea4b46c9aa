"""What a generating run measures on its way: a grid of samples, and KID of raw and EMA weights."""

import contextlib

from keras_sd.metrics.features import extract
from keras_sd.metrics.kid import paired_kernel_inception_distance


class SampleEvaluation:
    """Draws samples with the weights of the moment and compares them with real pictures.

    Args:
        trainer: the `Trainer` of the run.
        extractor: what KID looks through (`metrics.features`), or None to leave KID out.
        real: name of a set, such as "train" or "held_out" -> its uint8 pictures `(n, h, w, 3)`.
        generate: `generate(name)` gives as many pictures, made for that set.
        grid: `grid()` gives one uint8 picture that shows the validation prompts.
    """

    def __init__(self, trainer, extractor, real, generate, grid):
        self.trainer = trainer
        self.extractor = extractor
        self.generate = generate
        self.grid = grid
        self.real_features = {name: extract(extractor, images) for name, images in real.items() if extractor}

    def __call__(self, step):
        figures = {}
        for weights in ("ema", "raw"):
            applied = self.trainer.ema.applied() if weights == "ema" else contextlib.nullcontext()
            with applied:
                if weights == "ema":
                    self.trainer.log.log_image(step, "samples", self.grid())
                for name, real in self.real_features.items():
                    generated = extract(self.extractor, self.generate(name))
                    kid = paired_kernel_inception_distance(real, generated)
                    figures[f"{self.extractor.name}_{name}_{weights}"] = kid.mean
        self.trainer.log.log_scalars(step, figures)
