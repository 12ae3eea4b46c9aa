# %% [markdown]
# # Fine-tune on your own photographs
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/30<br>
# **Last modified:** 2026/11/30<br>
# **Description:** From a folder of photographs of many shapes to a fine-tuned model, with validation.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or the absolute path of a folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
CROPS = 16  # of each photograph, a quarter of them held out
BUCKETS = 5  # 9 for Stable Diffusion
TRAIN_BATCH_SIZE = 8
TRAINING_STEPS = 240
VALIDATION_STEPS = 40
LEARNING_RATE = 1e-3  # 1e-5 for Stable Diffusion
FEW_STEPS = 160  # of a run with six images, which is meant to overfit
COMPILE = "--no-jit-compile"  # "--jit-compile" on a GPU or TPU
NUM_INFERENCE_STEPS = 20  # of sampling
GUIDANCE_SCALE = 1.5  # 7.5 for Stable Diffusion

# %% [markdown]
# **What you will learn**
#
# - To check a folder of images before training: faults, sizes, captions, copies.
# - What aspect-ratio buckets, repeats and cached encodings do, and how much of an image is cropped away.
# - To fine-tune by the training command, to read its validation loss, and to choose a checkpoint.
# - To recognize overfitting, by the losses and by the images.
#
# ## Introduction
#
# Tutorials train on tidy data sets. Your own images are of every shape, some files are damaged, some captions
# are missing, and some images are there twice. This notebook takes such a folder from the first look to a
# fine-tuned model, with the commands that do the same for Stable Diffusion at 512 pixels.
#
# The photographs come with the package scikit-image, so nothing is downloaded. They have no known
# restrictions of copyright: they are in the public domain or under CC0. The model is the bundled `emoji`,
# which makes images of 64 pixels and has never seen a photograph. What it learns here in two minutes are
# colours and composition. The steps, the commands and the figures to look at are those of a large model.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from IPython.display import Image as ShownImage
from IPython.display import display
from matplotlib.patches import Rectangle
from PIL import Image

from keras_sd import StableDiffusion, images_from_unit, images_to_unit, load_source
from keras_sd.data import buckets
from keras_sd.data.framing import frame_of

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


