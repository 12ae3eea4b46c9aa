"""Training on several devices and hosts: under JAX, through `keras.distribution`.

With data parallelism every device holds all weights and processes its share of each batch. With model
parallelism the large kernels of attention and feed-forward layers are split over the devices of a process,
and the batch is split over the processes. Fully sharded data parallelism (FSDP, as ZeRO-3, Rajbhandari et
al., 2020) splits both: each device holds its share of the weights, of their moments and averages, and of the
batch, and gathers a weight where it is used. XLA sums the gradients in all cases, so the results are those of
one device, apart from rounding.
"""

import math
import re

import keras

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.training import rendezvous

KINDS = ("auto", "data", "model", "fsdp")
BATCH, MODEL = "batch", "model"
_LEAST_SHARDED = 2**10  # numbers of a weight; to gather fewer costs more than to hold them

# Layers whose outputs are split, and layers that take these outputs as inputs (Shoeybi et al., 2019, section
# 3).
_SPLIT_OUTPUTS = re.compile(r"\.(to_q|to_k|to_v|q_proj|k_proj|v_proj|net\.0\.proj|fc1)\.(weight|bias)$")
_SPLIT_INPUTS = re.compile(r"\.(to_out\.0|out_proj|net\.2|fc2)\.weight$")


def start(kind, batch_size, *, coordinator=None, num_processes=None, process_id=None, timeout=300):
    """Distribute everything that is created from now on over the devices; call it before any use of JAX.

    Args:
        kind: "data", "model", "fsdp", "auto" (data parallelism over all devices) or None for one device.
        batch_size: examples in a batch over all devices.
        coordinator, num_processes, process_id: `HOST:PORT` of process 0, the number of processes and this
            one's index, from 0. Without them JAX detects TPU pods, Slurm and Open MPI.
        timeout: seconds to wait for the other processes.

    Raises:
        UserError: the backend, the devices, the batch size or the processes do not allow it.
    """
    processes = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    plan = backend.plan()
    address = None if plan else rendezvous.check_processes(kind, **processes)
    if kind is None:
        return
    if keras.backend.backend() != "jax":
        raise UserError(
            f"distribution {kind}: several devices need JAX, and the backend is "
            f"{keras.backend.backend()}; set KERAS_BACKEND=jax"
        )
    if plan:
        pass  # the devices are chosen
    elif address:
        for connection in rendezvous.meet(address, num_processes, process_id, timeout).values():
            connection.close()
        backend.join_processes(coordinator, num_processes, process_id)
    else:
        backend.join_processes()
    distribution = _distribution(kind)
    if distribution is None:
        return
    replicas = distribution.num_model_replicas
    if batch_size % replicas:
        raise UserError(
            f"train_batch_size {batch_size}: does not divide among {replicas} replicas of the model; "
            f"give a multiple of {replicas}"
        )
    keras.distribution.set_distribution(distribution)
    if isinstance(distribution, keras.distribution.ModelParallel) and not backend.has_accelerator():
        backend.forget_programs()


def num_replicas():
    """Return among how many replicas of the model a batch is divided; 1 without a distribution."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.num_model_replicas


def work_parts():
    """Return among how many devices a step's work is divided; None where they do not share it equally."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    return None if MODEL in distribution.device_mesh.axis_names else distribution.device_mesh.devices.size


def _distribution(kind):
    """Return the `keras.distribution` over all devices; None for "auto" on one device."""
    plan = backend.plan()
    devices, processes = backend.device_names(), plan.processes if plan else backend.process_count()
    if plan and plan.platform == "tpu":
        remedy = "plan for more chips, or leave it out"
    else:
        remedy = "on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=2, or leave it out"
    if kind == "model":
        own = len(devices) // processes
        if own < 2:
            raise UserError(
                "distribution model: splits weights over the devices of one process, which has only one; "
                f"{remedy}"
            )
        mesh = keras.distribution.DeviceMesh((processes, own), (BATCH, MODEL), devices)
        return keras.distribution.ModelParallel(
            layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name=BATCH, auto_shard_dataset=False
        )
    if kind == "fsdp":
        if len(devices) < 2:
            raise UserError(f"distribution fsdp: one device was found, {devices[0]}; {remedy}")
        # One axis for both: the batch and the weights are split over the same devices.
        mesh = keras.distribution.DeviceMesh((len(devices),), (BATCH,), devices)
        return keras.distribution.ModelParallel(
            layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name=BATCH, auto_shard_dataset=False
        )
    if len(devices) > 1:
        # The data pipeline gives each process its part of a batch.
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    if kind == "data":
        raise UserError(f"distribution data: one device was found, {devices[0]}; {remedy}")
    return None


def split_weights(model):
    """Split the weights of attention and feed-forward layers over the devices, or under FSDP all weights.

    Keras' layout map uses variable paths, which lack the attribute names here, so the weights are selected by
    their published names. Call this before an optimizer is built, as the moments take the layout of their
    weights. Without a distribution, or under data parallelism, nothing is split; low-rank updates and weights
    that do not divide among the devices stay whole under FSDP too.

    Raises:
        UserError: the model has no such layers, or their features cannot be divided by the number of devices.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return
    mesh = distribution.device_mesh
    if MODEL not in mesh.axis_names:
        _shard_all(model, mesh)
        return
    device_count = mesh.shape[mesh.axis_names.index(MODEL)]
    split = []
    for parameter in parameter_paths(model):
        axis = _split_axis(parameter)
        if axis is None:
            continue
        if parameter.variable.shape[axis] % device_count:
            raise UserError(
                f"distribution model: the {parameter.variable.shape[axis]} features of {parameter.name} do "
                f"not divide among {device_count} devices; use another number of devices, or data"
            )
        axes = [None] * len(parameter.variable.shape)
        axes[axis] = MODEL
        split.append((parameter.variable, keras.distribution.TensorLayout(axes, mesh)))
    if not split:
        raise UserError(
            "distribution model: this model has no attention or feed-forward layers to split; use data"
        )
    for variable, layout in split:
        backend.lay_out(variable, layout)


def _shard_all(model, mesh):
    """Split each weight along its longest axis that divides among the devices."""
    device_count = mesh.shape[0]
    for parameter in parameter_paths(model):
        shape = parameter.variable.shape
        axes = [axis for axis, length in enumerate(shape) if length % device_count == 0]
        if not axes or math.prod(shape) < _LEAST_SHARDED:
            continue
        longest = max(axes, key=shape.__getitem__)
        axes = [BATCH if axis == longest else None for axis in range(len(shape))]
        backend.lay_out(parameter.variable, keras.distribution.TensorLayout(axes, mesh))


def _split_axis(parameter):
    """Return the axis along which a weight is split, or None. Kernels are (inputs, outputs)."""
    if _SPLIT_OUTPUTS.search(parameter.name):
        return len(parameter.variable.shape) - 1
    # In a 1x1 convolution, inputs are the last but one axis, too.
    return len(parameter.variable.shape) - 2 if _SPLIT_INPUTS.search(parameter.name) else None
