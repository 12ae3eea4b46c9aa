"""Run by test_inception.py under each backend: the features of images by a file of weights.

Arguments: the file of weights, a safetensors file of sets of images, and the safetensors file to write.
"""

import sys

from safetensors.numpy import load_file, save_file

from keras_sd.metrics.features import PublishedInceptionFeatures, extract


def main():
    weights, images, output = sys.argv[1:]
    extractor = PublishedInceptionFeatures(weights)
    save_file(
        {name: extract(extractor, array, batch_size=6) for name, array in load_file(images).items()}, output
    )


if __name__ == "__main__":
    main()
