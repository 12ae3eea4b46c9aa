# %% [markdown]
# # Bring and take weights
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Open models of every format, convert, verify and publish them, and distrust pickles.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or the absolute path of a folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPTS = ("red heart", "grinning face", "rocket", "tulip")
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 2.0

# %% [markdown]
# **What you will learn**
#
# - To open models of every format, and to convert and verify them.
# - What is in a folder of diffusers, and how names and layouts of weights are translated.
# - To publish a model, and why pickles are dangerous.
#
# ## Introduction
#
# Weights of Stable Diffusion are published in many formats.
#
# | format | where it comes from | what is in it |
# |---|---|---|
# | a folder | diffusers, the Hugging Face hub | each part with its config, tokenizer, noise schedule |
# | `.safetensors`, one file | web interfaces | all tensors under latent-diffusion's names, no config |
# | `.ckpt`, `.pt`, `.bin` | torch, older models | the same in a pickle, which can hold programs |
# | `.h5` | KerasCV | one file for each of four models |
#
# `StableDiffusion.load` opens all of them and finds out from the files what they are. This notebook makes
# each, opens it, and proves that nothing was lost.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import json
import logging
import pickle
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from keras import ops

import keras_sd.keras_cv as keras_cv
from keras_sd import (
    AutoencoderKL,
    SchedulerConfig,
    StableDiffusion,
    TextEncoder,
    TextEncoderConfig,
    Tokenizer,
    UNet,
    UNetConfig,
    UserError,
    VAEConfig,
    add_lora,
    load_part,
    presets,
    read_checkpoint,
    read_safetensors,
    save_lora,
)
from keras_sd.weights.torch_pickle import read_torch

logging.getLogger("tensorflow").setLevel(logging.ERROR)
plt.rcParams.update(
    {
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)
python = sys.executable

workspace = tempfile.TemporaryDirectory()
os.chdir(workspace.name)  # all that is written goes there, and goes away with the notebook


def show(rows, columns, size=1.6):
    """Draws images as a table: `rows` is a dictionary from a row's title to its images."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(size * len(columns) + 1.3, (size + 0.1) * len(rows)), squeeze=False
    )
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=11)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    plt.show()


def print_tree(folder):
    """The files below a folder, with their sizes."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1000:12,.1f} kB  {path.as_posix()}")


def same_weights(one, other):
    """Whether two models hold the same bits in the parts that images are made with."""
    return all(
        np.array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
        for part in ("text_encoder", "unet", "vae")
        for a, b in zip(getattr(one, part).weights, getattr(other, part).weights, strict=True)
    )


# %% [markdown]
# ## What is in a diffusers folder
#
# It is the native format here: what `save` writes opens in diffusers, and through it in most other programs.

# %%
sd = StableDiffusion.from_preset(PRESET)
sampling = {
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "seed": 0,
    "progress": False,
}
images = {"the preset": sd.text_to_image(list(PROMPTS), **sampling)}

sd.save("my-model")
print_tree("my-model")

# %% [markdown]
# - `model_index.json` is the table of contents: which class of which library opens each part.
# - Each part has a `config.json`, from which the network is built, and a file of weights.
# - `tokenizer/` splits texts: a vocabulary and the merges of byte pairs.
# - `scheduler/` says on which noise schedule the UNet was trained, and what it predicts.
# - `image_encoder/` is an addition of the bundled model, the other half of its CLIP, for measuring. diffusers
#   leaves it alone.

# %%
print((Path("my-model/scheduler/scheduler_config.json")).read_text(encoding="utf-8"))
tensors = read_safetensors("my-model/unet/diffusion_pytorch_model.safetensors")
print(f"{len(tensors)} tensors in the UNet, among them:")
for name in list(tensors)[::52]:
    print(f"  {name:45} {tensors[name].dtype} {tensors[name].shape}")

# %% [markdown]
# There is no table that translates names. The network's attributes are named as the published tensors are,
# and a kernel differs only in the order of its axes: torch keeps (out, in, height, width), Keras (height,
# width, in, out).

# %%
kernel = ops.convert_to_numpy(sd.unet.down_blocks[0].resnets[0].conv1.kernel)
published = tensors["down_blocks.0.resnets.0.conv1.weight"]
print("kernel", kernel.shape, "published", published.shape)
print("the same numbers:", np.array_equal(kernel, published.transpose(2, 3, 1, 0)))

