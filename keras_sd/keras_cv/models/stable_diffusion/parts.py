"""Creation of single parts of a model, as KerasCV's constructors do it."""

import dataclasses
from pathlib import Path

import keras

from keras_sd import presets
from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.models.precision import dtype_policy
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.keras_cv_h5 import read_keras_cv
from keras_sd.weights.loading import load_part
from keras_sd.weights.rules import load_weights

_PARTS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
}


def make_part(part, model, published, download_weights, **changes):
    """Return a part of `keras_sd.models`, in the precision of Keras' global dtype policy.

    Args:
        part: "text_encoder", "unet" or "vae".
        model: the name of a model (preset, hub id, folder); None for the published one.
        published: the published model's preset, and the values of its config that differ from the defaults.
        download_weights: whether to load the model's weights; otherwise they are random.
        changes: changed values of the config; only with random weights.

    Raises:
        UserError: `changes` with `download_weights`; or as `presets.find`.
    """
    preset, values = published
    policy = keras.config.dtype_policy().name
    if download_weights and not changes:
        return load_part(presets.find(model or preset), part, policy)
    if download_weights:
        raise UserError(
            f"{part}: published weights have another {', '.join(changes)}; make it with "
            "download_weights=False, and set the weights"
        )
    model_class, config_class = _PARTS[part]
    if model is None:
        config = config_class(**values)
    else:
        config = config_class.from_dict(read_json(presets.find(model) / part / "config.json"))
    with dtype_policy(policy):
        return model_class(dataclasses.replace(config, **changes))


def load_h5(part, model, path):
    """Load an H5 file of KerasCV into a part; return False for any other kind of file.

    Raises:
        UserError: the file holds another part.
    """
    path = Path(path)
    if path.suffix not in (".h5", ".hdf5") or path.name.endswith(".weights.h5"):
        return False
    parts = read_keras_cv(path).parts
    if part not in parts:
        raise UserError(f"{path}: holds no {part}; give KerasCV's file of that part")
    load_weights(model, parts[part].tensors, source=path)
    return True
