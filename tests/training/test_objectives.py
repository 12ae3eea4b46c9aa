"""An objective is traced as often as its step is compiled: once."""

import pytest

from tests.programs import run_python

TRACED = """
import numpy as np
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.optimizers import AdamW
from tests import tiny

objective = DiffusionObjective(UNet(tiny.ONE_LEVEL_PIXEL_UNET), NoiseSchedule(SchedulerConfig()))
optimizer = AdamW(1e-3)
optimizer.build(objective.trainable_variables)
objective.compile(optimizer=optimizer)
traced, predict = [], objective._predict
objective._predict = lambda *arguments: traced.append(1) or predict(*arguments)
samples = np.zeros((2, 8, 8, 3), "float32")
batch = {"samples": samples, "noise": samples + 1, "timesteps": np.array([1, 900], "int32")}
for _ in range(2):
    objective.fit(((batch,) for _ in range(2)), steps_per_epoch=2, verbose=0)
print(len(traced))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_an_objective_is_traced_once(backend):
    assert run_python(["-c", TRACED], backend).splitlines()[-1] == "1"
