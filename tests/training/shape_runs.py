"""Training on batches of several shapes: an uninterrupted run, and one that goes on from its checkpoint.

`python -m tests.training.shape_runs FOLDER` writes the trained weights of both as `FOLDER/NAME.npz`, and
prints how often each run has traced its step.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.trainer import Settings, Trainer
from tests import tiny

STEPS = 6
STOPPED = 3
# Two, as compiling takes nearly all of the time.
SHAPES = [(4, 4), (3, 6)]
BUCKETS = np.array([0, 1, 1, 0, 0, 1, 1, 0, 1, 0])


class CountingObjective(DiffusionObjective):
    """Counts how often the step is traced."""

    traces = 0

    def call(self, batch):
        self.traces += 1
        return super().call(batch)


class Latents:
    """Latents of several shapes, as encoded images are."""

    buckets = BUCKETS

    def __len__(self):
        return len(BUCKETS)

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        shape = (*SHAPES[BUCKETS[index]], 4)
        return {
            "latents": generator.standard_normal(shape, dtype="float32"),
            "context": generator.standard_normal((5, 16), dtype="float32"),
        }


def draw(example, generator):
    latents = example["latents"]
    return {
        "samples": latents,
        "noise": generator.standard_normal(latents.shape, dtype="float32"),
        "timesteps": np.int32(generator.integers(1000)),
        "context": example["context"],
    }


def run(folder, name, **options):
    """Does a run; returns how often it has traced its step."""
    settings = Settings(
        output_dir=folder / f"{name} run",
        max_train_steps=STEPS,
        checkpointing_steps=STOPPED,
        train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        **options,
    )
    settings.use_precision()
    unet = tiny.randomize(UNet(tiny.ONE_BLOCK_UNET), 2, 0.2)
    objective = CountingObjective(unet, NoiseSchedule(SchedulerConfig()))
    assert Trainer(objective, settings, {}).run(Latents(), draw)
    weights = {f"{index:03}": np.array(variable) for index, variable in enumerate(unet.trainable_variables)}
    np.savez(folder / f"{name}.npz", **weights)
    return objective.traces


def run_all(folder):
    """Does both runs; returns how often each has traced its step."""
    traces = {"whole": run(folder, "whole")}
    checkpoint = f"checkpoint-{STOPPED}"
    shutil.copytree(folder / "whole run" / checkpoint, folder / "resumed run" / checkpoint)
    traces["resumed"] = run(folder, "resumed", resume_from_checkpoint="latest")
    return traces


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]))))
