# %% [markdown]
# # Teach one thing: DreamBooth and textual inversion
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** One thing taught from four images, both ways, with and without prior preservation.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or the absolute path of a folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
SUBJECT = "e000"  # an OpenMoji that is no emoji of Unicode; with your own images give their folder below
SUBJECT_CLASS = "fish"
RARE_WORD = "sks"
INSTANCE_DATA_DIR = None
CLASS_IMAGES = 60
DREAMBOOTH_STEPS = 120
DREAMBOOTH_LEARNING_RATE = 2e-4  # 5e-6 for Stable Diffusion
INVERSION_STEPS = 250
INVERSION_LEARNING_RATE = 1e-2  # 5e-3 for Stable Diffusion
NUM_VECTORS = 4
SAMPLES = 8
CLASS_SAMPLES = 64  # to see how far the class has moved
NUM_INFERENCE_STEPS = 20  # of sampling
GUIDANCE_SCALE = 2.0

# %% [markdown]
# **What you will learn**
#
# - To teach a model one subject from four images, by DreamBooth and by textual inversion.
# - What prior preservation is for, and how to see that a model forgets.
# - Which of the two methods to choose.
#
# ## Introduction
#
# A model can make images of fish, but not of *this* fish, or your dog, or the toy on your desk. Two methods
# teach it from three to five images.
#
# - **DreamBooth** (Ruiz et al., *DreamBooth: Fine tuning text-to-image diffusion models for subject-driven
#   generation*, arXiv:2208.12242) trains the whole UNet on these images, under a prompt that has a rare
#   word in it: "sks fish". The rare word has little meaning yet and is free to take a new one.
# - **Textual inversion** (Gal et al., *An image is worth one word*, arXiv:2208.01618) leaves the model as it
#   is. It adds a new word to the vocabulary and looks for the vectors, by gradient descent, with which the
#   frozen model draws the images best.
#
# The first one changes the model and can forget; *prior preservation* is the remedy. The second one cannot
# forget, but it can only find what the model is able to draw. This notebook does both and compares them.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import logging
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from keras_sd import (
    ClipFeatures,
    StableDiffusion,
    extract,
    load_part,
    load_source,
    paired_kernel_inception_distance,
    presets,
)
from keras_sd.data.emoji.source import draw_openmoji

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


