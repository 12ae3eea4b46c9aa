# %% [markdown]
# # Train on several devices
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/30<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Data and model parallelism, FSDP and two processes, on eight virtual devices.<br>
# **Accelerator:** None (several GPUs or a TPU for Stable Diffusion)

# %% tags=["parameters"]
# On GPUs or a TPU give a hub id or the absolute path of a folder of Stable Diffusion 1.5 or 2.1 here.
PRESET = "emoji"
VIRTUAL_DEVICES = 8  # 0 takes the GPUs or TPU cores of this machine
NEW_UNET = True  # a small new UNet, quick to compile; False trains that of PRESET
WIDTH = 320  # channels of the new UNet
KINDS = ("data", "model", "fsdp")
TRAIN_BATCH_SIZE = 16  # over all devices
IMAGES = 64
STEPS = 6

# %% [markdown]
# **What you will learn**
#
# - What `--distribution data`, `model` and `fsdp` divide among devices, and what each device then holds.
# - That the losses are those of one device, and how to check it before you rent a machine.
# - To start several processes that train together, and what differs on a TPU pod.
#
# ## Introduction
#
# Training on several devices has two reasons. The batch may be divided, so that a step takes less time. Or
# the model and the state of its optimizer may be divided, because they do not fit one device. Three ways:
#
# | `--distribution` | batch | weights, moments and EMA | use |
# |---|---|---|---|
# | `data` | divided | whole on each device | the model fits: LoRA, Stable Diffusion 1.5 |
# | `model` | divided among processes | large kernels of attention layers divided | rarely |
# | `fsdp` | divided | all divided, gathered where they are used | full fine-tuning of large models |
#
# *Moments* are the running means of the gradients and of their squares, which AdamW keeps for each weight.
# *EMA* is the exponential moving average of the weights, which is exported. FSDP is fully sharded data
# parallelism (Rajbhandari et al., *ZeRO*, arXiv:1910.02054).
#
# Several devices need the JAX backend. XLA can take one processor for several devices: the program is
# divided in the same way, the same messages are sent, and only the speed is not that of eight devices. So
# whether a command works, and what it needs, can be seen on a laptop. All runs here are the real training
# command, each in a process of its own.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11})
workspace = tempfile.TemporaryDirectory()
os.chdir(workspace.name)  # all that is written goes there, and goes away with the notebook

# %% [markdown]
# ## One command for all
#
# The UNet is a small new one of a single level, so that it compiles in seconds. Its latents and captions
# come from the bundled model and emoji. They are encoded once, into the folder `encodings`, which all runs
# read.

# %%
unet = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": [WIDTH],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
}
Path("unet.json").write_text(json.dumps(unet), encoding="utf-8")

train = f"python -m keras_sd.train text-to-image --pretrained-model-name-or-path {shlex.quote(PRESET)}"
train += " --from-scratch --unet-config unet.json" if NEW_UNET else ""
train += f" --dataset-name emoji --max-train-samples {IMAGES} --cache-latents disk --cache-dir encodings"
train += f" --train-batch-size {TRAIN_BATCH_SIZE} --max-train-steps {STEPS} --lr-warmup-steps 1"
train += " --learning-rate 1e-3 --evaluation-steps 0"
print(train)


