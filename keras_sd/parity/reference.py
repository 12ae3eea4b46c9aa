"""Computes the outputs of a written model in diffusers and transformers, for a parity report.

This is a program of its own, run as a file, since torch and TensorFlow do not share a process:

    python -P reference.py FOLDER

FOLDER holds `job.json` (the model's path, the folder of configs of a single file or null, the parts' names)
and `inputs.safetensors`, and receives `outputs.safetensors` and `failures.json`, a line for each part that
could not be opened. `keras_sd.parity.compare` writes the former and reads the latter.
"""

import json
import sys
import textwrap
from pathlib import Path

_LONGEST_REASON = 200


def main(folder):
    # Keeps these libraries from importing TensorFlow.
    sys.modules["tensorflow"] = None
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    inputs = load_file(folder / "inputs.safetensors")
    outputs, failures = {}, {}
    for part in job["parts"]:
        prefix = f"{part}/"
        own = {
            name.removeprefix(prefix): tensor for name, tensor in inputs.items() if name.startswith(prefix)
        }
        try:
            model = _open(part, job["model"], job["configs"]).float().eval()
            outputs |= _COMPUTE[part](model, own)
        except Exception as error:  # of any type; the report holds the message
            failures[part] = textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "failures.json").write_text(json.dumps(failures), encoding="utf-8")


def _open(part, path, configs):
    import diffusers
    import transformers

    model_class = {
        "text_encoder": transformers.CLIPTextModel,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }[part]
    if configs is None:
        return model_class.from_pretrained(path, subfolder=part)
    if part == "text_encoder":
        others = ("unet", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        pipeline = diffusers.StableDiffusionPipeline
        return pipeline.from_single_file(path, config=configs, **dict.fromkeys(others)).text_encoder
    return model_class.from_single_file(path, config=configs, subfolder=part)


def _text_encoder(model, inputs):
    return {"text encoder": model(inputs["ids"]).last_hidden_state}


def _image_encoder(model, inputs):
    return {"image encoder": model(_channels_first(inputs["pixels"])).image_embeds}


def _unet(model, inputs):
    options = {"encoder_hidden_states": inputs.get("context"), "class_labels": inputs.get("class_labels")}
    return {
        "UNet": _channels_last(
            model(_channels_first(inputs["latents"]), inputs["timesteps"], **options).sample
        )
    }


def _vae(model, inputs):
    posterior = model.encode(_channels_first(inputs["images"])).latent_dist
    decoded = model.decode(_channels_first(inputs["latents"])).sample
    return {"VAE encode": _channels_last(posterior.mean), "VAE decode": _channels_last(decoded)}


_COMPUTE = {"text_encoder": _text_encoder, "image_encoder": _image_encoder, "unet": _unet, "vae": _vae}


def _channels_first(tensor):
    return tensor.permute(0, 3, 1, 2).contiguous()


def _channels_last(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
