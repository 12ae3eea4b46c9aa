# %% [markdown]
# # XLA and speed
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** What compiling costs and brings: on and off, cold and warm, precision, several devices.<br>
# **Accelerator:** None (GPU or TPU for Stable Diffusion)

# %% tags=["parameters"]
# On a GPU or TPU give a hub id or a local folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
PROMPT = "red heart"
NUM_INFERENCE_STEPS = 20
NUM_IMAGES = 4
TURNS = 7  # timed calls of each side
PRECISIONS = ("bfloat16", "float16")  # beside float32
TRAINING_BATCH = 16
DEVICE_STEPS = 8  # training steps on one and on two devices

# %% [markdown]
# **What you will learn**
#
# - What XLA costs at the first call, and what it saves at later ones.
# - Which changes compile anew and which do not.
# - What half precision and several devices bring, and where a device's limits lie.
#
# ## Introduction
#
# XLA takes a whole program, such as one denoising step, and makes machine code of it: operations are fused so
# that large tensors pass through memory once, and buffers are laid out beforehand. The first call pays for it
# twice:
#
# 1. **Tracing.** Python runs through the model once and records its operations.
# 2. **Compiling.** XLA turns them into machine code, for these shapes and no others.
#
# Every later call, a **warm** one, runs the machine code alone.
#
# `keras_sd` compiles by default, and keeps what was compiled for the next process. This notebook measures
# what it costs and what it brings on the machine that it runs on. Figures of a busy machine jump, and ours
# was busy with other work. So the sides are measured alternately, we compare medians, and where the marks
# of two sides overlap, the difference is not certain.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_sd import AdamW, DiffusionObjective, NoiseSchedule, StableDiffusion
from keras_sd.training import architectures

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 11})
notebooks = Path.cwd()
workspace = tempfile.TemporaryDirectory()
os.chdir(workspace.name)  # all that is written goes there, and goes away with the notebook


