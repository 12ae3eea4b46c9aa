"""Data: sources of captioned images, and the input pipeline over them.

sources          opens a source by name; endless batches that are functions of (seed, position)
folders          a folder of images with captions; listing finds its files, caption_files reads its captions
datasets_source  the `datasets` library: the hub, parquet, arrow, tars
tfds_source      TensorFlow Datasets
dataset_config   several data sets in one TOML file; joined_source is their examples
framing          how images are cropped and resized to the sizes of a run, and flipped
buckets          the sizes, and which images go into which
images           reads and checks image files; catalogue remembers what was found, faults lists what is wrong
captions         how a caption is drawn: which one, and which of its tags
encoding_store   encodings of images and captions on disk
survey           what a run would see of a data set
emoji            the data set of the bundled `emoji` model
"""
