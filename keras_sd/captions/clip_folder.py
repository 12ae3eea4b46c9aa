"""Opens an OpenCLIP folder in torch without running code from it.

open_clip passes names from `open_clip_config.json` on to timm and transformers, whose `trust_remote_code` can
run Python files beside the weights. This module reads the folder with the readers of this package and gives
open_clip a new config that holds numbers only.
"""

import numpy as np

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.weights.open_clip import CONFIG_NAME, open_clip_config, open_clip_tensors, read_open_clip

# In the order in which open_clip looks for them.
_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)

# Config entries for which open_clip calls another library.
_FOREIGN = {
    "text_cfg": ("hf_model_name", "tokenizer_kwargs", "tokenizer_mode"),
    "vision_cfg": ("timm_model_name",),
}


def open_folder(folder, device):
    """Open a CLIP with a vision transformer and its own text transformer.

    Args:
        folder: holds `open_clip_config.json` and the weights. If its `text_cfg` has a `hf_tokenizer_name`,
            the folder must hold the tokenizer's files too; otherwise CLIP's own tokenizer is used.
        device: torch device.

    Returns:
        The torch model, a function from a Pillow image to a tensor, and a function from a list of texts to
        token ids `(n, tokens)`.

    Raises:
        UserError: something is missing, damaged, or asks for another library.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    folder = checked_path("folder", folder)
    entries = _checked_config(folder)
    parts = read_open_clip(_weights_file(folder)).parts
    text, image = parts["text_encoder"], parts["image_encoder"]
    config = open_clip_config(text.config, image.config)
    tensors = {name: np.array(a, "float32") for name, a in open_clip_tensors(text, image).items()}
    bad = next((name for name, array in tensors.items() if not np.isfinite(array).all()), None)
    if bad is not None:
        raise UserError(f"CLIP {folder}: {bad} holds NaN or infinity; use undamaged files")
    model = open_clip.CLIP(**config)
    tensors["logit_scale"] = tensors["logit_scale"].reshape(model.logit_scale.shape)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    pixels = merge_preprocess_dict(PreprocessCfg(), entries.get("preprocess_cfg") or {})
    pixels["size"] = config["vision_cfg"]["image_size"]
    length = config["text_cfg"]["context_length"]
    return (
        model.to(device).eval(),
        image_transform_v2(PreprocessCfg(**pixels), is_train=False),
        _tokenize(folder, entries["model_cfg"]["text_cfg"], length, text.config["vocab_size"]),
    )


def _checked_config(folder):
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG_NAME}; `keras-sd convert` writes such a folder")
    entries = read_json(path)
    config = entries.get("model_cfg")
    for tower, names in _FOREIGN.items():
        values = config.get(tower) if isinstance(config, dict) else None
        if not isinstance(values, dict):
            raise UserError(f"{path}: has no model_cfg with text_cfg and vision_cfg; use OpenCLIP's own file")
        found = next((name for name in names if values.get(name)), None)
        if found:
            raise UserError(
                f"{path}: {tower} {found} needs another library, which is not allowed for a folder; give a "
                "CLIP with a vision transformer, or open_clip's name of the model and the file: NAME/FILE"
            )
    return entries


def _weights_file(folder):
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: no weights; put {_WEIGHTS[0]} beside {CONFIG_NAME}")
    return found


def _tokenize(folder, text_cfg, length, vocabulary_size):
    """Return the function from texts to token ids `(n, length)`; longer texts are cut."""
    import open_clip
    import torch

    if not text_cfg.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=length)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > vocabulary_size:
        raise UserError(
            f"CLIP {folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocabulary_size}; "
            "put the model's own files there"
        )
    clean = open_clip.tokenizer.get_clean_fn("whitespace")

    def tokenize(texts):
        ids = np.full((len(texts), length), tokenizer.pad_token_id, "int64")
        for row, tokens in zip(ids, tokenizer.encode([clean(text) for text in texts]), strict=True):
            kept = [tokenizer.begin_token_id, *tokens[: length - 2], tokenizer.end_token_id]
            row[: len(kept)] = kept
        return torch.from_numpy(ids)

    return tokenize
