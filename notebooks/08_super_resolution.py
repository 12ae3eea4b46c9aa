# %% [markdown]
# # Super-resolution with a diffusion model
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** A diffusion upscaler against interpolation: how it works, what it invents.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# Draws the images of the last section. On a GPU or TPU give a hub id or the absolute path of a folder of
# Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
UPSCALER = "emoji-upscaler"  # or the folder of a `super-resolution` run's model
TEST_IMAGES = 60
NUM_INFERENCE_STEPS = 10
STEP_COUNTS = (1, 2, 5, 10, 20)
NOISE_LEVELS = (0, 20, 40, 60, 80)
INPUT_NOISE = 12  # standard deviation in levels of 255
NUM_SEEDS = 8
PROMPTS = ("red heart", "grinning face", "rocket", "tulip", "pizza", "snowman")

# %% [markdown]
# **What you will learn**
#
# - How a diffusion model upscales: the small image is an input of the network, beside the noise.
# - To compare it with bicubic and Lanczos interpolation, by figures and by eye.
# - Which details are known and which are invented, and what the noise level changes.
#
# ## Introduction
#
# Make an image smaller and detail is lost. Many large images become the same small one, so no method can
# know which of them it was. Interpolation computes smooth curves through the pixels, and edges
# become soft. A network that is trained to come close to the true pixels answers with the mean of all
# likely images, which is soft again where it is not sure.
#
# A diffusion model can do something else: draw *one* likely image. SR3 (Saharia et al., *Image
# super-resolution via iterative refinement*, arXiv:2104.07636) begins with noise, as every diffusion model
# does, and refines it while it looks at the small image.
#
# The bundled upscaler is such a model. It doubles the sides of emoji, has less than a million weights and
# runs on a processor.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import logging

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

from keras_sd import (
    NoiseSchedule,
    StableDiffusion,
    Upscaler,
    add_noise,
    evenly,
    images_from_unit,
    images_to_unit,
    load_source,
    peak_signal_to_noise_ratio,
    presets,
    resized,
)
from keras_sd.metrics.reconstruction import edge_error
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.super_resolution import measure_upscaling, upscaling_example

