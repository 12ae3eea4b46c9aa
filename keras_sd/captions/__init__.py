"""Captions for a folder of images: a sentence by BLIP, and what CLIP finds in a vocabulary."""

from keras_sd.captions.dataset import CaptionSettings, CleaningSettings, caption_folder
from keras_sd.captions.interrogator import MODES, Interrogator
from keras_sd.captions.vocabulary import Vocabulary

__all__ = ["MODES", "CaptionSettings", "CleaningSettings", "Interrogator", "Vocabulary", "caption_folder"]
