# %% [markdown]
# # How Stable Diffusion works
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** The three parts of Stable Diffusion, each one seen at work.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or a local folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPT = "smiling face with sunglasses"
IMAGE = "1f981"  # code point of the emoji that is encoded, a lion
NUM_INFERENCE_STEPS = 30
GUIDANCE_SCALE = 2.0
SEED = 0

# %% [markdown]
# **What you will learn**
#
# - What the text encoder, the UNet and the autoencoder of Stable Diffusion do, each seen at work.
# - How the text gets in: by cross-attention, and not by concatenation to the noise.
# - What the variational autoencoder (VAE) is for: small and smooth latents. It is not there to prevent
#   overfitting.
# - What classifier-free guidance adds, and what too much of it does.
#
# ## Introduction
#
# Stable Diffusion (Rombach et al., 2022) makes an image from a text with three networks:
#
# 1. The **text encoder** turns the prompt into a table of numbers, one row for each token.
# 2. The **UNet** turns noise into *latents*, a small array that encodes an image. It is evaluated many
#    times, and reads the text's table every time.
# 3. The **decoder** of an autoencoder turns the latents into pixels.
#
# Besides there are a tokenizer, which splits text into pieces, and a sampler, which is arithmetic and
# no network.
#
# By default this notebook opens `emoji`, a model that is bundled with `keras_sd`. It is a small Stable
# Diffusion: the same parts, trained by the same recipe, on images of emoji. All that is shown here holds
# for the large models, and `PRESET` above opens one of those instead.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import matplotlib.pyplot as plt
import numpy as np
from keras import ops

from keras_sd import (
    NoiseSchedule,
    NoiseStreams,
    StableDiffusion,
    add_noise,
    guided_prediction,
    images_to_unit,
    load_emoji,
    peak_signal_to_noise_ratio,
    to_sample_and_noise,
)
from keras_sd.diffusion.spacing import ddim_steps
from keras_sd.models import attention

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)


def show(rows, titles, labels=None, **options):
    """Draws rows of images under the titles of the columns, with a label before each row."""
    columns = len(titles)
    width = min(10, 1.9 * columns)
    size = width, width / columns * len(rows) + 0.3
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for row, images in enumerate(rows):
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image, **options)
            axis.set(xticks=[], yticks=[])
        if labels:
            axes[row, 0].set_ylabel(labels[row])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    plt.show()


# %%
sd = StableDiffusion.from_preset(PRESET)
latent_shape = sd.latent_shape()
factor = sd.vae.config.downsampling
size = latent_shape[0] * factor

parts = {"text encoder": sd.text_encoder, "UNet": sd.unet, "autoencoder": sd.vae}
for name, part in parts.items():
    print(f"{name:13} {part.count_params():>13,} parameters")
print(f"images of {size} x {size} x 3, latents of {' x '.join(map(str, latent_shape))}")

images = sd.text_to_image(
    PROMPT,
    num_images=4,
    num_inference_steps=NUM_INFERENCE_STEPS,
    guidance_scale=GUIDANCE_SCALE,
    seed=SEED,
    progress=False,
)
show([images], [f"seed {SEED + index}" for index in range(4)])

# %% [markdown]
# ## The text encoder
#
# Networks compute with numbers. The tokenizer splits a prompt into *tokens*: frequent words stay whole, rare
# ones are split further (byte-pair encoding, Sennrich et al., 2016). Each token is a number in a vocabulary.
# Between a token for the beginning and one for the end stand those of the prompt, and padding fills the
# rest, so that all prompts have the same length.

# %%
for prompt in (PROMPT, "red heart", "a photorealistic hippopotamus"):
    pieces = [sd.tokenizer.decode([token]) for token in sd.tokenizer.encode([prompt])[0]]
    print(f"{prompt:30} {' | '.join(pieces)}")

ids = sd.tokenizer(PROMPT)
print(f"\n{PROMPT!r} as the text encoder gets it, {ids.shape[1]} numbers:\n{ids[0]}")

