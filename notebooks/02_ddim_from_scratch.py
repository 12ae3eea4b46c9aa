# %% [markdown]
# # Denoising diffusion implicit models, from scratch
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Train a diffusion model on pixels with `fit()`, and measure it as it learns.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# This notebook trains a model of its own, so there is no PRESET to choose.
WORD = "face"  # only images with this word in their first caption; "" takes all
DATASET = "emoji"  # with a connection also a name of TensorFlow Datasets, such as "oxford_flowers102"
IMAGE_SIZE = 32  # 64 and CHANNELS = (32, 64, 96, 128) on a GPU
CHANNELS = (24, 48, 72)  # of the UNet, one number for each resolution
TRAINING_STEPS = 400  # 50,000 and a batch of 64 on a GPU
BATCH_SIZE = 16
EVALUATIONS = 5
SAMPLES = 64  # images drawn at each evaluation
SAMPLING_STEPS = 10
KID = "kid_emoji"  # or "kid_inception_imagenet" with a connection

# %% [markdown]
# **What you will learn**
#
# - To train a diffusion model on pixels from nothing with `fit()`.
# - What a noise schedule, the predicted velocity and the moving average of the weights (EMA) are.
# - To measure generated images by the Kernel Inception Distance (KID) while the model learns.
#
# ## Introduction
#
# A diffusion model learns one thing: to tell an image from the noise that was mixed into it. A model that
# can do that can also generate. Begin with noise alone, ask the model which image is in it, take away a
# little of the noise, and ask again.
#
# This notebook follows the Keras example [Denoising Diffusion Implicit
# Models](https://keras.io/examples/generative/ddim/) by András Béres: an unconditional model that works on
# pixels, trained from nothing with `fit()`, measured by the Kernel Inception Distance (KID). Its parts come
# from `keras_sd`, and they are the very parts that Stable Diffusion is made of. What Stable Diffusion adds,
# the text and the latents, is told in `01_how_stable_diffusion_works`.
#
# The images are [Twemoji](https://github.com/jdecked/twemoji) (CC-BY 4.0), which come as a Python
# package, so nothing is downloaded.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import dataclasses
import statistics
import time

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_sd import (
    AdamW,
    ClipFeatures,
    Denoiser,
    DiffusionObjective,
    EMACallback,
    InceptionFeatures,
    NoiseSchedule,
    UNet,
    add_noise,
    batches,
    extract,
    image_grid,
    images_from_unit,
    images_to_unit,
    kernel_inception_distance,
    load_part,
    load_source,
    presets,
    sample_images,
)
from keras_sd.training import architectures

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.interpolation": "nearest",
    }
)
keras.utils.set_random_seed(0)


def show(images, titles, width=2.2):
    """Draws images side by side, each under its title."""
    figure, axes = plt.subplots(1, len(images), figsize=(width * len(images), width + 0.4), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title)
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## The images
#
# A source is a sequence of examples. Each is a dictionary with an image and its captions, of which an
# unconditional model needs none.
#
# To keep the run short we take the images of one kind; many kinds take longer to learn.

