"""What a training run will need in memory, told before it begins, and which options bring it down.

The activations that a step keeps for its backward pass are counted block by block from the shapes, without
tracing anything. How many tensors a block keeps was measured on XLA's programs, as the slope of
`jax.jit(...).lower(...).compile().memory_analysis().temp_size_in_bytes` over stacks of two and of four blocks
in float32; in half precision those of normalisations and scores count as float32. Against whole programs of
the emoji models estimates are within 15 %: a step of the emoji UNet at batch 64 takes 433 MiB where 432 are
estimated, with gradient checkpointing 247 and 213.
"""

import dataclasses
import math
import sys
import warnings

import keras
import numpy as np

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.recomputation import recomputing_layers
from keras_sd.training.losses import AutoencoderObjective, ContrastiveObjective

ERROR = 0.3  # how far off an estimate may be
FLOAT32 = 4  # bytes
# Attention keeps its scores and their softmax, in float32 in every precision.
BYTES_PER_SCORE = 3.25 * FLOAT32


@dataclasses.dataclass(frozen=True)
class Block:
    """Bytes that a block keeps for the backward pass: all that it makes inside, and its input alone."""

    inside: float
    input: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes that a run takes on its device, by what takes them."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    encodings: int

    @property
    def total(self):
        return sum(dataclasses.astuple(self))

    @property
    def still_to_come(self):
        """What is not there yet before the first step."""
        return self.gradients + self.activations

    def __str__(self):
        parts = {name: size for name, size in dataclasses.asdict(self).items() if size}
        return f"about {_size(self.total)} ({', '.join(f'{name} {_size(parts[name])}' for name in parts)})"


def estimate(objective, settings, shapes=None, *, encodings=0, device_is_host=True):
    """Estimates what a run takes on its device.

    Args:
        objective: the `training.losses.Objective`.
        settings: the `trainer.Settings`, whose precision, batch size and flags count as they stand there.
        shapes: name -> shape of each array of one example, without the axis of the batch; None leaves the
            activations out.
        encodings: bytes of cached latents and text encodings, which are in host memory.
        device_is_host: whether the device computes in host memory, so that moving there saves nothing.

    Returns:
        `Estimate`.
    """
    weights = sum(_bytes(variable) for variable in objective.weights)
    trained = sum(_bytes(variable) for variable in objective.trainable_variables)
    accumulates = settings.gradient_accumulation_steps > 1
    activations = 0
    if shapes is not None:
        activations = _kept(_blocks(objective, settings, shapes), settings.gradient_checkpointing)
        if settings.mixed_precision != "no":
            activations += weights // 2  # the weights in half precision
    return Estimate(
        weights=weights,
        gradients=trained,
        optimizer=(3 if accumulates else 2) * trained,  # two moments, and the sum of the gradients
        ema=0 if settings.offload_ema and not device_is_host else trained,
        activations=int(activations),
        encodings=encodings if device_is_host else 0,
    )


def cached_bytes(source):
    """Bytes of the arrays that a source of examples holds as attributes, like `encodings.EncodedSource`."""
    held = getattr(source, "__dict__", {})
    return sum(value.nbytes for value in held.values() if isinstance(value, np.ndarray))


def check(objective, settings, shapes=None, *, encodings=0):
    """Compares a run's need with the memory that is free; called before the optimizer's variables are made
    (without shapes) and before the first step, when it tells the need in one line.

    Raises:
        UserError: it surely is too much.
    """
    free, device_is_host = backend.free_memory()

    def estimated(**changes):
        changed = dataclasses.replace(settings, **changes)
        return estimate(objective, changed, shapes, encodings=encodings, device_is_host=device_is_host)

    need = estimated()
    missing = need.total - need.weights if shapes is None else need.still_to_come
    room = free + need.total - missing
    line = f"memory: {need} of {_size(room)}"
    if missing <= free:
        if shapes is not None:
            print(line, file=sys.stderr, flush=True)
        return
    if (1 - ERROR) * missing > free:
        raise UserError(f"{line}: too much; {_advice(objective, settings, estimated)}")
    warnings.warn(f"{line}: may be too much; {_advice(objective, settings, estimated)}", stacklevel=2)


def _advice(objective, settings, estimated):
    """Which flags bring the need down, by how much; `estimated(**changes)` is that with changed settings."""
    need = estimated().total
    savings = [
        (need - estimated(**changes).total, flags) for flags, changes in _remedies(objective, settings)
    ]
    offers = [f"{flags} ({_size(saved)} less)" for saved, flags in sorted(savings, reverse=True) if saved > 0]
    return f"take {', '.join(offers)}" if offers else "take a smaller model"


