"""Imports what programs use, in the process that they are forked from: torch and its libraries, Keras on JAX.

See `tests.reference` and `tests.programs`.
"""

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["KERAS_BACKEND"] = "jax"
sys.modules["tensorflow"] = None  # a library that looks for it finds none

import open_clip  # noqa: E402, F401
import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402, F401  # with all that it is made of
from transformers import CLIPVisionModelWithProjection  # noqa: E402, F401

from keras_sd.pipeline import stable_diffusion  # noqa: E402, F401
from keras_sd.training import text_to_image  # noqa: E402, F401

torch.set_num_threads(1)
