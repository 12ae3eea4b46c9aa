# %% [markdown]
# # Random walks through what Stable Diffusion can draw
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Walk from prompt to prompt, from noise to noise, in circles and over grids.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or a local folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPTS = ("red heart", "blue heart", "blue circle", "red apple")
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 2.0
NUM_FRAMES = 24  # of each walk
WALK_PROMPT = "face with sunglasses"  # of walks through the noise
GRID_SIDE = 6
SEED = 1

# %% [markdown]
# **What you will learn**
#
# - To interpolate between prompts and between noises, and to save the result as a GIF.
# - Why noise is interpolated along an arc and text encodings along a line.
# - To make circular walks and grids.
#
# ## Introduction
#
# A model that turns text and noise into images is a function: every text together with a noise
# gives an image. With a deterministic sampler it is continuous. Inputs that lie close together
# give images that look alike, so one can interpolate, and make an animation of the way.
#
# This notebook follows the Keras example [A walk through latent space with Stable
# Diffusion](https://keras.io/examples/generative/random_walks_with_stable_diffusion/) by Ian Stenbit,
# François Chollet and Luke Wood. It walks

# - through the text encodings, from prompt to prompt;
# - through the noise, from seed to seed;
# - round a circle of noises, which makes an animation without an end;
# - over a grid, in two directions at once.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

from keras_sd import NoiseStreams, StableDiffusion, image_grid, resized, save_gif
from keras_sd.models.batches import equal_batches

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)

sd = StableDiffusion.from_preset(PRESET)
latent_shape = sd.latent_shape()
sampling = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE, "progress": False}


def draw(noise, context):
    """Images of noises `(n, h, w, c)` and text encodings `(n, tokens, width)`, a batch at a time."""
    negative = sd.encode_text([""]).repeat(len(noise), axis=0)
    options = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
    images = []
    for batch in equal_batches(len(noise), sd.batch_size):
        images.append(sd.decode(sd.denoise(noise[batch], context[batch], negative[batch], **options)))
    return np.concatenate(images)[: len(noise)]


def show(frames, columns=8):
    """Draws frames as a sheet, to be read like a text."""
    sheet = image_grid(frames, columns=columns)
    width = min(10, 1.25 * columns)
    plt.figure(figsize=(width, width * sheet.shape[0] / sheet.shape[1]))
    plt.imshow(sheet)
    plt.axis("off")
    plt.show()