def take_turns(sides, turns=TURNS):
    """Seconds of each side's calls, one after the other, after one call of each that is not counted."""
    seconds = {name: [] for name in sides}
    for number in range(turns + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(seconds, title):
    """Draws all calls and their medians, and prints the medians' ratios to the first side."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.45 * len(seconds)))
    axis.barh(list(medians), list(medians.values()), color="0.8")
    for row, values in enumerate(seconds.values()):
        axis.plot(values, [row] * len(values), "|", color="tab:blue", markersize=12)
    axis.invert_yaxis()
    axis.set(xlabel="seconds: all calls, and their median", title=title)
    plt.show()
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:24} {median:.3f} s, {median / first:.2f} x the first")


print(f"Keras {keras.__version__} on {keras.backend.backend()}, {os.cpu_count()} cores")

# %% [markdown]
# ## On and off, warm
#
# `jit_compile` is an argument of `StableDiffusion`, as in Keras. Both sides make the same images.

# %%
sampling = {
    "num_images": NUM_IMAGES,
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": 2.0,
    "progress": False,
}
models = {
    "XLA on": StableDiffusion.from_preset(PRESET),
    "XLA off": StableDiffusion.from_preset(PRESET, jit_compile=False),
}
images = {name: sd.text_to_image(PROMPT, **sampling).astype(int) for name, sd in models.items()}
print("largest difference of a pixel, of 255:", np.abs(images["XLA on"] - images["XLA off"]).max())

sides = {name: lambda sd=sd: sd.text_to_image(PROMPT, **sampling) for name, sd in models.items()}
warm = take_turns(sides)
show(warm, f"{NUM_IMAGES} images, {NUM_INFERENCE_STEPS} steps")

# %% [markdown]
# Without XLA, TensorFlow on an x86 processor computes convolutions and matrix multiplications by oneDNN,
# which is optimized for it. XLA gains by fusing what lies between them. A TPU runs nothing that XLA has not
# compiled. Keras' own default (`jit_compile="auto"`) compiles with an accelerator and does not without one,
# so on this processor it would take the slower side.
#
# ## Cold and warm starts
#
# A new process traces again, always. It compiles again only if nobody kept the machine code. `keras_sd`
# keeps it in the folder that `KERAS_SD_CACHE` names (by default under `~/.cache`). Here are the first
# calls of three processes: the first has an empty folder, the second finds what the first one left, the
# third does without XLA.

# %%
FIRST_CALL = """
import sys, time
from keras_sd import StableDiffusion
preset, prompt, images, steps, xla = sys.argv[1:]
sd = StableDiffusion.from_preset(preset, jit_compile=xla == "on")
for _ in range(2):
    start = time.perf_counter()
    sd.text_to_image(prompt, num_images=int(images), num_inference_steps=int(steps), progress=False)
    print(time.perf_counter() - start)
"""


def first_call(xla):
    """Seconds of the first and of the second call in a new process."""
    arguments = [PRESET, PROMPT, str(NUM_IMAGES), str(NUM_INFERENCE_STEPS), xla]
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, *arguments],
        env={**os.environ, "KERAS_SD_CACHE": str(Path("cache").resolve())},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return [float(line) for line in done.stdout.split()]


starts = {"XLA, cold": first_call("on"), "XLA, warm": first_call("on"), "without XLA": first_call("off")}
figure, axis = plt.subplots(figsize=(7, 2))
axis.barh(list(starts), [first for first, _ in starts.values()], color="0.8")
axis.invert_yaxis()
axis.set(xlabel="seconds of the first call")
plt.show()
for name, (first, second) in starts.items():
    print(f"{name:12} first call {first:.1f} s, second {second:.2f} s")

# %% [markdown]
# After how many calls has compiling paid for itself? The longer first call is lost once, and each later call
# wins the difference.

# %%
gain = statistics.median(warm["XLA off"]) - statistics.median(warm["XLA on"])
for name in ("XLA, cold", "XLA, warm"):
    loss = starts[name][0] - starts["without XLA"][0]
    if loss <= 0:
        print(f"{name}: at once")
    else:
        print(f"{name}: " + (f"after {int(loss / gain) + 1} calls" if gain > 0 else "never on this machine"))

# %% [markdown]
# ## Shapes
#
# Machine code is for one set of shapes. Prompts, seeds, guidance, samplers and numbers of steps are
# *inputs* of the compiled step, so that none of them compiles anything. A new size or batch does.
# `StableDiffusion` therefore makes many images in batches of equal size.

# %%
sd = models["XLA on"]
changes = {
    "another prompt": {"prompt": "blue circle"},
    "another sampler": {"prompt": PROMPT, "sampler": "dpmpp_2m"},
    "one image more": {"prompt": PROMPT, "num_images": NUM_IMAGES + 1},
    "the same again": {"prompt": PROMPT, "num_images": NUM_IMAGES + 1},
}
for name, change in changes.items():
    start = time.perf_counter()
    sd.text_to_image(**{**sampling, **change})
    print(f"{name:18} {time.perf_counter() - start:.2f} s")

# %% [markdown]
# ## Precision
#
# Half the digits are half the memory, and on hardware with units for them several times the speed: T4 and
# later have them for float16, A100, H100 and TPUs for bfloat16. A CPU without such units converts back and
# forth, and gets slower. The sums that need digits (normalisation, softmax) stay in float32 everywhere. In
# training the weights do as well: `--mixed-precision bf16` computes with half of their digits.

# %%
precisions = {"float32": models["XLA on"]}
for dtype in PRECISIONS:
    precisions[dtype] = StableDiffusion.from_preset(PRESET, dtype=dtype)
for name, model in precisions.items():
    size = sum(variable.value.dtype.size * int(np.prod(variable.shape)) for variable in model.unet.weights)
    made = model.text_to_image(PROMPT, **sampling).astype(int)
    error = np.abs(made - images["XLA on"]).mean()
    print(f"{name:9} UNet {size / 2**20:6.1f} MiB, mean difference of a pixel {error:.2f} of 255")
sides = {name: lambda sd=sd: sd.text_to_image(PROMPT, **sampling) for name, sd in precisions.items()}
show(take_turns(sides, turns=3), "precisions")

# %% [markdown]
# ## A training step
#
# An objective is a `keras.Model`, and `compile(jit_compile=...)` is Keras' own. `train_on_batch` is one
# step: the loss, its gradients, AdamW.


# %%
def training(jit_compile):
    """A function that trains the UNet for one step on a fixed batch."""
    sd = StableDiffusion.from_preset(PRESET)
    objective = DiffusionObjective(sd.unet, NoiseSchedule(sd.scheduler_config))
    objective.compile(optimizer=AdamW(1e-4, weight_decay=0.01), jit_compile=jit_compile)
    generator = np.random.default_rng(0)
    shape = (TRAINING_BATCH, *sd.latent_shape())
    batch = {
        "samples": generator.standard_normal(shape, dtype="float32"),
        "noise": generator.standard_normal(shape, dtype="float32"),
        "timesteps": generator.integers(0, 1000, TRAINING_BATCH).astype("int32"),
        "context": sd.encode_text([PROMPT]).repeat(TRAINING_BATCH, axis=0),
    }
    return lambda: objective.train_on_batch(batch)


sides = {"XLA on": training(True), "XLA off": training(False)}
for name, step in sides.items():
    start = time.perf_counter()
    loss = step()
    print(f"{name:8} first step {time.perf_counter() - start:5.1f} s, loss {float(loss):.4f}")
show(take_turns(sides), f"training step, batch of {TRAINING_BATCH}")

# %% [markdown]
# ## Several devices
#
# Under JAX, `--distribution data` gives each device a part of every batch, and XLA adds what makes the
# gradients meet. It can be tried on one processor, which XLA then takes for two devices. The
# losses of one and of two are the same, up to rounding, since it is the same sum in another order. A small
# model of pixels shows it soonest. The flag is the same for every kind of training; several hosts add
# `--coordinator`. `12_several_devices` has all kinds of distribution.

# %%
levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
small = dataclasses.replace(architectures.PIXEL_UNET, sample_size=32, block_out_channels=(16, 32), **levels)
Path("unet.json").write_text(json.dumps(small.to_dict()), encoding="utf-8")


def losses(name, *options, devices=1):
    """The losses of a short training run on JAX."""
    command = [sys.executable, "-m", "keras_sd.train", "ddim", "--output-dir", name]
    command += ["--unet-config", "unet.json", "--max-train-steps", str(DEVICE_STEPS)]
    command += ["--train-batch-size", "16", "--lr-warmup-steps", "1"]
    command += ["--kid-images", "0", "--num-inference-steps", "1", *options]
    # Quick to compile; the numbers are those of float32 all the same.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    done = subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    lines = (Path(name) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


one = losses("one")
two = losses("two", "--distribution", "data", devices=2)
print("one device ", *(f"{loss:.6f}" for loss in one))
print("two devices", *(f"{loss:.6f}" for loss in two))
np.testing.assert_allclose(one, two, rtol=1e-4)

# %% [markdown]
# ## What to expect on T4, A100, H100 and TPU
#
# This notebook ran on a processor, so it has no figure of them and does not guess one; what was measured
# stands in [docs/results.md](../docs/results.md). What can be said here is where the limits lie. A UNet
# evaluation cannot be faster than its multiplications at the device's peak, nor than reading its weights
# once from memory. The multiplications are those that `make bench` counted for Stable Diffusion 1.5 at 256
# pixels; an image takes two evaluations a step with guidance. The peaks are those that the makers publish
# for dense matrix multiplications in half precision.

# %%
results = json.loads((notebooks.parent / "benchmarks" / "peers.json").read_text())["results"]
unet = next(result for result in results if result["case"] == "unet")
operations = 2 * unet["sides"][0]["warm"]["multiplications"]
weight_bytes = 2 * 860e6  # parameters in half precision
devices = {  # peak operations and bytes a second
    "T4": (65e12, 320e9),
    "A100 40 GB": (312e12, 1555e9),
    "H100 SXM": (989e12, 3350e9),
    "TPU v5e": (197e12, 819e9),
}
print(f"{operations / 1e9:.0f} GFLOP an evaluation of one image of 256 pixels")
for name, (peak, bandwidth) in devices.items():
    arithmetic, memory = 1e3 * operations / peak, 1e3 * weight_bytes / bandwidth
    print(f"{name:11} at least {arithmetic:5.2f} ms to compute, {memory:5.2f} ms to read the weights")

# %% [markdown]
# For one small image the weights take longer to read than the arithmetic takes: a large device is idle,
# and batches are nearly free. That is the first thing to try on one; bfloat16 is the second. Real
# programs reach a part of the peak, and how large a part on your machine is what `make bench` tells:
#
# ```bash
# make bench ARGS="--models sd15 --precisions float32,bfloat16"    # XLA on and off, TensorFlow and JAX
# make bench-peers                                                 # beside diffusers, OpenVINO, KerasCV
# ```
#
# ## Conclusion
#
# - The first call pays for tracing and compiling; a second process only for tracing. The first training step
#   is long without XLA as well, since TensorFlow traces it either way.
# - Keep shapes the same, and nothing compiles again.
# - On this CPU XLA takes about a quarter off a call that oneDNN makes alone. Some twenty calls pay for
#   compiling, and five where an earlier process has left its programs.
# - Half precision is for hardware that has it.
# - Under JAX one flag takes training to several devices, with the same losses.
