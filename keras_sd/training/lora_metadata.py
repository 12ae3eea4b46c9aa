"""What the header of a trained LoRA tells: kohya's `ss_` entries, and Stability's ModelSpec.

A1111, ComfyUI's tools and model sites show them and find the trigger words there. They hold no time, so that
a resumed run ends with the same bytes.
"""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_sd.models.unet import UNet
from keras_sd.training.adapter_settings import AdapterSettings

METADATA = "lora_metadata.json"  # in the run folder, for `keras-sd export`
_MOST_TAGS = 2000  # of a folder; a header has limits
_MODEL_VERSIONS = {768: "v1", 1024: "v2"}  # by the width of the text encoder

# kohya's entries -> options of the commands.
_OPTIONS = {
    "ss_learning_rate": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_total_batch_size": "train_batch_size",
    "ss_mixed_precision": "mixed_precision",
    "ss_optimizer": "optimizer",
    "ss_seed": "seed",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_caption_dropout_rate": "proportion_empty_prompts",
    "ss_clip_skip": "clip_skip",
    "ss_num_epochs": "num_train_epochs",
}


def training_metadata(
    settings: AdapterSettings,
    unet: UNet,
    prediction_type: str,
    side: int,
    options: Mapping[str, Any],
    sources: list[Any],
    trained: tuple[str, ...],
) -> dict[str, str]:
    """Return the header's entries for the LoRA of a run.

    Args:
        settings: of the updates.
        unet: that is trained; its config tells the version of Stable Diffusion.
        prediction_type: of the noise schedule.
        side: of the training images in pixels.
        options: of the training command.
        sources: the sources of training images.
        trained: the names of the trained parts.
    """
    name = Path(options["output_dir"]).name
    counts, tags = _of_images(sources, options)
    entries: dict[str, Any] = {
        entry: options[option] for entry, option in _OPTIONS.items() if options.get(option) is not None
    }
    entries |= {
        "ss_output_name": name,
        "ss_sd_model_name": Path(options["pretrained_model_name_or_path"]).name,
        "ss_network_module": _module(settings),
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.rank if settings.alpha is None else settings.alpha,
        "ss_network_args": _arguments(settings),
        "ss_num_train_images": sum(entry["n_repeats"] * entry["img_count"] for entry in counts.values()),
        "ss_dataset_dirs": counts,
        "ss_tag_frequency": tags,
        "ss_resolution": str((side, side)),
        "ss_network_train_unet_only": trained == ("unet",),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
    }
    version = _MODEL_VERSIONS.get(unet.config.cross_attention_dim)
    if version:
        is_v_prediction = prediction_type == "v_prediction"
        entries["ss_base_model_version"] = f"sd_{version}" + "_v" * is_v_prediction
        entries["ss_v2"] = version == "v2"
        architecture = "stable-diffusion-v1" if version == "v1" else "stable-diffusion-v2-512"
        if is_v_prediction:
            architecture = architecture.replace("512", "768-v")
        entries["modelspec.architecture"] = f"{architecture}/lora"
    words = options.get("trigger_words") or ()
    if words:
        entries["modelspec.trigger_phrase"] = ", ".join(words)
    return {key: _text(value) for key, value in entries.items()}


def _text(value):
    """Return a value as kohya writes it: JSON for collections, Python's words for others."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _module(settings):
    is_lycoris = settings.adapter == "lokr" or settings.use_dora or settings.use_rslora
    return "lycoris.kohya" if is_lycoris else "networks.lora"


def _arguments(settings):
    """Return the settings beside rank and alpha, in the names of kohya's and LyCORIS' network arguments."""
    arguments = {}
    if _module(settings) == "lycoris.kohya":
        arguments["algo"] = "lokr" if settings.adapter == "lokr" else "locon"
        arguments |= {"dora_wd": settings.use_dora, "rs_lora": settings.use_rslora}
    if settings.conv_rank is not None:
        alpha = settings.conv_rank if settings.conv_alpha is None else settings.conv_alpha
        arguments |= {"conv_dim": settings.conv_rank, "conv_alpha": alpha}
    if settings.lokr_factor is not None:
        arguments["factor"] = settings.lokr_factor
    for name, blocks in (
        ("rank_by_block", settings.rank_by_block),
        ("alpha_by_block", settings.alpha_by_block),
    ):
        if blocks:
            arguments[name] = blocks
    return arguments


def _of_images(sources, options):
    """Return the numbers of images and the tags of each folder, by the folder's name."""
    counts: dict[str, dict[str, int]] = {}
    tags: dict[str, collections.Counter] = {}
    usual = next(
        (
            Path(options[name]).name
            for name in ("train_data_dir", "instance_data_dir", "dataset_config", "dataset_name")
            if options.get(name)
        ),
        "images",
    )
    for source in sources:
        repeats = source.repeats() if hasattr(source, "repeats") else None
        for index, captions in enumerate(source.captions()):
            folder = _folder(source, index) or usual
            times = 1 if repeats is None else int(repeats[index])
            entry = counts.setdefault(folder, {"n_repeats": times, "img_count": 0})
            entry["img_count"] += 1
            found = (tag.strip().lower() for tag in (captions[0] if captions else "").split(","))
            tags.setdefault(folder, collections.Counter()).update(tag for tag in found if tag)
    return counts, {folder: dict(counter.most_common(_MOST_TAGS)) for folder, counter in tags.items()}


def _folder(source, index):
    """Return the name of the folder that an image is in; None if it is in no folder."""
    if not hasattr(source, "folder"):
        return None
    return Path(source.details(index)["path"]).parent.name