def show(rows, titles=(), size=1.25):
    """Draws images as a table: `rows` is a dictionary from a row's title to its images."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + 1.6, (size + 0.05) * len(rows)), squeeze=False
    )
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=11)
    plt.show()


# %% [markdown]
# ## The subject
#
# Here it is one of OpenMoji's symbols that are no emoji of Unicode, so the bundled model has seen nothing
# like it: an orange fish with a black outline. Four views of it are all there is. With images of your own,
# vary what is *not* to be learned: light, background, angle. What all images share is what the word will
# mean.


# %%
def draw_views(folder, size):
    """Four views of the subject: turned, scaled and moved."""
    drawing = Image.fromarray(draw_openmoji(SUBJECT, 256))
    views = ((0, 1.0, 0, 0), (15, 0.9, -8, 6), (-15, 0.8, 10, -8), (30, 0.9, 4, 10))
    for index, (degrees, scale, right, down) in enumerate(views):
        side = round(256 * scale)
        turned = drawing.resize((side, side)).rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
        view = Image.new("RGB", (256, 256), "white")
        view.paste(turned, ((256 - side) // 2 + right, (256 - side) // 2 + down))
        view.resize((size, size), Image.Resampling.LANCZOS).save(folder / f"{index}.png")


sd = StableDiffusion.from_preset(PRESET, batch_size=SAMPLES)
image_size = sd.unet.config.sample_size * sd.vae.config.downsampling
if INSTANCE_DATA_DIR is None:
    INSTANCE_DATA_DIR = "subject"
    Path(INSTANCE_DATA_DIR).mkdir()
    draw_views(Path(INSTANCE_DATA_DIR), image_size)
source = load_source(INSTANCE_DATA_DIR, "train", image_size, need_captions=False)
subject = np.stack([source[index]["image"] for index in range(len(source))])

instance_prompt = f"{RARE_WORD} {SUBJECT_CLASS}"
sampling = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE, "progress": False}


def draw(model, prompt, count=SAMPLES, seed=0):
    return model.text_to_image(prompt, num_images=count, seed=seed, **sampling)


samples = {"before": draw(sd, instance_prompt)}
show(
    {
        "the subject": subject,
        f'"{SUBJECT_CLASS}"': draw(sd, SUBJECT_CLASS),
        f'"{instance_prompt}"': samples["before"],
    }
)

# %% [markdown]
# Below the subject: what the model draws before it is taught anything. It has its own idea of the class, and
# the rare word disturbs it, but does not lead to the subject.
#
# ## DreamBooth
#
# All weights of the UNet are trained on four images, with a low learning rate and few steps. The prompt is
# the same for all four. The command prints its progress; its last line is enough here.

# %%
seconds = {}
begun = time.perf_counter()
# !{python} -m keras_sd.train dreambooth --pretrained-model-name-or-path {PRESET} \
#     --instance-data-dir {INSTANCE_DATA_DIR} --instance-prompt "{instance_prompt}" \
#     --max-train-steps {DREAMBOOTH_STEPS} --learning-rate {DREAMBOOTH_LEARNING_RATE} \
#     --evaluation-steps 100000 --num-inference-steps {NUM_INFERENCE_STEPS} --num-validation-images 1 \
#     --no-jit-compile --output-dir runs/alone 2>&1 | tail -n 1
seconds["DreamBooth alone"] = time.perf_counter() - begun

# %% [markdown]
# ## With prior preservation
#
# Training on "sks fish" alone also moves what "fish" means: every fish becomes the subject. The paper calls
# it language drift. Its remedy: before the training the model draws images of the class itself, and
# learns them along, under the prompt "fish". The loss is the sum of both,
#
# $$\mathcal{L} = \mathcal{L}_\text{subject} + \lambda\, \mathcal{L}_\text{class},$$
#
# where $\mathcal{L}$ is the loss, each part the loss on those images, and $\lambda$ the weight of the
# class, by default 1, and every batch holds as many images of the class as of the subject, so a step takes
# twice the work.

# %%
begun = time.perf_counter()
# !{python} -m keras_sd.train dreambooth --pretrained-model-name-or-path {PRESET} \
#     --instance-data-dir {INSTANCE_DATA_DIR} --instance-prompt "{instance_prompt}" \
#     --with-prior-preservation --class-prompt "{SUBJECT_CLASS}" --num-class-images {CLASS_IMAGES} \
#     --sample-batch-size 20 \
#     --max-train-steps {DREAMBOOTH_STEPS} --learning-rate {DREAMBOOTH_LEARNING_RATE} \
#     --evaluation-steps 100000 --num-inference-steps {NUM_INFERENCE_STEPS} --num-validation-images 1 \
#     --no-jit-compile --output-dir runs/prior 2>&1 | tail -n 1
seconds["DreamBooth with prior"] = time.perf_counter() - begun

# %% [markdown]
# ## Textual inversion
#
# The UNet and the text encoder are frozen. What is trained is the table of a new word, `<fish>`, here of
# four vectors. They begin as those of a known word, the class. Captions come from templates ("{}",
# "{} emoji", "picture of {}", ...), so that the word can be used in a sentence.
#
# Each step still passes through the whole UNet and text encoder to find out where the vectors should go, but
# the result is a handful of vectors.

# %%
new_word = f"<{SUBJECT_CLASS}>"
begun = time.perf_counter()
# !{python} -m keras_sd.train textual-inversion --pretrained-model-name-or-path {PRESET} \
#     --train-data-dir {INSTANCE_DATA_DIR} --placeholder-token "{new_word}" \
#     --initializer-token "{SUBJECT_CLASS}" --num-vectors {NUM_VECTORS} \
#     --max-train-steps {INVERSION_STEPS} --train-batch-size 16 --learning-rate {INVERSION_LEARNING_RATE} \
#     --evaluation-steps 100000 --num-inference-steps {NUM_INFERENCE_STEPS} --num-validation-images 1 \
#     --no-jit-compile --output-dir runs/word 2>&1 | tail -n 1
seconds["textual inversion"] = time.perf_counter() - begun

# %% [markdown]
# ## Side by side
#
# DreamBooth's results are whole models. The learned word is loaded into the model that we had.

# %%
models = {
    "DreamBooth alone": StableDiffusion.load("runs/alone/model", batch_size=SAMPLES),
    "DreamBooth with prior": StableDiffusion.load("runs/prior/model", batch_size=SAMPLES),
}
models["textual inversion"] = sd
classes = {"before": draw(sd, SUBJECT_CLASS, count=CLASS_SAMPLES, seed=10_000)}
sd.load_textual_inversion("runs/word/model")
for name, model in models.items():
    samples[name] = draw(model, new_word if model is sd else instance_prompt)
    classes[name] = draw(model, SUBJECT_CLASS, count=CLASS_SAMPLES, seed=10_000)


def lines(name):
    """A row's title, broken."""
    return name.replace(" with", "\nwith").replace(" alone", "\nalone").replace(" inv", "\ninv")