def show(rows, columns, size=1.3):
    """Draws images as a table: `rows` is a dictionary from a row's title to its images."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(size * len(columns) + 0.4, (size + 0.1) * len(rows)), squeeze=False
    )
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    plt.show()


def command(line, shown=("",), exit_code=0):
    """Runs a command and prints those of its lines that begin with one of `shown`."""
    program, *arguments = shlex.split(line)
    start = {"keras-sd": [sys.executable, "-m", "keras_sd"], "python": [sys.executable]}[program]
    done = subprocess.run([*start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.replace("\r", "\n").splitlines()
    if done.returncode != exit_code:
        raise RuntimeError("\n".join(lines[-5:]))
    print(*(each for each in lines if each.startswith(shown)), sep="\n")


# %% [markdown]
# ## A folder as it comes
#
# Here the six photographs become a folder of crops of six ratios of width to height, each with a text file
# beside it that holds its captions, one a line. The sub-folder `validation` is held out: the training never
# sees it. Here its images are other crops of the same photographs. For a real subject hold out other
# photographs, or the validation loss is better than it should be.
#
# Of the rocket there are fewer crops. They are in a folder `3_rocket`, whose images are shown three times in
# an epoch, so that the model sees all six subjects about as often. The number in the name is kohya's way to
# say it.

# %%
PHOTOGRAPHS = {
    "astronaut": ("astronaut", "an astronaut in an orange suit", "a smiling astronaut"),
    "cat": ("chelsea", "a ginger cat", "the face of a cat"),
    "coffee": ("coffee", "a cup of coffee on a table", "coffee in a red cup"),
    "galaxies": ("hubble_deep_field", "galaxies in deep space", "many galaxies"),
    "photographer": ("camera", "a photographer with a camera, black and white", "a man with a tripod"),
    "rocket": ("rocket", "a rocket before its launch", "a rocket at night"),
}
RATIOS = {"1:1": 1, "3:2": 3 / 2, "2:3": 2 / 3, "16:9": 16 / 9, "3:4": 3 / 4, "1:2": 1 / 2}
ROCKET_REPEATS = 3


def write(image, captions, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


generator = np.random.default_rng(0)
for name, (function, *captions) in PHOTOGRAPHS.items():
    photograph = Image.fromarray(getattr(skimage.data, function)())
    for number in range(CROPS):
        ratio = [*RATIOS.values()][number % len(RATIOS)]
        width = min(photograph.width, photograph.height * ratio) * generator.uniform(0.75, 1)
        height = width / ratio
        left = generator.uniform(0, photograph.width - width)
        top = generator.uniform(0, photograph.height - height)
        folder = "validation" if number % 4 == 3 else "."
        if name == "rocket" and folder == ".":
            if number % ROCKET_REPEATS:
                continue
            folder = f"{ROCKET_REPEATS}_rocket"
        box = [round(side) for side in (left, top, left + width, top + height)]
        write(photograph.crop(box), captions, Path("photographs", folder, f"{name}-{number:02}.jpg"))

# %% [markdown]
# And what folders have besides: a file that was not copied to its end, an image without a caption, a
# thumbnail and a copy.

# %%
photographs = Path("photographs")
damaged = photographs / "astronaut-00.jpg"
whole = damaged.read_bytes()
damaged.write_bytes(whole[: len(whole) // 3])
(photographs / "cat-01.txt").unlink()
thumbnail = Image.open(photographs / "coffee-00.jpg").resize((40, 40))
write(thumbnail, PHOTOGRAPHS["coffee"][1:], photographs / "thumbnail.jpg")
write(Image.open(photographs / "cat-00.jpg"), PHOTOGRAPHS["cat"][1:], photographs / "cat-copy.jpg")
(photographs / "cat-copy.jpg").write_bytes((photographs / "cat-00.jpg").read_bytes())

# %% [markdown]
# ## Look before you train
#
# `keras-sd dataset` shows what a run with the same options would see. Of the model it reads only configs and
# tokenizer, so it takes seconds. Every image is decoded. All faults are named together, and the exit code is
# 2, as it would be at the start of a training.

# %%
model = f"--pretrained-model-name-or-path {shlex.quote(PRESET)} --train-batch-size {TRAIN_BATCH_SIZE}"
look = f"keras-sd dataset photographs {model} --images 15 --output dataset.png --overwrite"
in_buckets = f"--aspect-ratio-buckets {BUCKETS}"
print(look, in_buckets, end="\n\n")
command(f"{look} {in_buckets}", exit_code=2)

# %% [markdown]
# Faulty files can be mended, or left out by `--on-bad-sample skip`. What is left out is counted:

# %%
command(f"{look} {in_buckets} --on-bad-sample skip")

# %% [markdown]
# The thumbnail is smaller than its bucket. It would have to be enlarged, and the model would learn its blur.
# The copy would be shown twice as often as other images. We mend the first two and remove these:

# %%
damaged.write_bytes(whole)
(photographs / "cat-01.txt").write_text("\n".join(PHOTOGRAPHS["cat"][1:]), encoding="utf-8")
for name in ("thumbnail", "cat-copy"):
    (photographs / f"{name}.jpg").unlink()
    (photographs / f"{name}.txt").unlink()
command(f"{look} {in_buckets}")
display(ShownImage("dataset.png"))

# %% [markdown]
# The lines say:
#
# - **An epoch**, one pass through the data, shows more images than there are, because of the repeats.
# - **Captions.** A model reads a limited number of tokens, the pieces that its tokenizer splits a text into.
#   The rest of a longer caption is cut, or read in further chunks with `--max-token-length 150`. Where images
#   have no captions, `keras-sd caption` writes them (`05_create_captions`).
# - **Buckets.** The next section.
#
# ## Aspect-ratio buckets
#
# A batch is one array, so all its images have one size. Squares are the simple answer, and cut off the ends
# of every photograph that is not square. With *aspect-ratio buckets* there are several sizes of about equal
# area, from 1:2 to 2:1. Each image goes to the size that is nearest to its own ratio, and a batch is of one
# size. A training step is compiled once for each size.
#
# Sides are multiples of 8 at 64 pixels and of 32 at 512, as the UNet halves its feature maps several times.

# %%
sd = StableDiffusion.from_preset(PRESET)
image_size = sd.unet.config.sample_size * sd.vae.config.downsampling
grid = buckets.bucket_grid(image_size, BUCKETS)
print("buckets, width x height:", ", ".join(f"{width} x {height}" for height, width in grid))

examples = {
    ratio: Image.open(photographs / f"coffee-{number:02}.jpg")
    for number, ratio in enumerate(RATIOS)
    if number % 4 != 3 and number < CROPS
}
figure, axes = plt.subplots(1, len(examples), figsize=(9, 2.4), squeeze=False)
for axis, (ratio, image) in zip(axes[0], examples.items(), strict=True):
    size = (image.height, image.width)
    nearest = grid[buckets.assign(np.array([size]), grid)[0]]
    axis.imshow(image)
    shares = []
    for frame, colour, style in (((image_size,) * 2, "yellow", "--"), (nearest, "cyan", "-")):
        top, left, bottom, right = frame_of(size, frame).box
        sides = right - left, bottom - top
        axis.add_patch(Rectangle((left, top), *sides, fill=False, color=colour, linestyle=style, linewidth=2))
        shares.append(buckets.cropped_shares(np.array([size]), np.array([frame]))[0])
    axis.set_title(f"{ratio}: -{shares[0]:.0%} or -{shares[1]:.0%}", fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# Dashed yellow is what a square keeps, cyan what the bucket keeps; the figures are the shares of the area
# that are cropped away by each. For the whole folder, in squares and in buckets:

# %%
for options in ("", in_buckets):
    command(f"{look} {options}", shown=("squares", "bucket"))

# %% [markdown]
# A bucket whose images do not fill one batch in an epoch is merged into its neighbour, so with few images use
# few buckets or small batches. `--no-center-crop` draws the position of the crop anew each time an image is
# shown, in place of the centre. `--random-flip` mirrors half of the images; leave it off where left and right
# matter, as in writing.
#
# ## What the autoencoder can show
#
# The UNet works on latents, which the variational autoencoder (VAE) makes from pixels: far fewer numbers,
# on a smooth scale, so that a small error in the latents is a small error in the image. That is what the
# VAE is for; it has nothing to do with overfitting. It is frozen here, so what it cannot reproduce no
# fine-tuning of the UNet will show. Encode and decode some images before you train:

# %%
squares = load_source("photographs", "train", image_size)
names = [Path(squares.details(index)["path"]).stem.split("-")[0] for index in range(len(squares))]
firsts = [names.index(name) for name in PHOTOGRAPHS]
originals = np.stack([squares[index]["image"] for index in firsts])
latents = sd.vae.encode(images_to_unit(originals)).mode()
decoded = images_from_unit(np.asarray(sd.vae.decode(latents)))
show({"image": originals, "decoded": decoded}, [*PHOTOGRAPHS])

# %% [markdown]
# This autoencoder was trained on emoji and keeps coarse shapes and colours of a photograph. Stable
# Diffusion's was trained on photographs and keeps nearly all of them at 512 pixels.
#
# ## Train
#
# The real command, in a process of its own. The autoencoder and the text encoder are frozen, so each crop
# and each caption is encoded once, into the folder `encodings`. Later runs with the same model, images and
# crops read them, and `keras-sd encode` can fill the folder beforehand.
#
# - `--validation-steps` measures the loss on fixed images, fixed noise and fixed timesteps, of training
#   images and of held-out ones, for the raw weights and for their moving average (EMA), which is what is
#   exported. The loss of a training step is of little use for that: each step draws other noise levels,
#   which change it more than the learning does.
# - `--checkpointing-steps` keeps the weights at the same steps, to choose from later.
# - Here it is full fine-tuning. In place of `text-to-image` write `lora` for a small file beside the model;
#   the other options stay, and the learning rate is higher, for Stable Diffusion ten times (`06_fine_tune`).

# %%
told = ("training:", "bucket", "validated", "saved")
train = f"python -m keras_sd.train text-to-image {model} {COMPILE}"
train += f" --cache-latents disk --cache-dir encodings --learning-rate {LEARNING_RATE} --ema-decay 0.95"
train += f" --lr-warmup-steps {min(20, FEW_STEPS)} --evaluation-steps 0 --checkpoints-total-limit 20"
in_full = f"{train} --train-data-dir photographs --output-dir runs/photographs {in_buckets} --bucket-upscale"
in_full += f" --max-train-steps {TRAINING_STEPS}"
in_full += f" --validation-steps {VALIDATION_STEPS} --checkpointing-steps {VALIDATION_STEPS}"
print(in_full, end="\n\n")
command(in_full, shown=told)


def kept():
    return sum(path.stat().st_size for path in Path("encodings").rglob("*") if path.is_file()) / 2**20


print(f"encodings: {kept():.2f} MiB")

# %% [markdown]
# ## Read the validation loss
#
# The logs are lines of JSON in `logs/metrics.jsonl`, and for TensorBoard. `keras-sd plot RUN` draws all of
# them and says what looks wrong.


# %%
def validations(run):
    """Steps, and losses of training and of held-out images, by the EMA weights."""
    lines = Path(run, "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [each for each in map(json.loads, lines) if "validation_loss_train_ema" in each]
    kinds = {"training": "train", "held-out": "held_out"}
    losses = {name: [each[f"validation_loss_{kind}_ema"] for each in found] for name, kind in kinds.items()}
    return [each["step"] for each in found], losses


def draw_losses(run, title):
    steps, losses = validations(run)
    figure, axis = plt.subplots(figsize=(6.5, 3))
    for (name, values), style in zip(losses.items(), ("-o", "--s"), strict=True):
        axis.plot(steps[1:], values[1:], style, label=f"{name} images")
    axis.set(xlabel="step", ylabel="validation loss", title=f"{title}, from step {steps[1]} on")
    axis.grid(alpha=0.3)
    axis.legend()
    plt.show()
    best = int(np.argmin(losses["held-out"]))
    print(f"step 0: training {losses['training'][0]:.3f}, held-out {losses['held-out'][0]:.3f}")
    print(f"the held-out loss is lowest at step {steps[best]}: {losses['held-out'][best]:.3f}")
    return steps[best]


best = draw_losses("runs/photographs", f"{len(squares)} images")
command("keras-sd plot runs/photographs")

# %% [markdown]
# While both losses fall, the model learns what the two sets of images have in common. From where the
# held-out loss rises, it learns the training images themselves. That line, and no table, says how many
# steps are right for your images. The remark about the prediction type is a guess, and here a wrong one:
# the loss begins so high because the model had never seen a photograph. Stable Diffusion has, and begins
# far lower.
#
# ## Before and after
#
# The checkpoint with the lowest held-out loss is exported as a model. The prompts and seeds are the same
# for all rows. The last prompt is not of the data set: it shows what the model has forgotten.

# %%
prompts = [first for _, first, _ in PHOTOGRAPHS.values()] + ["red heart"]
titles = [*PHOTOGRAPHS, "red heart"]
sampling = {
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "seed": 0,
    "progress": False,
}
rows = {"before": sd.text_to_image(prompts, **sampling)}
best = best or VALIDATION_STEPS  # there is no checkpoint of step 0
command(f"keras-sd export runs/photographs/checkpoint-{best} chosen", shown=("chosen",))
rows[f"step {best}"] = StableDiffusion.load("chosen").text_to_image(prompts, **sampling)
tuned = StableDiffusion.load("runs/photographs/model")
rows[f"step {TRAINING_STEPS}"] = tuned.text_to_image(prompts, **sampling)
show(rows, titles)

# %% [markdown]
# Colours and the places of things are learned first; outlines would need more steps, more photographs and a
# better autoencoder. To the eye the two steps hardly differ. The held-out loss says that the later one is
# no better, so the earlier one is the choice. Neither makes a red heart any more. That is the price of a
# high learning rate on few images. What keeps the rest: a lower rate, fewer steps, a LoRA, whose weight can
# be lowered afterwards, or prior preservation (`07_dreambooth_and_textual_inversion`).
#
# A model that was trained in buckets also makes images of these shapes, such as the widest:

# %%
height, width = grid[-1]
show({f"{width} x {height}": tuned.text_to_image(prompts, height=height, width=width, **sampling)}, titles)

# %% [markdown]
# ## Overfitting
#
# The same command with six square images, one of each photograph, and the same held-out ones. All of them are
# found among the encodings, since an encoding is named by what is in the file, and not by its path.

# %%
shutil.copytree(photographs / "validation", "few/validation")
for index, name in zip(firsts, PHOTOGRAPHS, strict=True):
    path = Path(squares.details(index)["path"])
    shutil.copy(path, Path("few", f"{name}{path.suffix}"))
    shutil.copy(path.with_suffix(".txt"), Path("few", f"{name}.txt"))

steps_of_few = max(1, FEW_STEPS // 8)
few = f"{train} --train-data-dir few --output-dir runs/few --max-train-steps {FEW_STEPS}"
few += f" --validation-steps {steps_of_few} --checkpointing-steps {steps_of_few}"
before = kept()
command(few, shown=told)
print(f"encodings: {kept() - before:.2f} MiB more")
draw_losses("runs/few", f"{len(PHOTOGRAPHS)} images")
command("keras-sd plot runs/few")

# %% [markdown]
# The loss of the training images goes on falling, which alone would look like success. The loss of the
# held-out images rises soon and fast: the model gets worse at every image but the six. The images show it
# too, if one puts what the model makes beside what it was trained on. Here as the decoder shows it:

# %%
made = StableDiffusion.load("runs/few/model").text_to_image(prompts, **sampling)
show({"made": made[:-1], "trained on": decoded}, titles[:-1])

# %% [markdown]
# What helps, in this order: more images, fewer steps (an earlier checkpoint), a lower learning rate, a LoRA
# of a small rank. `--random-flip` and `--no-center-crop --cache-latents off` make more of the images that
# there are.
#
# ## The same with Stable Diffusion
#
# At 512 pixels on a GPU the commands are the same, with the model named and the defaults of the model for the
# learning rate, the batch size, the schedule and the EMA:
#
# ```bash
# pip install -e '.[jax-cuda,train]' && export KERAS_BACKEND=jax
# keras-sd dataset photographs --pretrained-model-name-or-path sd-1.5 --enable-bucket --bucket-upscale
# python -m keras_sd.train lora --pretrained-model-name-or-path sd-1.5 --train-data-dir photographs \
#     --enable-bucket --bucket-upscale --cache-latents disk --cache-dir encodings --rank 16 \
#     --validation-steps 100 --checkpointing-steps 100 --checkpoints-total-limit 20 \
#     --sample-at-first --evaluation-steps 500 --max-train-steps 1500 --output-dir runs/photographs
# keras-sd plot runs/photographs
# keras-sd export runs/photographs/checkpoint-600 my-lora
# keras-sd generate "a ginger cat on a table" --model sd-1.5 --lora my-lora --output cat.png
# ```
#
# - `--enable-bucket` means nine buckets. `--bucket-upscale` enlarges images that are smaller than their
#   bucket; without it they are an error, or are left out with `--on-bad-sample skip`.
# - Without a folder `validation`, `--validation-split 0.1` holds a tenth of the images out.
# - The step of the checkpoint, here 600, is the one where your held-out loss is lowest.
# - A GPU with units for bfloat16 computes in bfloat16 by default. `--gradient-checkpointing` saves memory.
# - `text-to-image` in place of `lora` trains the whole UNet: for thousands of images.
#
# How the folder looks at that resolution can be seen here, too, since the sizes of the buckets depend on the
# resolution alone:

# %%
command(
    "keras-sd dataset photographs --resolution 512 --enable-bucket --bucket-upscale --train-batch-size 4 "
    "--images 1 --output at-512.png --overwrite"
)

# %% [markdown]
# Mind whose photographs you train on, and ask the people in them. [docs/data.md](../docs/data.md) has all
# options of data, [docs/training-guide.md](../docs/training-guide.md) what to look at in a run.
#
# ## References
#
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
# - NovelAI, *Improvements on Stable Diffusion* (aspect-ratio buckets), 2022
# - van der Walt et al., *scikit-image: image processing in Python*, PeerJ 2014; its photographs: the
#   astronaut Eileen Collins and the galaxies by NASA, the rocket by SpaceX, the cat by Stefan van der Walt,
#   the coffee by Rachel Michetti, the photographer by Lav Varshney