# %%
everything = load_source(DATASET, "train", IMAGE_SIZE, need_captions=False)
training = [example for example in everything if WORD in " ".join(example["captions"][:1])]
images = np.stack([training[index * len(training) // 48]["image"] for index in range(48)])
print(f"{len(training):,} images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels")
show([image_grid(images, columns=12, scale=2)], ["training images"], width=8)

# %% [markdown]
# ## Signal and noise
#
# The forward process mixes an image $x$ with standard-normal noise $\varepsilon$:
#
# $$x_t = \alpha_t\, x + \sigma_t\, \varepsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1.$$
#
# $t$ is the timestep, from 0 (nearly the image) to 999 (nearly noise), and $x_t$ the mixture. $\alpha_t$ is
# the *signal rate* and $\sigma_t$ the *noise rate*. As their squares add to one, a mixture of unit variance
# keeps unit variance. A *schedule* says how they fall and rise over the timesteps. We use the cosine
# schedule (Nichol and Dhariwal, 2021), which gives every level of noise about its fair share of the
# timesteps.

# %%
schedule = NoiseSchedule(architectures.PIXEL_SCHEDULER)

figure, axis = plt.subplots(figsize=(7, 3))
axis.plot(schedule.signal_rates, label="signal rate")
axis.plot(schedule.noise_rates, "--", label="noise rate")
axis.set(xlabel="timestep", ylabel="rate", title="The cosine schedule")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

image = images_to_unit(images[24])
noise = np.random.default_rng(0).standard_normal(image.shape, dtype="float32")
timesteps = [0, 200, 400, 600, 800, 999]
noisy = [add_noise(image, noise, schedule.signal_rates[t], schedule.noise_rates[t]) for t in timesteps]
show([images_from_unit(each) for each in noisy], [f"timestep {t}" for t in timesteps], width=1.6)

# %% [markdown]
# ## The network and its loss
#
# The network is a UNet: a way down to ever smaller feature maps, a way up again, and shortcuts between the
# two. It is the class that Stable Diffusion uses too. A configuration leaves out the attention, takes three
# channels in, and gives three channels out.
#
# What should the network answer? It may predict the noise, or the image, or the *velocity* $v =
# \alpha_t\,\varepsilon - \sigma_t\,x$ (Salimans and Ho, 2022). Each of the three follows from any other
# together with $x_t$. We take the velocity: it asks for the image where there is only noise, and for the
# noise where there is nearly none, so no timestep is trivial.
#
# `DiffusionObjective` is a Keras model whose output is the loss of each example. That is the one hook
# `fit()` needs.

# %%
levels = len(CHANNELS)
unet_config = dataclasses.replace(
    architectures.PIXEL_UNET,
    sample_size=IMAGE_SIZE,
    block_out_channels=CHANNELS,
    down_block_types=("DownBlock2D",) * levels,
    up_block_types=("UpBlock2D",) * levels,
)
unet = UNet(unet_config)
objective = DiffusionObjective(unet, schedule)
print(f"{unet.count_params():,} parameters")

# %% [markdown]
# ## Examples that carry their own noise
#
# Where is the randomness? Often it sits in the training step. Here it sits in the data: every example
# brings its noise and its timestep, drawn from a generator that depends on the seed and the example's
# position only. The compiled step is then a pure function, and a run can be repeated, or resumed, to the
# bit.


# %%
def draw(example, generator):
    image = example["image"]
    if generator.random() < 0.5:
        image = image[:, ::-1]  # mirrored
    return {
        "samples": image,
        "noise": generator.standard_normal(image.shape, dtype="float32"),
        "timesteps": np.int32(generator.integers(schedule.num_train_timesteps)),
    }


training_batches = batches(training, batch_size=BATCH_SIZE, seed=0, draw=draw)
for name, values in next(iter(training_batches)).items():
    print(f"{name:10} {values.dtype!s:8} {values.shape}")

# %% [markdown]
# ## XLA, on or off
#
# `compile(jit_compile=True)` hands the whole training step to XLA, which fuses many small operations into
# few large ones. The price is the first call, in which it compiles. Whether it pays is a question of the
# machine, so we ask: the same network, the same batches, a few steps each way.


# %%
def time_steps(jit_compile, steps=8):
    """Seconds of the first training step, and the median of the later ones."""
    network = DiffusionObjective(UNet(unet_config), schedule)
    network.compile(optimizer=AdamW(1e-3), jit_compile=jit_compile)
    network.optimizer.build(network.trainable_variables)
    seconds = []
    for _, batch in zip(range(steps), training_batches, strict=False):
        begun = time.perf_counter()
        float(network.train_on_batch(batch))
        seconds.append(time.perf_counter() - begun)
    return seconds[0], statistics.median(seconds[1:])


seconds = {}
for title, jit_compile in (("off", False), ("on", True)):
    first, seconds[title] = time_steps(jit_compile)
    print(f"XLA {title:3}: first step {first:5.1f} s, then {seconds[title]:.3f} s a step")

# %% [markdown]
# We go on with the faster of the two. A GPU or TPU nearly always wants XLA; a CPU with good kernels of its
# own may not. With the JAX backend there is no choice: it always compiles.
#
# ## Training
#
# The optimizer is AdamW (Loshchilov and Hutter, 2019). Beside the weights it keeps an *exponential moving
# average* (EMA) of them. The last weights of a run depend by chance on the last few
# batches; the average is smoother, and after a long run samples made with it are
# usually better. `EMACallback` swaps in the average for the time of a `with` block.

# %%
steps_per_evaluation = max(1, TRAINING_STEPS // EVALUATIONS)
warmup_steps = max(1, TRAINING_STEPS // 10)
learning_rate = keras.optimizers.schedules.CosineDecay(
    0.0, TRAINING_STEPS - warmup_steps, warmup_target=2e-3, warmup_steps=warmup_steps
)
optimizer = AdamW(learning_rate, ema_decay=0.99, weight_decay=0.01, global_clipnorm=1.0)
objective.compile(optimizer=optimizer, jit_compile=seconds["on"] < seconds["off"])
objective.optimizer.build(objective.trainable_variables)
average = EMACallback(optimizer, objective.trainable_variables)

# %% [markdown]
# ## What is measured
#
# The loss says how well noise is told from images. It does not say how good the drawings are. For that
# there is KID (Bińkowski et al., 2018): how far apart two sets of images are, seen through the features
# of a network that knows images. The Keras example looks through InceptionV3. We look through the image
# encoder that comes with the bundled model, since it knows emoji and is here already. Zero is perfect; the
# estimate is unbiased, so it may fall a little below zero.
#
# After every so many steps a callback draws samples from the *same* noise, with the raw weights and with
# the average, and measures both.

# %%
if KID == "kid_inception_imagenet":
    extractor = InceptionFeatures(75)
else:
    extractor = ClipFeatures(load_part(presets.find("emoji"), "image_encoder"))
count = min(512, len(training))
real = np.stack([training[index * len(training) // count]["image"] for index in range(count)])
real_features = extract(extractor, real)
denoiser = Denoiser(unet, schedule)
samples, distances, measured_steps = {"raw": [], "average": []}, {"raw": [], "average": []}, []


def measure(weights):
    """Draws samples with the weights of the moment, from the same noise each time."""
    drawn = sample_images(denoiser, SAMPLES, num_inference_steps=SAMPLING_STEPS, batch_size=SAMPLES)
    distance = kernel_inception_distance(
        real_features, extract(extractor, drawn), num_subsets=50, subset_size=SAMPLES
    )
    samples[weights].append(drawn)
    distances[weights].append(distance.mean)


def evaluate(epoch, logs):
    measured_steps.append((epoch + 1) * steps_per_evaluation)
    measure("raw")
    with average.applied():
        measure("average")


# %% [markdown]
# And now `fit()`. The pipeline is endless, so an epoch is just the stretch between two evaluations.

# %%
begun = time.perf_counter()
history = objective.fit(
    training_batches,
    steps_per_epoch=steps_per_evaluation,
    epochs=EVALUATIONS,
    shuffle=False,  # the pipeline has shuffled
    verbose=0,
    callbacks=[average, keras.callbacks.LambdaCallback(on_epoch_end=evaluate)],
)
minutes = (time.perf_counter() - begun) / 60
print(f"{steps_per_evaluation * EVALUATIONS} steps, with evaluations, in {minutes:.1f} minutes")
for step, loss, raw, averaged in zip(
    measured_steps, history.history["loss"], distances["raw"], distances["average"], strict=True
):
    print(f"step {step:4}: loss {loss:.3f}, KID {raw:6.3f} by raw weights, {averaged:6.3f} by the average")

# %% [markdown]
# ## Samples over training
#
# Each column is drawn from one noise, which stays the same from row to row. The model finds first that the
# ground is white and that the colour is in the middle, then large shapes, and details last.


# %%
def show_progress(weights):
    """One row of samples for each evaluation."""
    figure, axes = plt.subplots(EVALUATIONS, figsize=(9, 1.05 * EVALUATIONS), squeeze=False)
    for axis, drawn, step in zip(axes[:, 0], samples[weights], measured_steps, strict=True):
        axis.imshow(image_grid(drawn[:10], columns=10))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"step {step}", rotation=0, ha="right", va="center")
        axis.spines[:].set_visible(False)
    plt.show()


show_progress("average")

# %% [markdown]
# ## The average against the raw weights
#
# The same noise again, after the last step, with both sets of weights:

# %%
last = np.concatenate([samples[weights][-1][:10] for weights in ("raw", "average")])
figure, axis = plt.subplots(figsize=(9, 2.1))
axis.imshow(image_grid(last, columns=10))
axis.set(xticks=[], yticks=[], title="above: raw weights, below: average")
axis.spines[:].set_visible(False)
plt.show()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(measured_steps, history.history["loss"], "k-o", label="loss")
left.set(xlabel="step", ylabel="loss (mean over the stretch)", title="Loss")
right.plot(measured_steps, distances["raw"], "--o", label="raw weights")
right.plot(measured_steps, distances["average"], "-s", label="average (EMA)")
right.set(xlabel="step", ylabel="KID (lower is better)", title="Kernel Inception Distance")
right.legend()
for axis in (left, right):
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# In a run as short as this one the average is worse to the end: it still contains earlier weights, which were
# worse, and the learning rate, which falls to zero, leaves it little noise to smooth away. It gains in long
# runs, once the weights move more slowly than they scatter. That is why its decay starts small and grows
# (`AdamW` here uses min(decay, (1 + n) / (10 + n)) at update n), and why long runs take one closer to 1.
#
# ## More steps when sampling
#
# How many steps the sampler takes is no matter of training. The same weights and the same noise:

# %%
with average.applied():
    for num_inference_steps in (1, 2, 5, 20):
        drawn = sample_images(denoiser, 10, num_inference_steps=num_inference_steps, batch_size=10)
        show(
            [image_grid(drawn, columns=10)],
            [f"{num_inference_steps} steps" if num_inference_steps > 1 else "1 step"],
            width=8,
        )

# %% [markdown]
# One step gives the mean of what there might be, which is a blur. `03_sampling_methods` has more of this.
#
# ## Going on
#
# A few minutes on a processor show how it works, not how far it gets. The same training as a command, with
# checkpoints, resumption after a crash, logs for TensorBoard and KID at each evaluation:
#
# ```bash
# python -m keras_sd.train ddim --max-train-steps 20000 --output-dir runs/ddim
# python -m keras_sd.train ddim --dataset-name oxford_flowers102 --kid kid_inception
# ```
#
# ## References
#
# - Ho et al., *Denoising diffusion probabilistic models*, arXiv:2006.11239
# - Song et al., *Denoising diffusion implicit models*, arXiv:2010.02502
# - Nichol and Dhariwal, *Improved denoising diffusion probabilistic models*, arXiv:2102.09672
# - Salimans and Ho, *Progressive distillation for fast sampling of diffusion models*, arXiv:2202.00512
# - Bińkowski et al., *Demystifying MMD GANs*, arXiv:1801.01401
# - Loshchilov and Hutter, *Decoupled weight decay regularization*, arXiv:1711.05101
