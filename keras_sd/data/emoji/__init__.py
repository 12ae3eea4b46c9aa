"""The data set, the architecture and the evaluation of the bundled `emoji` model.

source        images and captions of Twemoji and OpenMoji
names         prompt-like names for emoji
architecture  the configs of the model's parts
evaluation    the figures that the model is measured by, with their bars
retrieval     nearest neighbours in pixels, for the evaluation
tfds_builder  the same data set for TensorFlow Datasets
"""