# %% [markdown]
# ## Half precision and variants
#
# Weights are often passed on in half the size. float16 has 10 bits for the digits and a small range, bfloat16
# has float32's range and 7 bits for the digits. The bundled model is float16; in memory it is float32
# unless `load` is told otherwise. How much do the images change?

# %%
for dtype in ("float32", "float16", "bfloat16"):
    sd.save(dtype, dtype=dtype)
    opened = StableDiffusion.load(dtype)
    images[dtype] = opened.text_to_image(list(PROMPTS), **sampling)
    size = sum(path.stat().st_size for path in Path(dtype).rglob("*.safetensors")) / 1e6
    difference = np.abs(images[dtype].astype(int) - images["the preset"])
    print(f"{dtype:9} {size:6.1f} MB, pixels differ by {difference.mean():.2f} levels of 255 in the mean")
show({name: images[name] for name in ("the preset", "bfloat16")}, PROMPTS)

# %% [markdown]
# `dtype` of `load` is another matter: the precision that is computed in. `load(path, dtype="bfloat16")`
# halves the memory and is what a GPU or TPU is fast in.
#
# On the hub one folder often has several *variants* side by side, told by a word before the suffix. `load`
# takes the plain files unless it is told:

# %%
for path in Path("float16").rglob("*.safetensors"):
    path.rename(Path("my-model", *path.parts[1:]).with_suffix(".fp16.safetensors"))
print_tree("my-model/unet")
half = StableDiffusion.load("my-model", variant="fp16")
print(
    "fp16 holds what the preset holds:",
    same_weights(half, sd),
)

# %% [markdown]
# ## Single files
#
# The file that web interfaces take has no config and no tokenizer. Both are derived: the shape of the network
# from the tensors, all else from what Stable Diffusion 1.x, 2.x, the inpainting models and the x4 upscaler
# are known to be. The `emoji` model is none of these, so a single file cannot say all of it, and the warning
# names what is lost:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sd.save("emoji.safetensors")
for warning in caught:
    print(warning.message)

# %% [markdown]
# So a model with the shape of Stable Diffusion 1 stands in for a download of some gigabytes: CLIP's own
# vocabulary, the same kinds of layers, fewer and narrower ones, and random weights. Its images show
# nothing, but its files are like the real ones.

# %%
small = StableDiffusion(
    Tokenizer.clip(),
    TextEncoder(
        TextEncoderConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            projection_dim=64,
        )
    ),
    UNet(
        UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
        )
    ),
    AutoencoderKL(VAEConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=1)),
    SchedulerConfig(),
)
small.save("small.safetensors")
file = read_safetensors("small.safetensors")
print(f"{len(file)} tensors, for instance")
for name in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"):
    print(" ", name, file[name].shape)

again = StableDiffusion.load("small.safetensors")
print("read back bit for bit:", same_weights(small, again))

# %% [markdown]
# ## `.ckpt`, and EMA weights
#
# A `.ckpt` is a pickle of torch with the same names, under `state_dict`. Files from a training often hold
# the UNet twice: the raw weights, and their exponential moving average (EMA) under `model_ema.` without
# dots in the names. The average draws better, the raw ones are what training goes on from. Here torch
# writes one, in a process of its own, with an "average" that is half of the raw weights.

# %%
# %%writefile make_ckpt.py
import torch
from safetensors.torch import load_file

raw = load_file("small.safetensors")
prefix = "model.diffusion_model."
average = {
    "model_ema." + name.removeprefix("model.").replace(".", ""): tensor / 2
    for name, tensor in raw.items()
    if name.startswith(prefix)
}
torch.save({"state_dict": raw | average, "global_step": 1000}, "small.ckpt")

# %%
subprocess.run([python, "make_ckpt.py"], check=True, capture_output=True)
with_ema = StableDiffusion.load("small.ckpt")
with_raw = StableDiffusion.load("small.ckpt", weights="raw")
print("raw weights are the model's:", same_weights(small, with_raw))
average, raw = (ops.convert_to_numpy(model.unet.conv_in.kernel) for model in (with_ema, with_raw))
ratio = average / raw
print("average over raw:", ratio.min(), "to", ratio.max())

