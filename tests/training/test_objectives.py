"""An objective is traced as often as its step is compiled: once; and a mask weights its errors."""

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


MASKED = """
import numpy as np
from keras import ops
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from tests import tiny

unet = tiny.randomize(UNet(tiny.ONE_LEVEL_PIXEL_UNET), 1, 0.2)
schedule = NoiseSchedule(SchedulerConfig())
objective = DiffusionObjective(unet, schedule)
generator = np.random.default_rng(0)
samples, noise = (generator.standard_normal((2, 8, 8, 3), dtype="float32") for _ in range(2))
batch = {"samples": samples, "noise": noise, "timesteps": np.array([1, 900], "int32")}
rates = [table[[1, 900]].reshape(2, 1, 1, 1) for table in (schedule.signal_rates, schedule.noise_rates)]
noisy = (rates[0] * samples + rates[1] * noise).astype("float32")
errors = np.square(ops.convert_to_numpy(unet([noisy, batch["timesteps"]])) - noise)
mask = generator.random((2, 8, 8, 1), dtype="float32")
for one, weights in ((batch, 1), (batch | {"mask": mask}, mask)):
    expected = np.mean(weights * errors, axis=(1, 2, 3))
    np.testing.assert_allclose(ops.convert_to_numpy(objective(one)), expected, rtol=1e-5)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_mask_weights_the_errors(backend):
    run_python(["-c", MASKED], backend)