# %% [markdown]
# The text encoder is a transformer, the text half of CLIP (Radford et al., 2021). CLIP was trained to give
# an image and its caption vectors that point the same way, and other images and captions others. For
# every token it gives one row that knows about the tokens before it. The row at the *end* token has seen
# the whole text, which makes it a summary. Let us compare the summaries of a few prompts by the cosine of
# the angle between them.

# %%
prompts = ["red heart", "blue heart", "green heart", "red apple", "green apple", "dog face", "lion"]
context = sd.encode_text(prompts)
print(f"encodings of {len(prompts)} prompts: {context.shape}, that is prompts x tokens x width")

ends = [len(tokens) + 1 for tokens in sd.tokenizer.encode(prompts)]
summaries = context[np.arange(len(prompts)), ends]
summaries = summaries / np.linalg.norm(summaries, axis=1, keepdims=True)
cosines = summaries @ summaries.T

figure, axis = plt.subplots(figsize=(6.4, 5))
heatmap = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
axis.set_xticks(range(len(prompts)), prompts, rotation=40, ha="right")
axis.set_yticks(range(len(prompts)), prompts)
for row, column in np.ndindex(cosines.shape):
    value = cosines[row, column]
    axis.text(
        column, row, f"{value:.1f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black"
    )
figure.colorbar(heatmap, label="cosine")
plt.show()

pairs = [(a, b) for a in range(len(prompts)) for b in range(a)]
sharing = [bool(set(prompts[a].split()) & set(prompts[b].split())) for a, b in pairs]
values = np.array([cosines[pair] for pair in pairs])
print(f"mean cosine of prompts that share a word {values[sharing].mean():.2f}, of others", end=" ")
print(f"{values[np.logical_not(sharing)].mean():.2f}; dog face and lion {cosines[5, 6]:.2f}")

# %% [markdown]
# Prompts that share a thing or a colour are closer on average than those that share no word. A dog face and
# a lion are close without a common word, as their images are alike. This was not programmed: it
# follows from which captions stood beside which images. The small model has learned from few images,
# and some of its other neighbours are chance.
#
# The UNet gets the whole table, not the summary alone, so that every place of the image can read from it
# what it needs. How it reads is shown further below.
#
# ## Latents
#
# A diffusion model computes on the whole image at every step. On pixels that is expensive. So
# Stable Diffusion works on *latents*, into which the encoder of an autoencoder packs an image.

# %%
lion = next(emoji for emoji in load_emoji() if emoji.code == IMAGE)
image = lion.load(size)
latents = sd.encode_image(image)
restored = sd.decode(latents)[0]

ratio = image.size / latents.size
print(f"{image.size:,} numbers as pixels, {latents.size:,} as latents: {ratio:.0f} times fewer")
quality = peak_signal_to_noise_ratio(image[None], restored[None])
print(f"standard deviation of the latents {latents.std():.2f}; what comes back is at {quality:.1f} dB")
show([[image, restored]], ["image", "encoded, decoded"])

# %% [markdown]
# (The last figure is the peak signal-to-noise ratio: each 6 dB more halve the error.)
#
# Latents can be looked at: each channel is a small grey image. They are not compressed as a ZIP file is.
# The lion's outline is still where it was, only coarser, and a latent position stands for a square of
# pixels.

# %%
channels = np.moveaxis(latents[0], -1, 0)
per_row = min(8, len(channels))
rows = [channels[start : start + per_row] for start in range(0, len(channels), per_row)]
labels = [f"{start} to {start + per_row - 1}" for start in range(0, len(channels), per_row)]
show(rows, [""] * per_row, [f"channels\n{label}" for label in labels], cmap="gray", vmin=-2.5, vmax=2.5)

# %% [markdown]
# What happens to the image if the latents are moved a little, by noise? Small changes of the latents are
# small changes of the image. This smoothness is what the diffusion model relies on, since its answers are
# never exact.

