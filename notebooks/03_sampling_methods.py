# %% [markdown]
# # Sampling methods: from noise to image
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Every sampler over numbers of steps and seeds: which of them agree, and how soon.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or a local folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPT = "face with sunglasses"
STEP_COUNTS = (3, 5, 10, 20, 50)
REFERENCE_STEPS = 200
NUM_SEEDS = 4  # images that distances are averaged over
GUIDANCE_SCALE = 2.0
SEED = 0

# %% [markdown]
# **What you will learn**
#
# - What a sampler does, and that samplers differ: in the image, in the number of evaluations and in how
#   they converge.
# - Which samplers arrive at the same image, and which ones never settle.
# - Which one to choose for speed, for variety and for comparisons.
#
# ## Introduction
#
# A diffusion model is a network that tells an image from noise. It does not say how to get from noise to an
# image. That is the task of the *sampler*: a rule that says at which noise levels the network is evaluated,
# and how its predictions are combined. The network stays the same, so any sampler can be used with it, and
# there are many of them. It is sometimes said that the choice makes no difference. It does, in the image
# and in the cost, and this notebook measures how much.
#
# They come in two kinds.
#
# - **Deterministic** samplers follow a differential equation, the probability flow ODE (Song et al.,
#   2021b). It joins each noise to one image. All of them solve the same equation; they differ in how well
#   they do it in few steps.
# - **Stochastic** samplers take away more noise than a step needs and add fresh noise. There is no one
#   image that belongs to a noise. They differ from one number of steps to the next, and may well give
#   better images.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from keras_sd import SAMPLERS, NoiseSchedule, StableDiffusion

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)

sd = StableDiffusion.from_preset(PRESET)
schedule = NoiseSchedule(sd.scheduler_config)


def draw(sampler, num_inference_steps, **options):
    """`NUM_SEEDS` images of the prompt."""
    options = {"num_images": NUM_SEEDS, "seed": SEED, "guidance_scale": GUIDANCE_SCALE, **options}
    return sd.text_to_image(
        PROMPT, sampler=sampler, num_inference_steps=num_inference_steps, progress=False, **options
    )