logging.getLogger("tensorflow").setLevel(logging.ERROR)
plt.rcParams.update(
    {
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)


def show(rows, columns, size=1.7):
    """Draws images as a table: `rows` is a dictionary from a row's title to its images."""
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
# ## What the network sees
#
# Text-to-image models take their condition, the prompt, in by cross-attention. Here the condition is an
# image, and it has its place: a pixel of the small image says something about the same spot of the large
# one. So the small image is enlarged by bicubic interpolation and *concatenated* to the noisy image along
# the channels: three of noise and three of image go in, three come out. A UNet of convolutions does the
# rest. It has no attention, so it takes images of any size.

# %%
upscaler = Upscaler.load(presets.find(UPSCALER), batch_size=15)
config = upscaler.unet.config
print(
    f"{upscaler.unet.count_params():,} weights, {config.in_channels} channels in, {config.out_channels} out"
)

truth = np.stack([e["image"] for e in evenly(load_source("emoji", "validation", 128), TEST_IMAGES)])
small = np.stack([resized(image, (64, 64)) for image in truth])
enlarged = np.stack([resized(image, (128, 128)) for image in small])

states = []
upscaler.upscale(
    small[:1],
    num_inference_steps=NUM_INFERENCE_STEPS,
    on_step=lambda denoised: states.append(denoised.latents),
)
places = np.unique(np.linspace(0, len(states) - 1, 4).astype(int))
seen = [small[0], enlarged[0], *(images_from_unit(states[place])[0] for place in places)]
titles = ["64 pixels", "enlarged", *(f"after {place + 1} of {len(states)}" for place in places)]
show({"": seen}, titles)

# %% [markdown]
# Left what goes in, then the image on its way from noise.
#
# ## Against interpolation
#
# Images that no model was trained on are made small (bicubic) and large again. Lanczos interpolation takes
# a wider neighbourhood into account than bicubic does and is a little sharper. The lower row is the square
# that is marked in the upper one.


# %%
def compare(methods, corner, side=40):
    """Whole images of each method, and below them a square of each, enlarged."""
    left, top = corner
    crops = {name: image[top : top + side, left : left + side] for name, image in methods.items()}
    figure, axes = plt.subplots(2, len(methods), figsize=(1.95 * len(methods), 4.3))
    for column, (name, image) in enumerate(methods.items()):
        axes[0, column].set_title(name)
        axes[0, column].imshow(image)
        axes[0, column].add_patch(Rectangle((left, top), side, side, fill=False, color="black"))
        axes[1, column].imshow(crops[name])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    plt.show()


made, figures = measure_upscaling(upscaler, truth, num_inference_steps=NUM_INFERENCE_STEPS)
lanczos = np.stack([resized(image, (128, 128), Image.Resampling.LANCZOS) for image in small])
nearest = small.repeat(2, axis=1).repeat(2, axis=2)
for index, corner in ((0, (44, 20)), (len(truth) // 2, (44, 58))):
    compare(
        {
            "64 pixels": nearest[index],
            "bicubic": enlarged[index],
            "Lanczos": lanczos[index],
            "upscaler": made[index],
            "truth": truth[index],
        },
        corner,
    )

# %% [markdown]
# Two figures over all test images. The peak signal-to-noise ratio (PSNR) says how close the pixels come;
# more is better. The edge error is the mean absolute error of the differences between neighbouring pixels, in
# levels of 0 to 255; less is better. It rises where edges are soft, and where there are rings beside them.

# %%
print(f"{len(truth)} images    PSNR    edge error")
for title, prefix in (("bicubic", "bicubic_"), ("Lanczos", "lanczos_"), ("upscaler", "")):
    print(f"{title:12} {figures[prefix + 'psnr']:7.2f} dB {figures[prefix + 'edge_error']:9.2f}")
gain = figures["edge_error"] / figures["bicubic_edge_error"] - 1
print(f"edges against bicubic: {gain:+.0%}")

# %% [markdown]
# It is no wonder that a model of emoji beats a general formula on emoji. It knows that shapes are flat, that
# edges are sharp, and which curves are common. Photographs were not measured; it has seen none.
#
# ## Steps
#
# This network predicts the clean image. With one step it does so from pure noise and the small image:
# the mean of all that is likely, which squared errors like best. Each further step settles something, and a
# single likely image is farther from the truth than the mean is (Blau and Michaeli, *The
# perception-distortion tradeoff*, arXiv:1711.06077). Do the figures show it?

# %%
few = slice(0, 15)
psnrs, edges = [], []
by_steps = {}
for num_inference_steps in STEP_COUNTS:
    images = upscaler.upscale(small[few], num_inference_steps=num_inference_steps)
    psnrs.append(peak_signal_to_noise_ratio(truth[few], images))
    edges.append(edge_error(truth[few], images))
    by_steps[num_inference_steps] = images[0]

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, values, title in ((axes[0], psnrs, "PSNR (dB)"), (axes[1], edges, "edge error (levels)")):
    axis.plot(STEP_COUNTS, values, marker="o")
    axis.set(xscale="log", xlabel="steps", ylabel=title)
    axis.set_xticks(STEP_COUNTS, STEP_COUNTS)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
plt.show()
show({"": by_steps.values()}, [f"{count} steps" for count in by_steps], size=1.5)

# %% [markdown]
# Only in part. From the second step on both figures get worse, as expected, but by little: at twice the size
# the small image leaves little open. One step alone is not the best, though. It has to answer from pure
# noise, which a small network does less well than it should; the second one mends that. More steps pay where
# more has to be invented.
#
# ## What is invented
#
# Other seeds begin from other noise and end at other images. Where they differ, the small image left it
# open. The map shows the standard deviation over seeds, for each pixel.

# %%
repeated = np.repeat(small[:1], NUM_SEEDS, axis=0)
draws = upscaler.upscale(repeated, num_inference_steps=NUM_INFERENCE_STEPS)  # image i is drawn from seed + i
spread = draws.astype("float32").std(axis=0).mean(axis=-1)

figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.6))
for axis, image, title in zip(axes, (draws[0], draws[1]), ("seed 0", "seed 1"), strict=False):
    axis.imshow(image)
    axis.set_title(title)
mean = draws.mean(axis=0).round().astype("uint8")
axes[2].imshow(mean)
axes[2].set_title(f"mean of {NUM_SEEDS} seeds")
shown = axes[3].imshow(spread, cmap="gray_r")
axes[3].set_title("standard deviation")
figure.colorbar(shown, ax=axes[3], label="levels of 255")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()
print(
    f"PSNR of one draw {peak_signal_to_noise_ratio(truth[:1], draws[:1]):.2f} dB, "
    f"of the mean of {NUM_SEEDS} {peak_signal_to_noise_ratio(truth[:1], mean[None]):.2f} dB"
)

# %% [markdown]
# Flat regions are certain, edges are not, and the mean of several draws is closer to the truth than one of
# them.
#
# ## The noise level
#
# What if the image that comes in is itself not clean? An upscaler that trusts every pixel enlarges the
# faults as well. Ho et al. (*Cascaded diffusion models for high fidelity image generation*, arXiv:2106.15282)
# put noise on the small image in training, of a random level, and tell the network the level. It learns how
# far to trust what it sees. In use one chooses: 0 keeps to the image, more lets the model invent more.
#
# On top is what the network sees of a clean image at each level, then what it makes of it. The last row is
# made of a small image that had noise on it before.


# %%
def grainy(images):
    """Images with Gaussian noise on them, uint8."""
    grain = np.random.default_rng(1).normal(0, INPUT_NOISE, images.shape)
    return np.clip(images + grain, 0, 255).round().astype("uint8")


low_res = NoiseSchedule(upscaler.low_res_scheduler_config)
noise = np.random.default_rng(0).standard_normal(enlarged[0].shape, dtype="float32")
clean = images_to_unit(enlarged[0])
rows = {
    "it sees": [
        images_from_unit(add_noise(clean, noise, low_res.signal_rates[level], low_res.noise_rates[level]))
        for level in NOISE_LEVELS
    ]
}
results = {}
for title, images in (("clean", small[few]), ("grainy", grainy(small[few]))):
    at_levels = [
        upscaler.upscale(images, noise_level=level, num_inference_steps=NUM_INFERENCE_STEPS)
        for level in NOISE_LEVELS
    ]
    rows[f"of {title}"] = [made[0] for made in at_levels]
    results[title] = [peak_signal_to_noise_ratio(truth[few], made) for made in at_levels]
show(rows, [f"level {level}" for level in NOISE_LEVELS])

print("PSNR (dB) at level", *(f"{level:7}" for level in NOISE_LEVELS))
for title, values in results.items():
    print(f"{title:18}", *(f"{value:7.2f}" for value in values))

# %% [markdown]
# Level 0 is best in both rows, which is worth a look. A clean image loses with every level, since noise
# hides what was known. The grainy one loses far less, as there is less to hide, but it gains nothing either:
# the network has learned to see through noise that is independent from pixel to pixel, and grain that was on
# the small image arrives enlarged, as blotches. So the level is no filter for faults of any kind. It pays
# in a cascade, where the small image comes from another model whose faults are to be drawn over; Ho et al.
# find the level by trying.
#
# ## How it is trained
#
# Training needs large images only, since small ones are made from them. Three things keep the upscaler from
# fitting a single method of reduction, as it would fail on images that were reduced by another:
#
# - the filter is drawn anew each time (box, bilinear, Hamming, bicubic or Lanczos),
# - one image in four is blurred a little before,
# - noise of a random level goes onto the small image, low levels more often.
#
# It sees squares cut out of images. What a convolution learns on 48 pixels holds on 128.

# %%
schedule = NoiseSchedule(upscaler.scheduler_config)
generator = np.random.default_rng(3)
drawn = [
    upscaling_example(
        {"image": truth[index]},
        generator,
        noise=NoiseDrawing(DiffusionSettings(), schedule),
        low_res_schedule=low_res,
        noise_levels=config.num_class_embeds,
        factor=2,
        crop=48,
    )
    for index in range(min(6, len(truth)))
]
noisy = [
    add_noise(
        images_to_unit(example["samples"]),
        example["noise"],
        schedule.signal_rates[example["timesteps"]],
        schedule.noise_rates[example["timesteps"]],
    )
    for example in drawn
]
show(
    {
        "wanted": [example["samples"] for example in drawn],
        "seen": [images_from_unit(example["channels"]) for example in drawn],
        "noisy": [images_from_unit(image) for image in noisy],
    },
    [f"level {e['class_labels']}, t {e['timesteps']}" for e in drawn],
    size=1.55,
)

# %% [markdown]
# The network gets `seen` and `noisy`, the noise level and the timestep `t`, and predicts `wanted`. The loss
# is a mean squared error. That is all; the rest is the same loop as for every other model here:
#
# ```bash
# python -m keras_sd.train super-resolution --output-dir runs/upscaler --train-data-dir images \
#     --max-train-steps 2000 --learning-rate 1.5e-3 --ema-decay 0.998 --evaluation-steps 500
# keras-sd upscale small.png --model runs/upscaler/model
# ```
#
# The bundled upscaler took 28 minutes on two cores.
#
# ## Larger images of what a model draws
#
# This is how large text-to-image systems work as well: a base model draws a small image, and upscalers
# make it large, each a diffusion model of its own. The emoji model draws 64 pixels.

# %%
sd = StableDiffusion.from_preset(PRESET)
drawn = sd.text_to_image(list(PROMPTS), num_inference_steps=30, guidance_scale=2.0, seed=0, progress=False)
size = [2 * side for side in drawn.shape[1:3]]
show(
    {
        "bicubic": [resized(image, size) for image in drawn],
        "level 0": upscaler.upscale(drawn, num_inference_steps=NUM_INFERENCE_STEPS),
        "level 40": upscaler.upscale(drawn, noise_level=40, num_inference_steps=NUM_INFERENCE_STEPS),
    },
    PROMPTS,
)

# %% [markdown]
# What the small image lacks, the upscaler does not add, at level 40 as little as at level 0: it sharpens
# edges and leaves shapes as they are.
#
# ## Stable Diffusion's x4 upscaler
#
# The [x4 upscaler](https://huggingface.co/stabilityai/stable-diffusion-x4-upscaler) follows the same idea
# with two differences. It works on latents, so that 512 x 512 pixels in and 2048 x 2048 out stay
# affordable: the noise has the 4 channels of latents at the small image's size, the small image comes
# along as 3 more, and a VAE with a factor of 4 decodes. And it reads a prompt by cross-attention. It has the
# noise levels, too:
#
# ```python
# x4 = StableDiffusion.from_preset("stabilityai/stable-diffusion-x4-upscaler", dtype="float16")
# large = x4.upscale(small, "a photo of a cat", noise_level=20, num_inference_steps=50)  # 4x the sides
# ```
#
# For images as small as emoji, latents are the wrong place: a small autoencoder errs more at edges than
# this whole upscaler does (`docs/finetuning.md`).
#
# ## References
#
# - Saharia et al., *Image super-resolution via iterative refinement*, arXiv:2104.07636
# - Ho et al., *Cascaded diffusion models for high fidelity image generation*, arXiv:2106.15282
# - Blau and Michaeli, *The perception-distortion tradeoff*, arXiv:1711.06077
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
