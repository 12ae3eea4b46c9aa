"""Corrects configs of early diffusers releases, as diffusers' pipelines do when they open a folder.

Some files differ from what the models were trained with, and the `__init__` of each diffusers pipeline
overrides them (0.42: `pipeline_stable_diffusion.py`, `..._img2img.py`, `..._inpaint.py`, `..._upscale.py`).
The dictionaries of schedulers stay unchanged; the corrected values are kept beside them.
"""

import re

UPSCALE, INPAINT = "StableDiffusionUpscalePipeline", "StableDiffusionInpaintPipeline"

_FIRST_RELEASE_WITH_SIZES = (0, 9)
_SMALLEST_SIDE = 64
_UPSCALER_SCALE = 0.08333

# The values of scheduler files that each pipeline overrides. Text-to-image and image-to-image override the
# same ones, which also apply to a folder of an unknown pipeline.
_TEXT_TO_IMAGE_REPAIRS = {"steps_offset": 1, "clip_sample": False}
_REPAIRS = {INPAINT: {"steps_offset": 1, "skip_prk_steps": True}, UPSCALE: {}}


def repaired(checkpoint, pipeline):
    """Return the `Checkpoint` of a folder with the corrections of its diffusers pipeline.

    Args:
        checkpoint: the folder's contents; a whole model.
        pipeline: the name of the class in the folder's `model_index.json`.
    """
    parts = dict(checkpoint.parts)
    if pipeline == UPSCALE:
        _set(parts, "vae", scaling_factor=_UPSCALER_SCALE)
    elif "unet" in parts and _is_too_small(parts["unet"].config):
        _set(parts, "unet", sample_size=_SMALLEST_SIDE)
    repairs = _REPAIRS.get(pipeline, _TEXT_TO_IMAGE_REPAIRS)
    return checkpoint._replace(parts=parts, scheduler_repairs=repairs)


def _set(parts, name, **values):
    if name in parts:
        parts[name] = parts[name]._replace(config=parts[name].config | values)


def _is_too_small(config):
    """Return whether a UNet's config is from a release that wrote sample_size 32 for models of 64."""
    side, release = config.get("sample_size"), config.get("_diffusers_version")
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", release) if isinstance(release, str) else None
    is_early = numbers is not None and (int(numbers[1]), int(numbers[2])) < _FIRST_RELEASE_WITH_SIZES
    return is_early and type(side) is int and 0 < side < _SMALLEST_SIDE