show({"the subject": subject} | {lines(name): samples[name] for name in models})

# %% [markdown]
# And the class, after each of the three, from seeds that no training used:

# %%
show({lines(name): images[:SAMPLES] for name, images in classes.items()})

# %% [markdown]
# Without prior preservation the class has become the subject, or is on its way there. With it, the class
# stays near what it was. Textual inversion leaves it as it was, to the bit.
#
# In figures, in the space of the bundled CLIP's images: the mean cosine similarity of samples to the
# subject, and the KID (arXiv:1801.01401) of images of the class to those before. Sizes are those of
# the files that one would pass on; times include starting Python, compiling and drawing the class.

# %%
extractor = ClipFeatures(load_part(presets.find("emoji"), "image_encoder"))


def unit_features(images):
    features = extract(extractor, images)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


wanted = unit_features(subject)
class_features = {name: extract(extractor, images) for name, images in classes.items()}
files = {
    "DreamBooth alone": "runs/alone/model/unet/*.safetensors",
    "DreamBooth with prior": "runs/prior/model/unet/*.safetensors",
    "textual inversion": "runs/word/model/learned_embeds.safetensors",
}
print(f"{'':24}{'similarity':>12}{'class KID':>12}{'file':>14}{'time':>9}")
for name, images in samples.items():
    line = f"{name:24}{(unit_features(images) @ wanted.T).mean():12.2f}"
    if name in files:
        if np.array_equal(classes[name], classes["before"]):
            drift = "unchanged"
        else:
            features = class_features["before"], class_features[name]
            drift = f"{paired_kernel_inception_distance(*features).mean:.2f}"
        kilobytes = sum(path.stat().st_size for path in Path().glob(files[name])) / 1000
        line += f"{drift:>12}{kilobytes:11,.1f} kB{seconds[name]:7.0f} s"
    print(line)

# %% [markdown]
# ## In other prompts
#
# A subject is worth more than four images if it goes into other prompts. The learned word stands where any
# word can stand.

# %%
others = ("small icon of {}", "two {}", "blue {}", "{} and a star")
rows = {}
for name, word in (("DreamBooth with prior", instance_prompt), ("textual inversion", new_word)):
    prompts = [prompt.format(word) for prompt in others]
    rows[lines(name)] = models[name].text_to_image(prompts, num_images=2, seed=0, **sampling)
show(rows, [prompt.format("…") for prompt in others for _ in range(2)], size=1.4)

# %% [markdown]
# The word stands in place of "…". The bundled model has seen 3,578 symbols, each alone on white, so it cannot
# count or put things together, and where it is asked for another colour the old class may come back. Stable
# Diffusion, which has seen far more, goes much further.
#
# ## Which one?
#
# - **One subject, as alike as can be**: DreamBooth with prior preservation. `--lora` trains low-rank updates
#   in place of all weights, and the result is a file of some megabytes (notebook 6).
# - **Something to pass on and to mix**: textual inversion. A few kilobytes, and several words stand in one
#   prompt. It cannot teach what the model is unable to draw.
# - `--train-text-encoder` lets DreamBooth train the text encoder too: more alike, and more to forget.
#
# The results open elsewhere. Both were written in the layouts of diffusers:
#
# ```python
# pipe = StableDiffusionPipeline.from_pretrained("runs/prior/model")
# pipe.load_textual_inversion("runs/word/model")
# ```
#
# Images of people are theirs. Teach a model a person only if that person agrees.
#
# ## References
#
# - Ruiz et al., *DreamBooth: Fine tuning text-to-image diffusion models for subject-driven generation*,
#   arXiv:2208.12242
# - Gal et al., *An image is worth one word: Personalizing text-to-image generation using textual
#   inversion*, arXiv:2208.01618
# - Bińkowski et al., *Demystifying MMD GANs*, arXiv:1801.01401
# - OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0