def play(frames, frame_rate=8, side=96):
    """Shows frames as an animated GIF of `side` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "walk.gif")
        save_gif([resized(frame, (side, side)) for frame in frames], path, frame_rate)
        display(Image(data=path.read_bytes(), format="gif"))


# %% [markdown]
# ## From prompt to prompt
#
# The text encoder turns a prompt into a table of numbers. The mean of two such tables is a table too,
# though no text has it. `random_walk` encodes all prompts, walks from each to the next in equal steps, and
# keeps the noise as it is. Only the meaning changes.

# %%
frames = sd.random_walk(list(PROMPTS), NUM_FRAMES, seed=SEED, **sampling)
show(frames)
play(frames)

# %% [markdown]
# A shape holds for some frames and then gives way to the next one within a few. The model was trained on
# texts only, not on what lies between them. With the closed list `[*PROMPTS, PROMPTS[0]]`
# the animation would have no end.
#
# ## Straight lines and arcs
#
# What is the mean of two noises? In a high dimension two draws from the standard normal distribution are
# nearly at right angles and nearly of the same length, so all noise lies close to a sphere. The straight
# line between two of them cuts through the inside. Half way its points are shorter, by about $1/\sqrt 2$:
# too little noise. The model never saw such noise in training.
#
# *Spherical linear interpolation* (slerp; Shoemake, 1985) goes along the sphere instead. For noises $a$ and
# $b$ with the angle $\theta$ between them, and a position $t$ from 0 at $a$ to 1 at $b$, it is
#
# $$\operatorname{slerp}(a, b; t) = \frac{\sin((1-t)\,\theta)\,a + \sin(t\,\theta)\,b}{\sin\theta}.$$


# %%
def lerp(a, b, shares):
    """Points on the straight line from `a` to `b`, one for each share."""
    shares = np.reshape(shares, (-1, *[1] * a.ndim))
    return ((1 - shares) * a + shares * b).astype("float32")


def slerp(a, b, shares):
    """Points on the arc from `a` to `b`, one for each share."""
    angle = np.arccos(np.clip(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    shares = np.reshape(shares, (-1, *[1] * a.ndim))
    return ((np.sin((1 - shares) * angle) * a + np.sin(shares * angle) * b) / np.sin(angle)).astype("float32")


first, second = NoiseStreams([SEED, SEED + 1]).draw(latent_shape)
shares = np.linspace(0, 1, 8)
ways = {"straight line": lerp(first, second, shares), "arc (slerp)": slerp(first, second, shares)}

figure, axis = plt.subplots(figsize=(6, 3))
for (name, points), style in zip(ways.items(), ("--", "-"), strict=True):
    lengths = np.sqrt(np.mean(points**2, axis=(1, 2, 3)))
    print(
        f"{name}: standard deviation half way {lengths[3:5].mean():.2f}, at the ends {lengths[0]:.2f} and "
        f"{lengths[-1]:.2f}"
    )
    axis.plot(shares, lengths, style, marker="o", label=name)
axis.set(xlabel="share of the way", ylabel="standard deviation of the noise", ylim=(0, 1.2))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# The upper row comes from the straight line, the lower one from the arc. How much it matters depends on the
# model: one that draws few details forgives more.

# %%
context = sd.encode_text([WALK_PROMPT]).repeat(len(shares), axis=0)
show(np.concatenate([draw(points, context) for points in ways.values()]), columns=len(shares))

# %% [markdown]
# Is slerp better for texts as well? Text encodings are no noise, and nothing says that they lie on a
# sphere. What is half way between two texts was never seen in training, whichever way one goes.
# `random_walk` takes the line. Here is how far both ways part, with the arc taken row by row of the tables:

# %%
start, end = sd.encode_text(list(PROMPTS[:2]))
cosines = np.sum(start * end, axis=1) / np.linalg.norm(start, axis=1) / np.linalg.norm(end, axis=1)
half_line = lerp(start, end, [0.5])[0]
half_arc = np.stack(
    [slerp(a, b, [0.5])[0] if c < 0.9999 else a for a, b, c in zip(start, end, cosines, strict=True)]
)
difference = np.linalg.norm(half_arc - half_line) / np.linalg.norm(end - start)
print(f"cosine of the rows of {PROMPTS[0]!r} and {PROMPTS[1]!r}: {cosines.mean():.2f} in the mean")
print(f"distance of line and arc half way: {difference:.1%} of the distance of both prompts")
half_ways = np.stack([start, half_line, half_arc, end])
show(draw(first[None].repeat(4, axis=0), half_ways), columns=4)

# %% [markdown]
# From left to right: the first prompt, half way on the line, half way on the arc, the second prompt.
#
# ## From noise to noise
#
# Now the prompt stays, and the noise walks along arcs from seed to seed. The images stay what the prompt
# says, and everything that it does not say changes.

# %%
stops = NoiseStreams(range(SEED, SEED + 4)).draw(latent_shape)
per_stretch = max(1, NUM_FRAMES // 3)
way = [slerp(a, b, np.arange(per_stretch) / per_stretch) for a, b in zip(stops, stops[1:], strict=False)]
way = np.concatenate(way)
frames = draw(way, sd.encode_text([WALK_PROMPT]).repeat(len(way), axis=0))
show(frames)
play(frames)

# %% [markdown]
# ## In a circle
#
# Two noises $a$ and $b$ span a circle: $\cos(\varphi)\,a + \sin(\varphi)\,b$ is again standard-normal noise
# for every angle $\varphi$. After a full circle the animation is where it began, so it can be repeated.
# This is what `random_walk` does when it gets one prompt.

# %%
frames = sd.random_walk(WALK_PROMPT, NUM_FRAMES, seed=SEED, **sampling)
show(frames)
play(frames)

# %% [markdown]
# How even is the walk? Steps of equal angles are not steps of equal change. The plot shows how much each
# frame differs from the one before.

# %%
moving = frames.astype("float32")
changes = np.sqrt(np.mean((moving - np.roll(moving, 1, axis=0)) ** 2, axis=(1, 2, 3)))
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.bar(np.arange(len(changes)), changes)
axis.set(xlabel="frame", ylabel="change\n(levels of 255)", ylim=(0, None))
plt.show()
print(f"median change {np.median(changes):.1f} levels, largest {changes.max():.1f}")

# %% [markdown]
# ## Over a grid
#
# Two directions at once make a map. Four prompts stand at the corners; every place in between gets a mean
# of their encodings, weighted by how near each corner is. The noise is the same everywhere.

# %%
corners = sd.encode_text(list(PROMPTS))
left_edge, right_edge = (lerp(*corners[pair], np.linspace(0, 1, GRID_SIDE)) for pair in ([0, 2], [1, 3]))
places = np.concatenate(
    [
        lerp(left, right, np.linspace(0, 1, GRID_SIDE))
        for left, right in zip(left_edge, right_edge, strict=True)
    ]
)
print("corners:", ", ".join(PROMPTS), "(top left, top right, bottom left, bottom right)")
show(draw(first[None].repeat(len(places), axis=0), places), columns=GRID_SIDE)

# %% [markdown]
# The second map walks through the prompts downwards and through the noise to the right. It shows that the
# two are different things: a row has one meaning, and a column has one composition.

# %%
kinds = sd.encode_text([PROMPTS[0], WALK_PROMPT])
downwards = lerp(kinds[0], kinds[1], np.linspace(0, 1, GRID_SIDE)).repeat(GRID_SIDE, axis=0)
rightwards = np.concatenate([slerp(first, second, np.linspace(0, 1, GRID_SIDE))] * GRID_SIDE)
show(draw(rightwards, downwards), columns=GRID_SIDE)

# %% [markdown]
# ## On the command line
#
# ```bash
# keras-sd walk "red heart" "blue heart" --num-frames 24 --output walk.gif
# keras-sd walk "red apple" --num-frames 60 --output circle.gif
# ```
#
# Samplers that add fresh noise work as well. `random_walk` then gives the same fresh noise to all frames,
# so that the animations do not flicker.
#
# ## References
#
# - Shoemake, *Animating rotation with quaternion curves*, SIGGRAPH 1985
# - Song et al., *Denoising diffusion implicit models*, arXiv:2010.02502
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
