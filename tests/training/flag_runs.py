"""Three steps of training under the flags that change the step and not its numbers.

`python -m tests.training.flag_runs FOLDER` writes the trained weights and the averages of each of `RUNS` as
`FOLDER/NAME.npz`.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import keras
import numpy as np

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.training.lora import add_lora
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.trainer import Settings, Trainer
from tests import tiny

STEPS = 3
RECOMPUTED = {"gradient_checkpointing": True}
ACCUMULATED = {"gradient_accumulation_steps": 2, "train_batch_size": 4}
# Full fine-tuning, or the low-rank updates alone.
RUNS = {
    "full": {},
    "full, recomputed, accumulated, offloaded": RECOMPUTED | ACCUMULATED | {"offload_ema": True},
    "full, without XLA": {"jit_compile": False},
    "LoRA": {},
    "LoRA, recomputed, accumulated": RECOMPUTED | ACCUMULATED,
    "LoRA, bf16": {"mixed_precision": "bf16"},
    "LoRA, bf16, recomputed": {"mixed_precision": "bf16"} | RECOMPUTED,
}


def make_objective(low_rank):
    tokens = tiny.tokenizer()
    text_config = dataclasses.replace(tiny.text_encoder_config(tokens), num_hidden_layers=1)
    # Whatever gets no gradient would move by the sign of a rounding error: weights are far from their start.
    text_encoder = tiny.randomize(TextEncoder(text_config), 1, 0.3)
    unet = tiny.randomize(UNet(tiny.ONE_BLOCK_UNET), 2, 0.2)
    if low_rank:
        keras.utils.set_random_seed(3)
        add_lora(unet, 2, 2)
        add_lora(text_encoder, 2, 2)
    return DiffusionObjective(unet, NoiseSchedule(SchedulerConfig()), text_encoder=text_encoder)


def examples():
    generator, tokens = np.random.default_rng(5), tiny.tokenizer()
    return [
        {"latents": generator.standard_normal((4, 4, 4), dtype="float32"), "token_ids": tokens([text])[0]}
        for text in itertools.islice(itertools.cycle(tiny.TEXTS), 24)
    ]


def draw(example, generator):
    return {
        "samples": example["latents"],
        "noise": generator.standard_normal((4, 4, 4), dtype="float32"),
        "timesteps": np.int32(generator.integers(1000)),
        "token_ids": example["token_ids"],
    }


def run(folder, name):
    """Does one of `RUNS`; returns what it has trained, as the file holds it."""
    options = {"train_batch_size": 8, **RUNS[name]}
    settings = Settings(
        output_dir=folder / f"{name} run",
        max_train_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        **options,
    )
    settings.use_precision()
    objective = make_objective(low_rank=name.startswith("LoRA"))
    trained = {id(variable) for variable in objective.trainable_variables}
    parameters = [parameter for parameter in parameter_paths(objective) if id(parameter.variable) in trained]
    assert len(parameters) == len(trained)

    def arrays(group):
        return {f"{group}/{parameter.name}": np.array(parameter.variable) for parameter in parameters}

    start = arrays("start")
    trainer = Trainer(objective, settings, {})
    assert trainer.run(examples(), draw)
    found = start | arrays("weights")
    with trainer.ema.applied():
        found |= arrays("ema")
    np.savez(folder / f"{name}.npz", **found)


if __name__ == "__main__":
    for name in RUNS:
        run(Path(sys.argv[1]), name)
