"""Learning-rate schedules against diffusers' in torch, on both backends."""

import json

import keras
import numpy as np
import pytest

from keras_sd.cli.train.options import LR_SCHEDULERS
from keras_sd.errors import UserError
from keras_sd.training.learning_rate import SCHEDULES, LearningRate
from keras_sd.training.settings import Settings
from tests.programs import run_python
from tests.reference import run_reference

PEAK, STEPS = 1e-3, 40
OPTIONS = {"cosine_with_restarts": {"num_cycles": 3}, "polynomial": {"power": 2.0}}
CASES = [
    (schedule, warmup, options)
    for schedule in SCHEDULES
    for warmup in (0, 7)
    for options in ({}, OPTIONS.get(schedule))
    if options is not None
]

DIFFUSERS = """
    import json

    from diffusers import optimization

    rates = []
    for schedule, warmup, options in json.loads((folder / "cases.json").read_text()):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
        if schedule == "constant":  # which leaves the warm-up out there
            schedule = "constant_with_warmup"
        if schedule == "polynomial":  # which ends at 1e-7 there
            scheduler = optimization.get_polynomial_decay_schedule_with_warmup(
                optimizer, warmup, 40, lr_end=0.0, **options
            )
        else:
            scheduler = optimization.get_scheduler(
                schedule, optimizer, num_warmup_steps=warmup, num_training_steps=40, **options
            )
        for _ in range(41):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    outputs["rates"] = torch.tensor(rates)
"""


def rates():
    """Return the learning rates of all cases at steps 0 to 40, float32 `(cases, 41)`."""
    return np.stack(
        [
            [float(LearningRate(PEAK, schedule, STEPS, warmup, **options)(step)) for step in range(STEPS + 1)]
            for schedule, warmup, options in CASES
        ]
    )


def test_rates_are_those_of_diffusers(tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    expected = run_reference(DIFFUSERS, {}, tmp_path)["rates"].reshape(len(CASES), -1)
    np.testing.assert_allclose(rates(), expected, atol=1e-4 * PEAK)


def test_the_same_on_the_other_backend(tmp_path):
    assert keras.backend.backend() == "tensorflow"
    program = "import numpy, sys; from tests.training import test_learning_rate as here; "
    program += "numpy.save(sys.argv[1], here.rates())"
    run_python(["-c", program, tmp_path / "rates.npy"])
    np.testing.assert_allclose(np.load(tmp_path / "rates.npy"), rates(), atol=1e-6 * PEAK)


def test_a_schedule_is_made_again_from_its_config():
    schedule = LearningRate(PEAK, "polynomial", STEPS, 5, power=2.0)
    again = LearningRate.from_config(json.loads(json.dumps(schedule.get_config())))
    assert [float(again(step)) for step in range(STEPS)] == [float(schedule(step)) for step in range(STEPS)]


def test_commands_offer_all_schedules():
    assert list(SCHEDULES) == LR_SCHEDULERS


@pytest.mark.parametrize(
    "values, line",
    [
        ({"lr_scheduler": "step"}, "lr_scheduler 'step': unknown; use constant, "),
        ({"lr_power": 2.0}, "lr_power 2: has no effect with `lr_scheduler='cosine'`; leave it out, or "),
        ({"lr_num_cycles": 2, "lr_scheduler": "linear"}, "lr_num_cycles 2: has no effect with "),
        ({"lr_num_cycles": 0, "lr_scheduler": "cosine_with_restarts"}, "lr_num_cycles 0: out of range"),
        (
            {"lr_num_cycles": 11, "lr_scheduler": "cosine_with_restarts", "max_train_steps": 10},
            "lr_num_cycles 11: more than the 10 steps of the run; give fewer",
        ),
        ({"lr_power": float("inf"), "lr_scheduler": "polynomial"}, "lr_power inf: out of range"),
    ],
)
def test_values_without_effect_are_refused(tmp_path, values, line):
    with pytest.raises(UserError) as error:
        Settings(tmp_path, **values)
    assert str(error.value).startswith(line)
