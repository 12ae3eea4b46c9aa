"""The models that go by a name: where each is found, and under which licence."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from keras_sd.errors import UserError
from keras_sd.weights.diffusers_folder import has_weights, weights_path

_BUNDLED = Path(__file__).parent / "bundled"

# What a folder in diffusers' layout needs; hubs keep the same weights in other formats beside them.
_HUB_FILES = [
    "model_index.json",
    *(f"{part}/*" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "low_res_scheduler")),
]
# What is tried one after the other until there are weights: plain ones, half precision, torch's own files.
_HUB_LEFT_OUT = ["*.msgpack", "*.onnx*", "*non_ema*"]
_HUB_TRIES = [["*.bin", "*fp16*"], ["*.bin"], []]

# A name that ends so means a file, which no hub has for a model's name.
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".h5", ".hdf5")


class Preset(NamedTuple):
    """A model's source, a folder or a hub id, its licence and the SHA-256 of its UNet's file, if pinned."""

    source: Path | str
    licence: str
    sha256: str | None = None


PRESETS = {
    "emoji": Preset(
        _BUNDLED / "emoji", "CC-BY-4.0", "d38786460918894ef71e8e43c1aa3ef92dc096ef487a20ab788dee2f4d6be783"
    ),
    "emoji-upscaler": Preset(
        _BUNDLED / "emoji_upscaler",
        "CC-BY-4.0",
        "b6bd21de50b567ea6782e2d3a33254c6dc4326e0daa81ceb69f31d9a13f06581",
    ),
    "sd-1.5": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML-OpenRAIL-M"),
    "sd-2.1": Preset("stabilityai/stable-diffusion-2-1", "CreativeML-OpenRAIL++-M"),
    "sd-2.1-base": Preset("stabilityai/stable-diffusion-2-1-base", "CreativeML-OpenRAIL++-M"),
}


def find(name):
    """The folder, in diffusers' layout, of a preset, of a hub id ("owner/model") or of a path to a folder.

    Raises:
        UserError: there is no such preset, or it is neither on this machine nor to be had.
    """
    if name in PRESETS:
        preset = PRESETS[name]
        folder = preset.source if isinstance(preset.source, Path) else _from_hub(preset.source)
        _check(name, folder, preset.sha256)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).suffix.lower() in _FILE_SUFFIXES:
        raise UserError(
            f"{str(name)!r}: no such file; check its path, or give a hub id (owner/model) or a preset: "
            f"{', '.join(PRESETS)}"
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _from_hub(str(name))
    raise UserError(
        f"{str(name)!r}: no such model; give a folder, a file, a hub id (owner/model) or a preset: "
        f"{', '.join(PRESETS)}"
    )


def _check(name, folder, sha256):
    if not folder.is_dir():
        raise UserError(f"preset {name!r}: {folder} is missing; install keras_sd again")
    if sha256 is not None and file_hash(weights_path(folder, "unet")) != sha256:
        raise UserError(f"preset {name!r}: {folder} is damaged (its SHA-256 differs); install keras_sd again")


def file_hash(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(repository):
    """The folder of a model from the Hugging Face hub or its cache."""
    from huggingface_hub import snapshot_download  # here, as importing it takes long

    try:
        for left_out in _HUB_TRIES:
            ignored = [*_HUB_LEFT_OUT, *left_out]
            folder = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=ignored))
            if has_weights(folder, "unet"):
                break
        return folder
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repository}: neither a folder here nor to be had from the hub ({type(error).__name__}); "
            "go online once so that it is cached, or give the path of a downloaded folder"
        ) from error
