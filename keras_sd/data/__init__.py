"""Data: sources of captioned images, and the input pipeline over them.

sources      opens a source by name; endless batches that are functions of (seed, position)
folders      a folder of images with captions
framing      how images are cropped and resized to the sizes of a run, and flipped
buckets      the sizes, and which images go into which
images       reads and checks image files
tfds_source  TensorFlow Datasets
emoji        the data set of the bundled `emoji` model
"""
