"""Imports what reference programs use, in the process that they are forked from: see `tests.reference`."""

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.modules["tensorflow"] = None  # a library that looks for it finds none

import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402, F401  # with all that it is made of
from transformers import CLIPVisionModelWithProjection  # noqa: E402, F401

torch.set_num_threads(1)
