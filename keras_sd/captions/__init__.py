"""Captions for a folder of images: a sentence by BLIP, and phrases that CLIP picks from a vocabulary.

dataset           a folder of images in, `metadata.jsonl` out
interrogator      builds one caption from a sentence and the phrases (modes of CLIP Interrogator)
captioner         BLIP: one sentence for an image
ranking           OpenCLIP: embeddings, and exact nearest-neighbour search
vocabulary        the lists of phrases
cleaning          removes artists' names, adds product words, limits the length
keywords          TF-IDF keywords of product introductions
caption_settings  the options of captioning and of cleaning
edited_captions   distinguishes captions that people wrote from generated ones
journal           what has been captioned so far, safe against a kill
workers           one process for each device
clip_folder       opens an OpenCLIP folder without running code from it
"""

from keras_sd.captions.dataset import CaptionSettings, CleaningSettings, caption_folder
from keras_sd.captions.interrogator import MODES, Interrogator
from keras_sd.captions.vocabulary import Vocabulary

__all__ = ["MODES", "CaptionSettings", "CleaningSettings", "Interrogator", "Vocabulary", "caption_folder"]
