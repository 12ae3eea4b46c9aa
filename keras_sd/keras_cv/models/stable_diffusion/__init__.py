"""The parts of Stable Diffusion by KerasCV's names, each a Keras model as it is there.

The modules have KerasCV's names too: `clip_tokenizer`, `text_encoder`, `diffusion_model`, `image_encoder`,
`decoder`, `noise_scheduler`, `stable_diffusion`.
"""

from keras_sd.keras_cv.models.stable_diffusion.clip_tokenizer import SimpleTokenizer
from keras_sd.keras_cv.models.stable_diffusion.decoder import Decoder
from keras_sd.keras_cv.models.stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from keras_sd.keras_cv.models.stable_diffusion.image_encoder import ImageEncoder
from keras_sd.keras_cv.models.stable_diffusion.noise_scheduler import NoiseScheduler
from keras_sd.keras_cv.models.stable_diffusion.text_encoder import TextEncoder, TextEncoderV2

__all__ = [
    "Decoder",
    "DiffusionModel",
    "DiffusionModelV2",
    "ImageEncoder",
    "NoiseScheduler",
    "SimpleTokenizer",
    "TextEncoder",
    "TextEncoderV2",
]
