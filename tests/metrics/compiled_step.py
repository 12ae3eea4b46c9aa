"""Run by test_kid.py under each backend: the KID metric in a Keras model's test step, printed as JSON."""

import json
import sys

import keras
import numpy as np
from keras import ops

from keras_sd.config import ImageEncoderConfig
from keras_sd.metrics.features import ClipFeatures
from keras_sd.metrics.kid import KernelInceptionDistance, polynomial_mmd
from keras_sd.models.image_encoder import ImageEncoder

TINY = ImageEncoderConfig(
    image_size=32,
    patch_size=16,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=8,
)


class Judge(keras.Model):
    """A model that only measures its input, in the one place where every backend lets metrics be updated."""

    def __init__(self, extractor):
        super().__init__()
        self.kid = KernelInceptionDistance(extractor)

    def call(self, batch):
        return batch

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=None):
        return ops.zeros(())

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.kid.update_state(y_pred["real"], y_pred["generated"])
        return {"kid": self.kid.result()}


def main():
    random = np.random.default_rng(0)
    real = random.integers(0, 256, (36, 64, 64, 3)).astype("uint8")
    generated = random.integers(0, 150, (36, 64, 64, 3)).astype("uint8")
    encoder = ImageEncoder(TINY)
    for variable in encoder.weights:
        variable.assign(0.2 * random.standard_normal(variable.shape))
    extractor = ClipFeatures(encoder)  # which shrinks the images, in the compiled step as well
    results = {
        "backend": keras.backend.backend(),
        "tensorflow_imported": sys.modules.get("tensorflow") is not None,
    }

    estimates = []
    for start in range(0, 36, 12):
        batch = [ops.convert_to_numpy(extractor(images[start : start + 12])) for images in (real, generated)]
        estimates.append(polynomial_mmd(*batch))
    results["numpy"] = float(np.mean(estimates))

    metric = KernelInceptionDistance(extractor)
    results["empty"] = float(metric.result())
    for start in range(0, 36, 12):
        metric.update_state(real[start : start + 12], generated[start : start + 12])
    metric.update_state(real[:1], generated[:1])
    results["eager"] = float(metric.result())

    model = Judge(extractor)
    model.compile(jit_compile=True)
    logs = model.evaluate({"real": real, "generated": generated}, batch_size=12, verbose=0, return_dict=True)
    results["compiled"] = float(logs["kid"])
    results["variables"] = [list(variable.shape) for variable in model.variables]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