def _remedies(objective, settings):
    """The flags that may save memory, with the settings that they change."""
    if not settings.gradient_checkpointing and recomputing_layers(objective):
        yield "--gradient-checkpointing", {"gradient_checkpointing": True}
    if settings.train_batch_size % 2 == 0:
        batch, batches = settings.train_batch_size // 2, 2 * settings.gradient_accumulation_steps
        yield (
            f"--gradient-accumulation-steps {batches} --train-batch-size {batch}",
            {"gradient_accumulation_steps": batches, "train_batch_size": batch},
        )
    if settings.mixed_precision == "no":
        yield "--mixed-precision bf16", {"mixed_precision": "bf16"}
    if not settings.offload_ema:
        yield "--offload-ema", {"offload_ema": True}


def _kept(blocks, recomputes):
    """Bytes at the peak of the backward pass, which holds what one block makes inside once more."""
    largest = max(block.inside for block in blocks)
    return sum(block.input if recomputes else block.inside for block in blocks) + largest


def _blocks(objective, settings, shapes):
    """The blocks of all networks of an objective."""
    count = settings.train_batch_size
    size = FLOAT32 if settings.mixed_precision == "no" else FLOAT32 // 2
    if isinstance(objective, AutoencoderObjective):
        return _vae_blocks(objective.vae, count, shapes["images"], size)
    tokens = _tokens(shapes)
    if isinstance(objective, ContrastiveObjective):
        config = objective.image_encoder.config
        patches = (config.image_size // config.patch_size) ** 2
        return [
            *_transformer_blocks(objective.text_encoder, count, tokens, size),
            *_transformer_blocks(objective.image_encoder, count, patches + 1, size),
        ]
    samples = shapes["samples"]
    # Prior preservation has pairs of examples.
    count, samples = count * math.prod(samples[:-3]), samples[-3:]
    blocks = _unet_blocks(objective.unet, count, samples, tokens, size)
    if objective.text_encoder is not None and objective.text_encoder.trainable_variables:
        blocks += _transformer_blocks(objective.text_encoder, count, tokens, size)
    return blocks


def _tokens(shapes):
    if "token_ids" in shapes:
        return shapes["token_ids"][-1]
    return shapes["context"][-2] if "context" in shapes else 0


def _unet_blocks(unet, count, samples, tokens, size):
    height, width = samples[:2]
    levels = [(-(-height // 2**level), -(-width // 2**level)) for level in range(len(unet.down_blocks))]
    blocks = []
    for block, (height, width) in [
        *zip(unet.down_blocks, levels, strict=True),
        (unet.mid_block, levels[-1]),
        *zip(unet.up_blocks, reversed(levels), strict=True),
    ]:
        blocks += [_residual(resnet, count * height * width, size) for resnet in block.resnets]
        blocks += [
            _spatial_transformer(attention, count, height * width, tokens, size)
            for attention in block.attentions
        ]
    return blocks


def _vae_blocks(vae, count, images, size):
    height, width = images[-3:-1]
    blocks = []
    sides = [1 / 2**level for level in range(len(vae.encoder.down_blocks))]
    for block, side in [
        *zip(vae.encoder.down_blocks, sides, strict=True),
        (vae.encoder.mid_block, sides[-1]),
        (vae.decoder.mid_block, sides[-1]),
        *zip(vae.decoder.up_blocks, reversed(sides), strict=True),
    ]:
        positions = height * width * side**2
        blocks += [_residual(resnet, count * positions, size) for resnet in block.resnets]
        for attention in getattr(block, "attentions", []):
            inside = count * positions * attention.channels * (FLOAT32 + 9 * size)
            inside += _scores(count, 1, positions, positions)
            blocks.append(Block(inside, count * positions * attention.channels * size))
    return blocks


def _transformer_blocks(encoder, count, tokens, size):
    """The blocks of a CLIP encoder; each keeps 23 tensors of its width, and the scores."""
    config = encoder.config
    elements = count * tokens * config.hidden_size
    inside = elements * (6 * FLOAT32 + 17 * size)
    inside += _scores(count, config.num_attention_heads, tokens, tokens)
    return [Block(inside, elements * size)] * config.num_hidden_layers


def _residual(resnet, positions, size):
    """Each normalisation and activation before a convolution keeps four tensors, one of them in float32."""
    inputs, outputs = resnet.conv1.kernel.shape[2:]
    return Block(positions * (inputs + outputs) * (FLOAT32 + 3 * size), positions * outputs * size)


def _spatial_transformer(transformer, count, positions, tokens, size):
    """45 tensors of the block's channels, half of them in the feed-forward network, and the scores."""
    elements = count * positions * transformer.channels
    block = transformer.transformer_blocks[0]
    heads = block.attn1.heads
    keys = tokens if block.only_cross_attention else positions
    inside = elements * (8 * FLOAT32 + 37 * size)
    inside += _scores(count, heads, positions, keys) + _scores(count, heads, positions, tokens)
    return Block(inside, elements * size)


def _scores(count, heads, queries, keys):
    return BYTES_PER_SCORE * count * heads * queries * keys


def _bytes(variable):
    dtype = keras.backend.standardize_dtype(variable.dtype)
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    return math.prod(variable.shape) * size


def _size(count):
    """Bytes as a person reads them."""
    gibibytes = count / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{count / 2**20:.0f} MiB"