# %%
noise = NoiseStreams([SEED]).draw(latent_shape)
amounts = [0, 0.1, 0.25, 0.5, 1, 2]
moved = [sd.decode(latents + amount * noise)[0] for amount in amounts]
show([moved], ["as encoded", *[f"+ {amount:g} noise" for amount in amounts[1:]]])

# %% [markdown]
# ### What a VAE is, and what it is not
#
# The autoencoder is called *variational* (VAE, Kingma and Welling, 2014). Its encoder does not answer with
# one array but with two: the mean and the standard deviation of a normal distribution over latents. In
# training the latents are drawn from it, and a penalty, the Kullback-Leibler (KL) divergence, keeps it from
# drifting far away from a standard normal distribution.
#
# In a textbook VAE that penalty is strong enough to generate with: draw standard-normal latents, decode
# them, and a new image comes out. In Stable Diffusion it is very weak. The standard deviations are small,
# so that the latents determine the image almost exactly, and the decoder can reproduce it.
#
# So what is it for? It makes the latents *small*, so that each step of the UNet is cheap, and *smooth*, so
# that small errors of the UNet stay small in the image. It is often said that the VAE prevents overfitting;
# it does not. Overfitting is a matter of the UNet and its training images, and is seen by a validation loss
# (`11_your_own_photographs`).

# %%
posterior = sd.vae.encode(images_to_unit(image[None]))
mean = ops.convert_to_numpy(posterior.mean)
standard_deviation = np.exp(0.5 * ops.convert_to_numpy(posterior.log_variance))
around = np.median(standard_deviation)
print(f"means spread by {mean.std():.3f}, the median standard deviation around them is {around:.4f}")
print(f"KL divergence: {float(posterior.kl_divergence()[0]) / mean.size:.2f} nats for each latent number")

# %% [markdown]
# So this autoencoder is *no* random image generator. Draws around the encoding of the lion are all the
# same lion, as the upper row shows. Draws from the standard normal distribution, in the lower row, decode
# to nothing. That is why there has to be a diffusion model: to find, among all latents, those that are
# images.

# %%
scale = sd.vae.config.scaling_factor
noises = NoiseStreams(range(5)).draw(latent_shape)
around = sd.decode(scale * ops.convert_to_numpy(posterior.sample(noises)))
anywhere = sd.decode(noises)
show([around, anywhere], [f"draw {index + 1}" for index in range(5)], ["around the lion", "standard normal"])

# %% [markdown]
# ## The UNet: denoising, step by step
#
# The UNet was trained to answer one question. Given latents with noise in them, and the timestep, which
# says how much noise: what are the latents, and what is the noise?
#
# The *forward process* that makes its exercises is simple. `signal_rate` and `noise_rate` are known for
# each timestep, and their squares add to one.

# %%
schedule = NoiseSchedule(sd.scheduler_config)
timesteps = [0, 200, 400, 600, 800, 999]
noisy = [add_noise(latents, noise, schedule.signal_rates[t], schedule.noise_rates[t]) for t in timesteps]
show([[sd.decode(each)[0] for each in noisy]], [f"timestep {t}" for t in timesteps])

# %% [markdown]
# Generating goes the other way, from noise alone. Asked about pure noise, the UNet cannot know which
# image is in it, as there is none. Its answer is an average of all images that the prompt might
# mean. The sampler takes one step of a few dozen towards that answer and asks again. With each step there
# is more to go by, and the answers get sharper.
#
# In the images below, the upper row is the state, the lower one the answer. Guidance, which is explained
# below, exaggerates the first answers.
#
# This is the whole of DDIM sampling (Song et al., 2021), written with the functions that the package's
# compiled sampler is made of:

# %%
context, negative = np.split(sd.encode_text([PROMPT, ""]), 2)
state, steps = NoiseStreams([SEED]).draw(latent_shape), ddim_steps(schedule, NUM_INFERENCE_STEPS)
states, answers = [], []
for step in steps:
    states.append(state)
    prediction = guided_prediction(
        sd.unet, state, np.array([step.timestep], "float32"), context, negative, GUIDANCE_SCALE
    )
    sample, remaining = to_sample_and_noise(
        schedule.prediction_type, ops.convert_to_numpy(prediction), state, *np.float32(step.level)
    )
    answers.append(sample)
    state = add_noise(sample, remaining, *np.float32(step.end))