# %% [markdown]
# Another autoencoder, as many models recommend one, comes from a file or folder of its own:
# `StableDiffusion.load("model.ckpt", vae="vae-ft-mse-840000.safetensors")`. What the UNet of a single file
# of SD 2.x predicts cannot be seen from it; `prediction_type="epsilon"` says it where the usual one is
# wrong.
#
# ## KerasCV's files
#
# KerasCV published Stable Diffusion as four H5 files. Put them in a folder, and they open like the rest. As
# they are of full size only (several gigabytes), they are not made here.
#
# ```bash
# keras-sd convert folder-of-h5 my-model --verify
# ```
#
# Programs written for KerasCV go on running after one import line is changed. The methods and their
# arguments are the same:

# %%
model = keras_cv.models.StableDiffusion(
    img_height=sd.latent_shape()[0] * 8, img_width=sd.latent_shape()[1] * 8, model=sd
)
drawn = model.text_to_image(PROMPTS[0], batch_size=len(PROMPTS), num_steps=NUM_INFERENCE_STEPS, seed=0)
print(drawn.shape, drawn.dtype)

# %% [markdown]
# ## Convert by command, and verify
#
# `keras-sd convert` reads any of these and writes a folder or a single file. `--verify` reads the result
# again and compares three things: every tensor with the source's; the outputs of each part with the
# source's; and the outputs with those of diffusers and transformers, which open the result themselves.

# %%
# !{python} -m keras_sd convert {PRESET} converted --dtype float32 --verify 2> convert.log

# %% [markdown]
# *Equal* tensors have the same values, whatever their precision. With `--dtype bfloat16` they would be
# *rounded*, which is told and counted apart. The exit code is 0 only if all is as it should be, so a script
# can rely on it. In Python the comparison of two models of any format takes a few lines:


# %%
def differing_tensors(one, other):
    """Names of the tensors that differ between two models of any format."""
    one, other = read_checkpoint(presets.find(one)), read_checkpoint(presets.find(other))
    return [
        f"{name} {key}"
        for name, part in one.parts.items()
        for key, tensor in part.tensors.items()
        if not np.array_equal(tensor.astype("float32"), other.parts[name].tensors[key].astype("float32"))
    ]


print("converted:", len(differing_tensors(PRESET, "converted")), "tensors differ")
print("bfloat16: ", len(differing_tensors(PRESET, "bfloat16")), "tensors differ")

# %% [markdown]
# ## LoRA, in two formats
#
# A low-rank update has two matrices for each layer. diffusers and PEFT call them `lora_A` and `lora_B` and
# name the layers as the model does; kohya's scripts, and with them most of what is passed on, call them
# `lora_down` and `lora_up`, join the layer's name by underscores and store a scale `alpha`. Training writes
# both. The update made here is random; notebook 6 trains a real one.

# %%
unet = load_part(presets.find(PRESET), "unet")
add_lora(unet, rank=4, alpha=2)
generator = np.random.default_rng(0)
for variable in unet.trainable_variables:
    variable.assign(0.15 * generator.standard_normal(variable.shape).astype("float32"))
save_lora(Path("lora"), {"unet": unet})

for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
    print(name)
    for key in list(read_safetensors(f"lora/{name}"))[:2]:
        print("   ", key)

rows = {"without": images["the preset"]}
for title, name in (("PEFT", "pytorch_lora_weights"), ("kohya", "lora_kohya")):
    sd.load_lora(f"lora/{name}.safetensors")
    rows[title] = sd.text_to_image(list(PROMPTS), **sampling)
    sd.unload_lora()
rows["unloaded"] = sd.text_to_image(list(PROMPTS), **sampling)
show(rows, PROMPTS)
apart = np.abs(rows["PEFT"].astype(int) - rows["kohya"]).max()
print(f"both dialects: images differ by {apart} levels at most")
print("unloaded is as it was:", np.array_equal(rows["unloaded"], rows["without"]))

