"""Learning rates of the text encoder and of the UNet's blocks."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.optimizers import make_optimizer
from keras_sd.training.rate_factors import RateFactors, parse_block_factors
from keras_sd.training.settings import Settings
from tests import tiny


def test_entries_are_read():
    text = "down_blocks=0.5, up_blocks.2=0 mid_block=1e-1"
    assert parse_block_factors(text) == {"down_blocks": 0.5, "up_blocks.2": 0.0, "mid_block": 0.1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("down_blocks", "'down_blocks' is no NAME=FACTOR; write for example up_blocks.2=0.5"),
        ("down_blocks=-1", "'down_blocks=-1': the factor is out of range"),
        ("down_blocks=nan", "the factor is out of range"),
        ("down_blocks=x", "the factor is out of range"),
        ("mid_block=1 mid_block=2", "mid_block is named twice"),
        (" ", "empty; write"),
    ],
)
def test_faulty_entries_are_refused(tmp_path, text, told):
    with pytest.raises(UserError, match=f"^learning_rate_by_block: .*{told}"):
        Settings(tmp_path, learning_rate_by_block=text)


@pytest.fixture
def objective():
    keras.utils.set_random_seed(0)
    unet = UNet(dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, block_out_channels=(8, 8), **LEVELS))
    return DiffusionObjective(unet, NoiseSchedule(SchedulerConfig(prediction_type="v_prediction")))


LEVELS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def test_factors_are_those_of_the_longest_name_and_0_freezes(objective, tmp_path):
    text = "up_blocks=0.5 up_blocks.1=0 up_blocks.1.resnets.0.conv1=2"
    rates = RateFactors(objective, Settings(tmp_path, learning_rate_by_block=text))
    for name, variable, _ in parameter_paths(objective):
        expected = 1.0
        if name.startswith("unet.up_blocks.1.resnets.0.conv1."):
            expected = 2.0
        elif name.startswith("unet.up_blocks.1."):
            expected = 0.0
        elif name.startswith("unet.up_blocks."):
            expected = 0.5
        assert rates.factors[id(variable)] == expected, name
        assert variable.trainable == (expected > 0), name


ALL_FROZEN = "conv_in=0 conv_out=0 conv_norm_out=0 time_embedding=0 down_blocks=0 mid_block=0 up_blocks=0"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learning_rate_by_block": "up_blocks.2=1"}, "up_blocks.2 matches no trained weights"),
        (
            {"learning_rate_by_block": "unet=1"},
            "there are conv_in, .*down_blocks.1, mid_block",
        ),
        ({"learning_rate_by_block": ALL_FROZEN}, "freezes all that is trained"),
        ({"text_encoder_lr": 1e-5}, "^text_encoder_lr: has no effect on a frozen text encoder"),
    ],
)
def test_settings_without_effect_are_refused(objective, tmp_path, values, told):
    with pytest.raises(UserError, match=told):
        RateFactors(objective, Settings(tmp_path, **values))


def test_one_step_moves_each_block_by_its_factor(objective, tmp_path):
    """A first step of Lion is the learning rate itself, in the compiled step."""
    options = {"optimizer": "lion", "adam_weight_decay": 0.0, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    settings = Settings(
        tmp_path, learning_rate_by_block="down_blocks=0.5 mid_block=0", lr_warmup_steps=0, **options
    )
    rates = RateFactors(objective, settings)
    optimizer = make_optimizer(settings)
    optimizer.rate_factors = rates.factors
    objective.compile(optimizer=optimizer, jit_compile=False)
    before = {one.name: ops.convert_to_numpy(one.variable) for one in parameter_paths(objective)}
    generator = np.random.default_rng(0)
    batch = {
        "samples": generator.normal(size=(2, 8, 8, 3)).astype("float32"),
        "noise": generator.normal(size=(2, 8, 8, 3)).astype("float32"),
        "timesteps": np.array([100, 700], "int32"),
    }
    objective.train_on_batch(batch)
    steps = {
        one.name: np.abs(ops.convert_to_numpy(one.variable) - before[one.name]).max()
        for one in parameter_paths(objective)
    }
    # The last convolution is zero at first, so only its own gradient is not.
    np.testing.assert_allclose(steps["unet.conv_out.bias"], 1e-2, rtol=1e-4)
    objective.train_on_batch(batch)
    for one in parameter_paths(objective):
        moved = np.abs(ops.convert_to_numpy(one.variable) - before[one.name]).max()
        if ".mid_block." in one.name:
            assert moved == 0, one.name
        elif ".down_blocks.0.resnets.0.conv2." in one.name:
            np.testing.assert_allclose(moved, 0.5e-2, rtol=1e-3)