shown = np.linspace(0, NUM_INFERENCE_STEPS - 1, 6).round().astype(int)
show(
    [[sd.decode(states[index])[0] for index in shown], [sd.decode(answers[index])[0] for index in shown]],
    [f"step {index + 1}" for index in shown],
    ["the state", "the UNet's answer"],
)

# %% [markdown]
# `sd.denoise` does the same with a step that was compiled once:

# %%
compiled = sd.denoise(
    states[0], context, negative, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS
)
print(f"largest difference between both results: {np.abs(compiled - state).max():.0e}")

# %% [markdown]
# ## Conditioning: how the text gets in
#
# It is often said that the text is *concatenated* to the noise. It is not. The UNet's input has just as
# many channels as the latents:

# %%
print(f"latents have {latent_shape[-1]} channels, the UNet takes {sd.unet.config.in_channels}")
print(f"the text comes as a second input of shape {context.shape}")

# %% [markdown]
# The text enters by *cross-attention*, in many layers of the UNet. Every position of a feature map makes a
# *query*; every token of the text makes a *key* and a *value*. A position compares its query with all keys,
# and the softmax of these comparisons says how much of each token's value is added to it. So each position
# chooses, at each step and in each layer, what it reads from the text. (Some models do have further input
# channels, for another purpose: an inpainting model sees the image and the mask there, an upscaler the
# small image.)
#
# These choices can be watched. We record what the attention function computes while the UNet is evaluated,
# and keep the weights wherever there are as many keys as tokens.


