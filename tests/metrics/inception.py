"""Inception v3 with random weights, for tests; run as a program, it computes features under any backend.

Arguments of the program: the file of weights, a safetensors file of sets of images, and the safetensors file
to write.
"""

import sys

import numpy as np
from safetensors.numpy import load_file, save_file

from keras_sd.metrics.features import PublishedInceptionFeatures, extract
from keras_sd.models.inception import InceptionV3
from keras_sd.weights.rules import torch_state


def random_weights():
    """Weights under their published names under which signals neither vanish nor grow."""
    generator = np.random.default_rng(0)
    weights = {}
    for name, array in torch_state(InceptionV3()).items():
        if array.ndim == 4:
            values = generator.standard_normal(array.shape) * (2 / np.prod(array.shape[1:])) ** 0.5
        elif name.endswith((".weight", ".running_var")):
            values = generator.uniform(0.5, 1.5, array.shape)
        else:
            values = 0.3 * generator.standard_normal(array.shape)
        if name.startswith("Mixed_7c") and name.endswith(("bn.weight", "bn.bias")):
            values *= 0.1  # features below 1, as the published ones
        weights[name] = values.astype("float32")
    return weights


def coloured_images(seed, count, height, width):
    """Images of any colours with a slope and some noise, whose features differ."""
    generator = np.random.default_rng(seed)
    colours, slopes = generator.uniform(0, 255, (2, count, 1, 1, 3))
    rows = np.linspace(-0.5, 0.5, height)[None, :, None, None]
    noise = generator.normal(0, 20, (count, height, width, 3))
    return np.clip(colours + slopes * rows + noise, 0, 255).astype("uint8")


def main():
    weights, images, output = sys.argv[1:]
    extractor = PublishedInceptionFeatures(weights)
    sets = load_file(images).items()
    save_file({name: extract(extractor, array, batch_size=6) for name, array in sets}, output)


if __name__ == "__main__":
    main()
