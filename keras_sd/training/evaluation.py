"""Evaluation during training: a grid of samples, KID, FID and CLIP score, with raw and EMA weights."""

import contextlib

import numpy as np

from keras_sd import interruption
from keras_sd.metrics.features import extract
from keras_sd.metrics.fid import frechet_inception_distance, name_of
from keras_sd.metrics.kid import paired_kernel_inception_distance


def on_one_size(images):
    """Return images of any sizes, uint8 `(h, w, 3)` each, on white of the largest height and width."""
    height, width = (max(image.shape[axis] for image in images) for axis in range(2))
    sheets = np.full((len(images), height, width, 3), 255, "uint8")
    for sheet, image in zip(sheets, images, strict=True):
        sheet[: image.shape[0], : image.shape[1]] = image
    return sheets


class SampleEvaluation:
    """Generates samples with the current weights and compares them with real images.

    Args:
        trainer: the `Trainer` of the run.
        grid: `grid()` returns one uint8 image with samples for the validation prompts.
        sets: dictionary of set name, such as "train" or "held_out", -> its examples, with `image`.
        generate: function from the examples of a set to generated images, one for each.
        extractor: the feature extractor of KID and FID (`metrics.features`); needed if there are sets.
        score: `metrics.clip_score.ClipScore` of the sets' captions, or None for no score.
    """

    def __init__(self, trainer, grid, *, sets=None, generate=None, extractor=None, score=None):
        self.trainer = trainer
        self.grid = grid
        self.sets = sets or {}
        self.generate = generate
        self.extractor = extractor
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
                    where = f"on {name.replace('_', '-')} images"
                    with interruption.phase(f"evaluating: KID and FID of the {weights} weights {where}"):
                        figures |= self._figures(name, examples, weights)
        self.trainer.log_figures(step, figures)

    def _figures(self, name, examples, weights):
        """Return KID, FID and the CLIP score of one set with the current weights."""
        images = self.generate(examples)
        real, generated = self.real_features[name], extract(self.extractor, images)
        kid = paired_kernel_inception_distance(real, generated)
        title = self.extractor.name
        figures = {
            f"{title}_{name}_{weights}": kid.mean,
            f"{name_of(title)}_{name}_{weights}": frechet_inception_distance(real, generated),
        }
        if self.score is not None:
            figures[f"clip_score_{name}_{weights}"] = self.score(name, images)
        return figures
