"""KerasCV's own models at their full size, with random weights, through their H5 files.

KerasCV departs from Stable Diffusion in two places: its GELU in the UNet and in the second text encoder is
the tanh approximation, and the epsilon of its VAE's normalisations is 1e-5 in place of 1e-6. Each model is
compared as it is and with that put right. What is measured goes to `benchmarks/keras-cv-parity.json`.
"""

import datetime
import importlib.metadata
import json
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.keras_cv_h5 import read_keras_cv
from keras_sd.weights.rules import open_model
from tests.weights import test_keras_cv_h5 as small

RECORD = Path(__file__).parents[2] / "benchmarks" / "keras-cv-parity.json"
LIBRARIES = ("keras-cv", "keras", "tensorflow")
BAR = 1e-4
# Its VAE's float32 rounds more coarsely than that: it is 3e-4 away from its own float64.
VAE_BAR = 1e-3
TOKENS = 77


def perturbed(model, seed=0):
    """The model with random biases and gains; kernels keep their initial values."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        if len(variable.shape) == 1:
            values = 0.1 * generator.standard_normal(variable.shape) + (variable.name == "gamma")
            variable.assign(values.astype("float32"))
    return model


def opened(model_class, config_class, part):
    return open_model(model_class, config_class.from_dict(part.config), part.tensors, source=part.source)


def record(name, as_it_is, put_right):
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"parts": {}}
    recorded |= {
        "command": "make test-full ARGS=tests/full_size/test_keras_cv.py",
        "date": datetime.date.today().isoformat(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }
    recorded["parts"][name] = {"as_it_is": float(as_it_is), "put_right": float(put_right)}
    RECORD.write_text(json.dumps(recorded, indent=2) + "\n")


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_text_encoder(tmp_path, version):
    classes = {"V1": small.text_encoder.TextEncoder, "V2": small.text_encoder.TextEncoderV2}
    theirs = perturbed(classes[version](TOKENS, download_weights=False))
    part = read_keras_cv(small.write_h5(tmp_path / "kcv_encoder.h5", theirs)).parts["text_encoder"]
    ids = np.random.default_rng(1).integers(0, 49408, (2, TOKENS)).astype("int32")
    positions = np.tile(np.arange(TOKENS, dtype="int32"), (2, 1))
    ours = opened(TextEncoder, TextEncoderConfig, part)(ids)
    as_it_is = small.difference(ours, theirs([ids, positions]))
    if version == "V2":
        for layer in theirs.layers:
            if hasattr(layer, "clip_attn"):
                layer.activation = small.exact_gelu
    put_right = small.difference(ours, theirs([ids, positions]))
    record(f"text encoder {version}", as_it_is, put_right)
    assert put_right <= BAR


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_diffusion_model(tmp_path, version, monkeypatch):
    classes = {"V1": small.diffusion_model.DiffusionModel, "V2": small.diffusion_model.DiffusionModelV2}
    theirs = perturbed(classes[version](256, 256, TOKENS, download_weights=False))
    part = read_keras_cv(small.write_h5(tmp_path / "kcv_diffusion_model.h5", theirs)).parts["unet"]
    latents, timesteps = small.normal(1, 32, 32, 4), np.array([501.0], "float32")
    context = small.normal(1, TOKENS, {"V1": 768, "V2": 1024}[version])
    ours = opened(UNet, UNetConfig, part)([latents, timesteps, context])
    inputs = [latents, small._timestep_features(timesteps, 320), context]
    as_it_is = small.difference(ours, theirs(inputs))
    monkeypatch.setattr(small.diffusion_model.GEGLU, "call", small.exact_geglu)
    put_right = small.difference(ours, theirs(inputs))
    record(f"UNet {version}, 256 px", as_it_is, put_right)
    assert put_right <= BAR


def test_vae(tmp_path):
    decoder = perturbed(small.decoder.Decoder(256, 256, download_weights=False))
    encoder = perturbed(small.image_encoder.ImageEncoder(download_weights=False), 1)
    files = [
        small.write_h5(tmp_path / "kcv_decoder.h5", decoder),
        small.write_h5(tmp_path / "vae_encoder.h5", encoder),
    ]
    vae = opened(AutoencoderKL, VAEConfig, read_keras_cv(files).parts["vae"])
    latents = small.normal(1, 32, 32, 4)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 256, 256, 3)).astype("float32")
    scale = vae.config.scaling_factor
    decoded, encoded = vae.decode(latents / scale), vae.encode(images).mode() * scale
    as_they_are = small.difference(decoded, decoder(latents)), small.difference(encoded, encoder(images))
    for layer in [*decoder._flatten_layers(), *encoder._flatten_layers()]:
        if isinstance(layer, keras.layers.GroupNormalization):
            layer.epsilon = 1e-6
    put_right = small.difference(decoded, decoder(latents)), small.difference(encoded, encoder(images))
    for name, first, second in zip(("VAE decode", "VAE encode"), as_they_are, put_right, strict=True):
        record(f"{name}, 256 px", first, second)
    assert max(put_right) <= VAE_BAR
