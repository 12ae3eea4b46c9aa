"""Compiles a training step for TPUs that are not there, and tells what it takes of each one's memory.

`pip install libtpu` brings the compiler; one process at a time can use it. A step of Stable Diffusion 1.5
takes ten minutes on two cores. The model is traced without values, so it takes little memory here.
"""

import json
import os
import sys
import time
from pathlib import Path

# Of which machine this is one worker, libtpu would otherwise ask the network.
os.environ.update(
    KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost"
)
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # libtpu only warns without one

import click
import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_sd import (
    AdamW,
    DiffusionObjective,
    NoiseSchedule,
    SchedulerConfig,
    UNet,
    UserError,
    add_lora,
    backend,
    config,
)
from keras_sd.cli.program import run_command
from keras_sd.data.emoji import architecture
from keras_sd.models.gradient_checkpointing import enable_gradient_checkpointing
from keras_sd.training.settings import PRECISIONS
from machine import description

MODELS = {"sd15": config.UNetConfig(), "emoji": architecture.EMOJI_UNET}
TOKENS = 77
COLUMNS = "model", "trained", "precision", "TPU", "chips", "images a chip"
FIGURES = "arguments", "temporaries", "TFLOP", "compiled in"


def make_objective(model, lora, gradient_checkpointing, optimizer):
    """Return the objective with its optimizer, as `train` has them."""
    unet = UNet(MODELS[model])
    if lora:
        add_lora(unet, lora, lora)
    if gradient_checkpointing:
        enable_gradient_checkpointing(unet)
    objective = DiffusionObjective(unet, NoiseSchedule(SchedulerConfig()))
    optimizer.build(objective.trainable_variables)
    objective.compile(optimizer=optimizer)
    return objective


def batch_shapes(unet_config, batch):
    """Shapes and dtypes of what the step is given."""
    side, channels = unet_config.sample_size, unet_config.in_channels
    shapes = {"samples": (side, side, channels), "noise": (side, side, channels), "timesteps": ()}
    if unet_config.cross_attention_dim:
        shapes["context"] = (TOKENS, unet_config.cross_attention_dim)
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), "int32" if name == "timesteps" else "float32")
        for name, shape in shapes.items()
    }


def lowered(objective, batch, devices):
    """Return the training step for these devices: each has all weights and its part of the batch."""
    mesh = Mesh(np.array(devices), ("batch",))

    def on_devices(value, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    groups = (
        objective.trainable_variables,
        objective.non_trainable_variables,
        objective.optimizer.variables,
        objective.metrics_variables,
    )
    state = tuple([on_devices(variable) for variable in group] for group in groups)
    data = {name: on_devices(value, "batch") for name, value in batch.items()}
    with backend.compiling_for("tpu"):
        return jax.jit(objective.train_step, donate_argnums=0).lower(state, data)


def measure(model, lora, gradient_checkpointing, batch_size, precision, topology):
    """What the compiled step takes of each chip, as a dictionary; bytes, and operations of the step."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    keras.config.set_dtype_policy(PRECISIONS[precision])
    optimizer = AdamW(1e-4, weight_decay=0.01, global_clipnorm=1.0)
    # Nothing in it has a value: variables that are made inside stay without one.
    with keras.StatelessScope(initialize_variables=False):
        made = []
        jax.eval_shape(lambda: made.append(make_objective(model, lora, gradient_checkpointing, optimizer)))
        program = lowered(made[0], batch_shapes(MODELS[model], batch_size * len(devices)), devices)
    start = time.time()
    compiled = program.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "model": model,
        "lora": lora,
        "gradient_checkpointing": gradient_checkpointing,
        "precision": precision,
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": batch_size,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": cost["flops"],
        "compile_seconds": round(time.time() - start),
    }


def row(found):
    """Return the figures as a row under `COLUMNS` and `FIGURES`; memory and operations are per chip."""
    trained = f"LoRA, rank {found['lora']}" if found["lora"] else "whole UNet"
    cells = (
        found["model"],
        trained + (", recomputed" if found["gradient_checkpointing"] else ""),
        found["precision"],
        found["device"],
        found["devices"],
        found["batch_size"],
        f"{found['argument_bytes'] / 1e9:.2f} GB",
        f"{found['temporary_bytes'] / 1e9:.2f} GB",
        f"{found['operations'] / 1e12:.2f}",
        f"{found['compile_seconds']} s",
    )
    return table_row(cells)


def table_row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="sd15", show_default=True)
@click.option("--lora", type=click.IntRange(1), metavar="RANK", help="Train low-rank updates alone.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute blocks again in the backward pass.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images a chip.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="bf16", show_default=True)
@click.option(
    "--topology", default="v5e:1x1", show_default=True, help="Kind and chips: v5e:2x2 are four v5e."
)
@click.option("--output", type=click.Path(path_type=Path), help="A JSON file to which the figures are added.")
def compile_for_tpu(model, lora, gradient_checkpointing, batch_size, precision, topology, output):
    """Compile a training step for TPUs that are not there; print its memory on each as a row of a table."""
    try:
        found = measure(model, lora, gradient_checkpointing, batch_size, precision, topology)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{topology}: {str(error).splitlines()[0]}") from error
    found |= description(("keras_sd", "keras", "jax", "libtpu")) | {
        "command": " ".join(["python", *sys.argv])
    }
    if output:
        earlier = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
        output.write_text(json.dumps([*earlier, found], indent=1) + "\n", encoding="utf-8")
    header = (*COLUMNS, *FIGURES)
    click.echo("\n".join((table_row(header), table_row(["---"] * len(header)), row(found))))


if __name__ == "__main__":
    run_command(compile_for_tpu, "compile_for_tpu.py")
