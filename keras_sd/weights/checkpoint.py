"""A checkpoint of any format in memory: `Checkpoint`, with a `Part` for each network.

Readers of every format return a `Checkpoint` in the names, layout and config keys of the diffusers
folder; writers take one. Tensors are in torch layout, as published, and may be mapped from disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLIP_HEAD = ("text_projection.weight", "logit_scale")
"""The tensors that make CLIP's two towers comparable.

They are stored with the image tower, since the text tower's file has no place for them in diffusers.
"""


class Part(NamedTuple):
    """One model of a checkpoint.

    Attributes:
        config: dictionary of its `config.json`, in the keys of diffusers or transformers.
        tensors: arrays in torch layout by their published names.
        source: the file they come from, for error messages.
    """

    config: dict
    tensors: Mapping[str, np.ndarray]
    source: Path


class Checkpoint(NamedTuple):
    """The parts of a model that a file or folder holds, with the files that belong to them.

    Attributes:
        parts: dictionary of name -> `Part`; names are "text_encoder", "unet", "vae" and "image_encoder".
        scheduler: dictionary of `scheduler_config.json`, or None.
        low_res_scheduler: the same for the noise on an upscaler's low-resolution image, or None.
        tokenizer: folder of the tokenizer's files, or None if there are none beside the weights.
        scheduler_repairs: values that replace those in `scheduler`, or None.
    """

    parts: dict[str, Part]
    scheduler: dict | None = None
    low_res_scheduler: dict | None = None
    tokenizer: Path | None = None
    scheduler_repairs: dict | None = None
