"""Stable Diffusion 1.5 and 2.1 at their full size against diffusers and transformers.

Models of the published configs with random weights are written by those libraries and read by us.
What is measured goes to `benchmarks/parity.json`. One part is in memory at a time: up to 8 GB.
"""

import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_sd import backend
from keras_sd.weights.loading import load_part
from tests.models import published

RECORD = Path(__file__).parents[2] / "benchmarks" / "parity.json"
LIBRARIES = ("diffusers", "transformers", "torch", "keras", "tensorflow")
BAR = 1e-4

MODELS = {
    "sd-1.5": {
        "text_encoder": published.SD1_TEXT_ENCODER,
        "unet": published.SD1_UNET,
        "vae": published.SD1_VAE,
    },
    "sd-2.1": {
        "text_encoder": published.SD2_TEXT_ENCODER,
        "unet": published.SD2_UNET,
        "vae": published.SD2_VAE,
    },
}

# Run in a process of its own, as torch and TensorFlow do not share one: folder, part.
REFERENCE = """
import json, sys
from pathlib import Path

sys.modules["tensorflow"] = None
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

torch.set_grad_enabled(False)
torch.manual_seed(0)
folder, part = Path(sys.argv[1]), sys.argv[2]
inputs = load_file(folder / "inputs.safetensors")
config = json.loads((folder / "config.json").read_text())


def channels_first(name):
    return inputs[name].permute(0, 3, 1, 2)


def channels_last(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous()


if part == "text_encoder":
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    outputs = {"text encoder": model(inputs["ids"]).last_hidden_state}
elif part == "unet":
    model = UNet2DConditionModel.from_config(config).eval()
    noise = model(channels_first("latents"), inputs["timesteps"], inputs["context"]).sample
    outputs = {"UNet": channels_last(noise)}
else:
    model = AutoencoderKL.from_config(config).eval()
    outputs = {
        "VAE encode": channels_last(model.encode(channels_first("images")).latent_dist.mean),
        "VAE decode": channels_last(model.decode(channels_first("latents")).sample),
    }
model.save_pretrained(folder / part)
save_file(outputs, folder / "outputs.safetensors")
"""


def inputs_of(part, config):
    generator = np.random.default_rng(0)
    if part == "text_encoder":
        return {"ids": generator.integers(0, config["vocab_size"], (2, 77)).astype("int32")}
    if part == "unet":
        side = config["sample_size"]
        return {
            "latents": generator.standard_normal((1, side, side, 4)).astype("float32"),
            "timesteps": np.array([601], "int32"),
            "context": generator.standard_normal((1, 77, config["cross_attention_dim"])).astype("float32"),
        }
    return {
        "images": generator.uniform(-1, 1, (1, 256, 256, 3)).astype("float32"),
        "latents": generator.standard_normal((1, 32, 32, 4)).astype("float32"),
    }


def our_outputs(part, model, inputs):
    """The same outputs from our model, compiled as the pipeline compiles them."""

    def compiled(function, *names):
        return ops.convert_to_numpy(backend.jit(function, model.variables)(*(inputs[name] for name in names)))

    if part == "text_encoder":
        return {"text encoder": compiled(lambda ids: model(ids), "ids")}
    if part == "unet":
        return {"UNet": compiled(lambda *arrays: model(list(arrays)), "latents", "timesteps", "context")}
    return {
        "VAE encode": compiled(lambda images: model.encode(images).mode(), "images"),
        "VAE decode": compiled(model.decode, "latents"),
    }


def record(entries):
    """Puts measured entries into the record, in place of older ones of the same parts."""
    now = {(entry["model"], entry["part"]) for entry in entries}
    known = json.loads(RECORD.read_text())["parts"] if RECORD.exists() else []
    kept = [entry for entry in known if (entry["model"], entry["part"]) not in now]
    parts = sorted(kept + entries, key=lambda entry: (entry["model"], entry["part"]))
    values = {"command": "make test-full", "largest_allowed_ratio": BAR, "parts": parts}
    RECORD.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def measured(model_name, part, ours, expected):
    difference = float(np.abs(ours - expected).max())
    deviation = float(expected.std())
    return {
        "model": model_name,
        "part": part,
        "output_shape": list(expected.shape),
        "largest_absolute_difference": difference,
        "output_standard_deviation": deviation,
        "ratio": difference / deviation,
        "date": datetime.date.today().isoformat(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("name", MODELS)
def test_part_agrees(name, part, tmp_path):
    config = MODELS[name][part]
    inputs = inputs_of(part, config)
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", REFERENCE, str(tmp_path), part], check=True)

    expected = load_file(tmp_path / "outputs.safetensors")
    ours = our_outputs(part, load_part(tmp_path, part), inputs)
    entries = [measured(name, title, ours[title], expected[title]) for title in expected]
    record(entries)
    for entry in entries:
        assert entry["ratio"] <= BAR, entry