def start(options, devices):
    """Starts the command on JAX with so many virtual devices."""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    if VIRTUAL_DEVICES:
        flags = f"--xla_force_host_platform_device_count={devices}"
        # Without optimization it compiles sooner; the numbers are those of float32 all the same.
        environment |= {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    arguments = shlex.split(f"{train} {options}")[1:]
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Returns what a command printed, once it has succeeded."""
    lines = process.communicate()[0].replace("\r", "\n").splitlines()
    if process.returncode:
        raise RuntimeError("\n".join(lines[-3:]))
    return lines


def losses(run):
    """The loss of each step of a run."""
    lines = Path("runs", run, "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def memory(lines):
    """GiB on each device of weights, state and batch, and of what a step needs beside them."""
    (line,) = [line for line in lines if line.startswith("memory of the training step")]
    print(line)
    _, held, temporary = map(float, re.findall(r"(\d+\.\d+) (?:GiB|of them|while)", line))
    return held, temporary


# %% [markdown]
# ## One device, and eight
#
# On JAX the training tells before its first step what the compiled step takes on each device, by the
# compiler's own count. It is the line to look at before a long run.

# %%
gibibytes = {"one device": memory(finish(start("--output-dir runs/one", devices=1)))}
for kind in KINDS:
    options = f"--output-dir runs/{kind} --distribution {kind}"
    gibibytes[kind] = memory(finish(start(options, devices=VIRTUAL_DEVICES)))

# %%
figure, axis = plt.subplots(figsize=(7, 0.8 + 0.4 * len(gibibytes)))
held, temporary = np.transpose([*gibibytes.values()])
axis.barh([*gibibytes], held, color="tab:blue", label="weights, state and batch")
axis.barh([*gibibytes], temporary, left=held, color="0.8", label="while a step runs")
axis.invert_yaxis()
axis.set(xlabel="GiB on each device", title="What each device holds")
axis.legend()
plt.show()

# %% [markdown]
# - With `data` each device holds all weights, and activations of its share of the batch. More devices make
#   steps faster, and no model fits that did not fit before.
# - With `model` the kernels of attention and feed-forward layers are divided, which here are a small part.
#   Every device works on the whole batch.
# - With `fsdp` each device holds an eighth of weights, gradients, moments and EMA. What remains are the
#   activations and the weights that are gathered for the layer at work. Weights of fewer than 1,024
#   numbers, and those that do not divide, stay whole.
#
# ## The same losses
#
# Each example brings its own noise and timestep, which depend on the seed and on its position in the run
# only. The devices divide the same batch, and XLA sums their gradients, so all runs must lose the same, up
# to the rounding of sums in another order. If they did not, something would be wrong.

# %%
for run in ("one", *KINDS):
    print(f"{run:6}", *(f"{loss:.6f}" for loss in losses(run)))
    np.testing.assert_allclose(losses(run), losses("one"), rtol=1e-4)

# %% [markdown]
# `--train-batch-size` is the batch of all devices together and must divide among them. With eight devices
# that each had room for the batch of one, give eight times the batch, and a higher learning rate: the
# command does not change it by itself.
#
# Checkpoints are the same with every distribution and number of devices. A run that was begun with `fsdp`
# on eight devices can go on without it on one.
#
# ## Two processes
#
# Several machines (hosts) mean several processes. Each drives the devices of its host, all run the same
# command, and each gives its own `--process-id`. `--coordinator` is the address of process 0, where they
# meet. Here both are on this machine and speak over the loopback interface, with half of the virtual
# devices each.


# %%
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if VIRTUAL_DEVICES:
    options = "--output-dir runs/two --distribution data --num-processes 2"
    options += f" --coordinator 127.0.0.1:{free_port()}"
    pair = [start(f"{options} --process-id {index}", devices=VIRTUAL_DEVICES // 2) for index in range(2)]
    for index, process in enumerate(pair):
        print(f"process {index}:")
        # "Gloo" is the library by which processors exchange gradients; its lines are left out.
        shown = [line for line in finish(process) if line and "Gloo" not in line]
        print(*(f"  {line}" for line in shown if "/s," not in line), sep="\n")
    print("two processes", *(f"{loss:.6f}" for loss in losses("two")))
    np.testing.assert_allclose(losses("two"), losses("one"), rtol=1e-4)

# %% [markdown]
# Process 0 tells the progress and writes the checkpoints, logs and the model. All processes read the images
# and the checkpoint to resume from, so the images, the encodings and the run folder must be on a file
# system that all of them share. `fsdp` divides weights among the devices of one process and is refused with
# several.
#
# ## On GPUs and on a TPU pod
#
# The commands are the same, without `XLA_FLAGS`:
#
# ```bash
# pip install -e '.[jax-cuda,train]'     # or jax-tpu
# export KERAS_BACKEND=jax
# python -m keras_sd.train lora --distribution data --train-batch-size 32 \
#     --pretrained-model-name-or-path sd-1.5 --train-data-dir images --output-dir runs/lora
# python -m keras_sd.train text-to-image --distribution fsdp --train-batch-size 32 \
#     --pretrained-model-name-or-path sd-1.5 --train-data-dir images --output-dir runs/full
# ```
#
# What differs:
#
# - **Speed.** Eight virtual devices share the cores of one processor, so they are slower than one. Real
#   ones compute at the same time, and exchange gradients over NVLink or, on a TPU, over the links between
#   its chips.
# - **Memory.** A GPU or TPU has a limit of its own. The line before the first step warns where the device
#   has less than the step takes. Temporaries differ from those of a processor, as XLA lays out programs for
#   each device anew.
# - **Precision.** GPUs and TPUs with units for bfloat16 train in bfloat16 by default, and the order of sums
#   differs, so losses agree in fewer digits.
# - **Finding each other.** On a TPU pod, under Slurm and under Open MPI the processes find each other, and
#   `--coordinator`, `--num-processes` and `--process-id` are left out. The command must be started on all
#   hosts of a pod; started on one it waits for the others.
# - **A host that fails** ends the run for all. The same command with `--resume-from-checkpoint latest` goes
#   on from the last checkpoint.
#
# The page docs/clusters.md tells of pods and nodes, and [docs/devices.md](../docs/devices.md) of single
# machines.
#
# ## References
#
# - Rajbhandari et al., *ZeRO: Memory optimizations toward training trillion parameter models*,
#   arXiv:1910.02054
# - Shoeybi et al., *Megatron-LM: Training multi-billion parameter language models using model parallelism*,
#   arXiv:1909.08053