def show(rows, titles, labels, side=1.2):
    """Draws rows of images with a title over each column and a label before each row."""
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(side * len(titles) + 2, side * len(rows) + 0.4), squeeze=False
    )
    for row, images, label in zip(axes, rows, labels, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    plt.show()


# %% [markdown]
# ## Timestep spacing
#
# `SAMPLERS` is a table. A sampler turns the noise schedule and a number of steps into rows of plain
# numbers: the timestep of the evaluation, and the weights by which the prediction and the latents are
# combined. One step, compiled once, works on the rows of all samplers. So we can look at a sampler without
# running it.
#
# The number of rows is the number of times that the network is evaluated. That is what costs time, and it
# is the fair measure: Heun and DPM2 evaluate twice a step.


# %%
def evaluations(sampler, num_inference_steps):
    """How often the network is asked (twice as much work each time with guidance)."""
    return len(SAMPLERS[sampler].tables(schedule, num_inference_steps).rows)


def draws_noise(sampler):
    return any(row.draws for row in SAMPLERS[sampler].tables(schedule, 10).rows)


print(f"{'name':20} {'as A1111 says':22} {'evaluations in 20 steps':24} fresh noise")
for name, sampler in SAMPLERS.items():
    print(f"{name:20} {sampler.name:22} {evaluations(name, 20):<24} {'yes' if draws_noise(name) else 'no'}")

# %%
figure, axis = plt.subplots(figsize=(7, 3.2))
for name, marker in (("ddim", "o"), ("dpmpp_2m", "s"), ("dpmpp_2m_karras", "^")):
    timesteps = [row.timestep for row in SAMPLERS[name].tables(schedule, 20).rows]
    axis.plot(
        np.arange(1, len(timesteps) + 1), timesteps, marker=marker, markersize=5, label=SAMPLERS[name].name
    )
axis.set(xlabel="evaluation", ylabel="timestep", title="Timesteps of 20 steps (0 is without noise)")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# The spacing of Karras et al. (2022) puts more of the steps where little noise is left. That serves
# details. It is no gain where a model begins from noise alone, as the bundled one does: a good part of the
# steps then goes to levels at which nothing is to be seen yet.
#
# ## All samplers, few steps and many
#
# Every row begins from the same noise.

# %%
images = {(name, steps): draw(name, steps) for name in SAMPLERS for steps in STEP_COUNTS}
show(
    [[images[name, steps][0] for steps in STEP_COUNTS] for name in SAMPLERS],
    [f"{steps} steps" for steps in STEP_COUNTS],
    [sampler.name for sampler in SAMPLERS.values()],
)

# %% [markdown]
# ## Convergence
#
# The deterministic samplers should all arrive at the same image, the exact solution of the equation. We
# take Heun's in many steps for it and measure the distance of every other image: the root mean square
# over the pixels, averaged over the seeds.
#
# A solver of order $p$ has an error that falls with the $p$-th power of the step, once steps are small.
# First-order ones (DDIM, Euler) halve it when the steps are doubled. Second-order ones (Heun, DPM2, DPM++
# 2M) quarter it, but Heun and DPM2 pay twice for each step.


# %%
def distance(some, others):
    """Root mean square difference of images in levels of 0 to 255, averaged over the images."""
    squares = (some.astype("float64") - others.astype("float64")) ** 2
    return np.sqrt(squares.mean(axis=(1, 2, 3))).mean()


def plot_distances(names, reference_of, title):
    """Draws how far the images are from a reference, against evaluations; Karras' spacing is dashed."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    markers = "os^Dv<>pP*Xhd"
    for index, name in enumerate(names):
        counts = [evaluations(name, steps) for steps in STEP_COUNTS]
        distances = [distance(images[name, steps], reference_of(name)) for steps in STEP_COUNTS]
        line = {"marker": markers[index], "linestyle": "--" if "karras" in name else "-"}
        axis.plot(counts, distances, color=f"C{index % 10}", label=SAMPLERS[name].name, **line)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="network evaluations",
        ylabel="distance (levels of 255)",
        title=title,
    )
    axis.set_xticks(STEP_COUNTS, STEP_COUNTS)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(1, 200)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=9, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


solution = draw("heun", REFERENCE_STEPS)
deterministic = [name for name in SAMPLERS if not draws_noise(name)]
plot_distances(deterministic, lambda name: solution, f"Distance to Heun's image in {REFERENCE_STEPS} steps")

# %%
most = STEP_COUNTS[-1]
ranking = sorted(deterministic, key=lambda name: distance(images[name, most], solution))
print(f"distance to the solution, in levels of 255, in {STEP_COUNTS[1]} and in {most} steps:")
for name in ranking:
    few, many = (distance(images[name, steps], solution) for steps in (STEP_COUNTS[1], most))
    print(f"{SAMPLERS[name].name:18} {few:6.1f} {many:6.1f}")

# %% [markdown]
# ## Divergence
#
# A stochastic sampler does not settle. More steps mean more fresh noise, and that leads elsewhere. We
# measure each of them against its *own* image in many steps.

# %%
stochastic = [name for name in SAMPLERS if draws_noise(name)]
own = {name: draw(name, REFERENCE_STEPS) for name in stochastic if name != "lcm"}
names = list(own)
plot_distances(names, own.get, f"Distance to its own image in {REFERENCE_STEPS} steps")

# %% [markdown]
# (LCM is left out: it is meant for models that were distilled for it, and takes 50 steps at most.)
#
# The curves stay high, and that is no fault. At each number of steps there is a good image, only another
# one. How far apart are good images of the same prompt? For comparison here are the distances between
# seeds.

# %%
between_seeds = np.mean(
    [distance(solution, np.roll(solution, shift, axis=0)) for shift in range(1, NUM_SEEDS)]
)
print(f"images of different seeds are {between_seeds:.1f} levels apart")
for name in names:
    away = distance(images[name, most], own[name])
    print(f"{SAMPLERS[name].name:20} in {most} steps: {away:5.1f} from its own")

# %% [markdown]
# ## Which samplers agree
#
# The distances between all samplers at the largest number of steps show the two kinds at a glance: the
# deterministic ones form one block of the same image.

#
# DDPM and Euler a are the same rule, at the same timesteps here: their images agree too.

# %%
order = deterministic + stochastic
matrix = np.array([[distance(images[a, most], images[b, most]) for b in order] for a in order])
titles = [SAMPLERS[name].name for name in order]
figure, axis = plt.subplots(figsize=(8, 6.8))
heatmap = axis.imshow(matrix, cmap="viridis_r")
axis.set_xticks(range(len(order)), titles, rotation=60, ha="right")
axis.set_yticks(range(len(order)), titles)
figure.colorbar(heatmap, label=f"distance in {most} steps (levels of 255)")
plt.show()

# %% [markdown]
# ## Seeds
#
# Each column is one seed. The deterministic rows agree in every column, the others differ.

# %%
chosen = ["ddim", "dpmpp_2m", "unipc", "euler_a", "dpmpp_2m_sde"]
middle = STEP_COUNTS[len(STEP_COUNTS) // 2 + 1] if len(STEP_COUNTS) > 2 else most
show(
    [images[name, middle] for name in chosen],
    [f"seed {SEED + index}" for index in range(NUM_SEEDS)],
    [SAMPLERS[name].name for name in chosen],
)

# %% [markdown]
# ## From one kind to the other
#
# DDIM can be either. Its parameter $\eta$ is the share of fresh noise in each step: 0 is deterministic, 1
# makes DDPM's ancestral sampling of it (Song et al., 2021a).

# %%
etas = [0.0, 0.25, 0.5, 0.75, 1.0]
show(
    [[draw("ddim", steps, eta=eta, num_images=1)[0] for eta in etas] for steps in STEP_COUNTS[-2:]],
    [f"eta {eta:g}" for eta in etas],
    [f"{steps} steps" for steps in STEP_COUNTS[-2:]],
)

# %% [markdown]
# ## What to take
#
# For the same image in the least time take a deterministic multistep solver, DPM++ 2M or UniPC, in 15 to 25
# steps. For variety take Euler a or DPM++ 2M SDE and more steps. To compare two models, or to walk between
# images (`04_random_walks`), stay with a deterministic one, since otherwise the sampler's random numbers
# add to the differences that you want to see. The choice is made in one word, and nothing is compiled anew:
#
# ```bash
# keras-sd generate "face with sunglasses" --sampler dpmpp_2m --num-inference-steps 20
# ```
#
# ## References
#
# - Ho et al., *Denoising diffusion probabilistic models*, arXiv:2006.11239
# - Song et al. (2021a), *Denoising diffusion implicit models*, arXiv:2010.02502
# - Song et al. (2021b), *Score-based generative modeling through stochastic differential equations*,
#   arXiv:2011.13456
# - Liu et al., *Pseudo numerical methods for diffusion models on manifolds* (PLMS), arXiv:2202.09778
# - Karras et al., *Elucidating the design space of diffusion-based generative models*, arXiv:2206.00364
# - Lu et al., *DPM-Solver++*, arXiv:2211.01095
# - Zhao et al., *UniPC*, arXiv:2302.04867
# - Luo et al., *Latent consistency models*, arXiv:2310.04378
