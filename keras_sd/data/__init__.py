"""Data: sources of captioned images, and the input pipeline over them.

sources      opens a source by name; endless batches that are functions of (seed, position)
folders      a folder of images with captions
images       reads and checks image files
tfds_source  TensorFlow Datasets
emoji        the data set of the bundled `emoji` model
"""