# %% [markdown]
# Several LoRAs add up (`load_lora` again), each has its weight (`set_lora_weights`), a prompt can ask for one
# (`<lora:name:0.8>`), and `save` writes what is in the model now: merged, for programs that know no LoRA.
#
# ## Publish
#
# A folder is ready to be published when it says what it is. Save one for the purpose, with one set of weights
# in the precision that people download. Three things go beside the weights: a model
# card (`README.md` with a header that hubs read), the licence, and checksums. The licence follows from the
# base model and from the images: Stable Diffusion's OpenRAIL licences ask to pass on their limits of use,
# CC-BY and CC-BY-SA ask to name the authors.

# %%
card = """\
---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [keras, stable-diffusion, emoji]
---

# my-model

What it draws, for whom it is, and for what it should not be used.

- **Base model:** emoji of keras_sd
- **Trained on:** Twemoji, CC-BY 4.0, Twitter and other contributors
- **How:** command, steps, learning rate, and the measured figures
- **Known faults:** details are soft; hands, letters and counts are wrong at times
"""
folder = Path("published")
sd.save(folder, dtype="float16")
(folder / "README.md").write_text(card, encoding="utf-8")
sums = {
    path.relative_to(folder).as_posix(): presets.file_hash(path)
    for path in sorted(folder.rglob("*.safetensors"))
}
(folder / "sha256.json").write_text(json.dumps(sums, indent=2), encoding="utf-8")
for name, digest in sums.items():
    print(f"{digest[:16]}…  {name}")
print("SHA-256 of the UNet as images name it:", StableDiffusion.load(folder).model_hash)

# %% [markdown]
# The last line is what the PNGs of this package say about their origin (`Model hash`), so an image can be
# traced to the file that made it. Then:
#
# ```bash
# hf upload my-name/my-model published     # of huggingface_hub
# ```
#
# and everybody opens it by `StableDiffusion.from_preset("my-name/my-model")`, or by diffusers'
# `from_pretrained`.
#
# ## Why pickles are dangerous
#
# A pickle is a list of instructions, and one of them calls any function of Python. Whoever
# loads a `.ckpt` with `pickle.load` runs what its author wrote. Here is a harmless one: in the place of
# weights it has a call of `print`.


# %%
class Surprise:
    """Says how it is to be rebuilt: by a call, of anything."""

    def __reduce__(self):
        return print, ("this text was printed by the file itself",)


content = pickle.dumps({"state_dict": Surprise()}, protocol=2)
with zipfile.ZipFile("surprise.ckpt", "w") as archive:  # a file of torch.save is a zip with a pickle in it
    archive.writestr("archive/data.pkl", content)

print("pickle.loads:")
loaded = pickle.loads(content)

# %% [markdown]
# It could have been `os.system`. The reader of this package knows lists, dictionaries, strings, numbers and
# tensors, and nothing that looks up or calls a function. The call becomes an empty dictionary, and nothing
# runs:

# %%
print("read_torch:", read_torch("surprise.ckpt"))


def refusal(path):
    """The line by which a file is refused."""
    try:
        StableDiffusion.load(path)
    except UserError as error:
        return str(error)
    return "opened"


print(refusal("surprise.ckpt"))

# %% [markdown]
# The tensors beside such a call are read all the same, so old files stay of use. Other bad files end in one
# line as well: the thing, the fault, the remedy.

# %%
whole = Path("small.safetensors").read_bytes()
Path("truncated.safetensors").write_bytes(whole[: len(whole) // 2])
Path("page.safetensors").write_text(
    "<!DOCTYPE html><p>Please log in to download this file.</p>", encoding="utf-8"
)
Path("renamed.safetensors").write_bytes(Path("small.ckpt").read_bytes())
for name in ("truncated.safetensors", "page.safetensors", "renamed.safetensors"):
    print("-", refusal(name))

# %% [markdown]
# A `.safetensors` file has a header of names, types and offsets, then the numbers. There is nothing in it
# that could run. Prefer it, and turn what you have into it:
#
# ```bash
# keras-sd convert model.ckpt model.safetensors --verify
# ```
#
# ## References
#
# - [safetensors](https://github.com/huggingface/safetensors), the format
# - Hu et al., *LoRA: Low-rank adaptation of large language models*, arXiv:2106.09685
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
# - Mitchell et al., *Model cards for model reporting*, arXiv:1810.03993