# %%
def attention_maps(latents, timestep, context):
    """How much each position attends to each token, averaged over layers and heads: `(h, w, tokens)`."""
    maps, attend = [], attention.scaled_dot_product

    def listen(query, key, value, *rest, **options):
        if key.shape[1] == context.shape[1] and query.shape[1] != key.shape[1]:
            scores = ops.einsum("nqhd,nkhd->nhqk", query, key) * query.shape[-1] ** -0.5
            weights = ops.convert_to_numpy(ops.mean(ops.softmax(scores), axis=(0, 1)))
            side = round(len(weights) ** 0.5)
            maps.append(weights.reshape(side, side, -1))
        return attend(query, key, value, *rest, **options)

    attention.scaled_dot_product = listen
    try:
        sd.unet([latents, np.array([timestep], "float32"), context])
    finally:
        attention.scaled_dot_product = attend
    side = max(len(each) for each in maps)
    enlarged = [each.repeat(side // len(each), axis=0).repeat(side // len(each), axis=1) for each in maps]
    return np.mean(enlarged, axis=0)


tokens = sd.tokenizer.encode([PROMPT])[0]
pieces = [sd.tokenizer.decode([token]) for token in tokens]
middle = range(NUM_INFERENCE_STEPS // 3, NUM_INFERENCE_STEPS)
maps = np.mean([attention_maps(states[i], steps[i].timestep, context) for i in middle], axis=0)
shares = maps.mean(axis=(0, 1))
maps = maps[..., 1 : len(tokens) + 1]
print(f"maps of {maps.shape[0]} x {maps.shape[1]} positions; of all attention {shares[0]:.0%} go to begin,")
words = ", ".join(f"{share:.0%} to {piece!r}" for share, piece in zip(shares[1:], pieces, strict=False))
print(f"{words}, the rest to end and padding")

drawn = sd.decode(state)[0]
figure, axes = plt.subplots(1, len(pieces) + 1, figsize=(min(10, 2 * len(pieces) + 2), 2.4))
axes[0].imshow(drawn)
axes[0].set_title("the image")
for index, (axis, piece) in enumerate(zip(axes[1:], pieces, strict=True)):
    heat = maps[..., index] / maps[..., index].max()
    axis.imshow(drawn.mean(axis=-1), cmap="gray", extent=(0, 1, 0, 1), alpha=0.5)
    axis.imshow(heat, cmap="viridis", extent=(0, 1, 0, 1), alpha=0.6, interpolation="bilinear", vmin=0)
    axis.set_title(piece)
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Bright is where a token is attended to most, each map in its own scale. Do not read too much into these:
# most attention goes to the begin token, which holds nothing, and to the rows from the end on, which have
# seen the whole text; and the bundled model attends on few positions, so the maps are coarse and need not
# trace the things that the words name. In the large models, whose maps are finer, they often do: Hertz et
# al. (2022) edit images by changing them.
#
# Another way to see what the text does is to ask the UNet twice about the same latents, with and without
# the prompt. The difference between the two answers is all that the text contributes.

# %%
shown = [0, NUM_INFERENCE_STEPS // 4, NUM_INFERENCE_STEPS // 2, NUM_INFERENCE_STEPS - 1]
rows = []
for text in (negative, context):
    row = []
    for index in shown:
        step = steps[index]
        prediction = ops.convert_to_numpy(
            sd.unet([states[index], np.array([step.timestep], "float32"), text])
        )
        sample, _ = to_sample_and_noise(
            schedule.prediction_type, prediction, states[index], *np.float32(step.level)
        )
        row.append(sd.decode(sample)[0])
    rows.append(row)
show(rows, [f"step {index + 1}" for index in shown], ["without the text", "with the text"])

# %% [markdown]
# ## Guidance
#
# *Classifier-free guidance* (Ho and Salimans, 2022) makes use of that difference. The UNet is asked both
# ways at every step, and the sampler goes further in the direction of the text than the UNet itself would:
#
# $$\text{prediction} = \text{without} + \text{scale} \cdot (\text{with} - \text{without}).$$
#
# Here *with* and *without* are the UNet's predictions with the prompt and with an empty one.
#
# A scale of 1 is the plain conditional model. More of it follows the prompt more closely and varies less.
# Too much gives harsh colours.

# %%
scales = [1, 2, 5, 10]
rows = []
for seed in (SEED, SEED + 1):
    options = {"num_inference_steps": NUM_INFERENCE_STEPS, "seed": seed, "progress": False}
    rows.append([sd.text_to_image(PROMPT, guidance_scale=scale, **options)[0] for scale in scales])
show(rows, [f"scale {scale}" for scale in scales], [f"seed {SEED}", f"seed {SEED + 1}"])

# %% [markdown]
# ## The decoder
#
# The last part we have used all along. It is called once, at the end. It adds what the latents leave out: a
# latent position becomes a square of pixels, with edges and texture as they usually look. It has never seen
# a text.

# %%
print(f"one latent position of {latent_shape[-1]} numbers becomes {factor} x {factor} pixels")
show([[state[0].mean(axis=-1), drawn]], ["latents (mean)", "decoded"], cmap="gray")

# %% [markdown]
# ## Where to go from here
#
# - `02_ddim_from_scratch` trains a diffusion model from nothing.
# - `03_sampling_methods` compares the ways from noise to image.
# - `04_random_walks` interpolates between prompts and noises.
# - `11_your_own_photographs` fine-tunes on a folder of images.
#
# ## References
#
# - Sennrich et al., *Neural machine translation of rare words with subword units*, arXiv:1508.07909
# - Kingma and Welling, *Auto-encoding variational Bayes*, arXiv:1312.6114
# - Radford et al., *Learning transferable visual models from natural language supervision*,
#   arXiv:2103.00020
# - Ho et al., *Denoising diffusion probabilistic models*, arXiv:2006.11239
# - Song et al., *Denoising diffusion implicit models*, arXiv:2010.02502
# - Rombach et al., *High-resolution image synthesis with latent diffusion models*, arXiv:2112.10752
# - Ho and Salimans, *Classifier-free diffusion guidance*, arXiv:2207.12598
# - Hertz et al., *Prompt-to-prompt image editing with cross attention control*, arXiv:2208.01626
