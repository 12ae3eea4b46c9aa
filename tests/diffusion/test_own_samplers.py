"""Samplers of a user's own: bad ones are refused in one line, before anything is computed."""

import numpy as np
import pytest

from keras_sd.diffusion.samplers import METHODS, SAMPLERS, Method, Sampler
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError


def rows(change):
    """A method with other rows than DDIM's."""
    method = METHODS["DDIMScheduler"]
    return {"method": method._replace(rows=lambda steps, run: change(list(method.rows(steps, run))))}


def row(**values):
    """A method with another first row than DDIM's."""
    return rows(lambda rows: [rows[0]._replace(**values), *rows[1:]])


ARGUMENTS = [
    ({"name": ""}, "sampler '': no name"),
    ({"scheduler": "Foo"}, "sampler Mine: scheduler 'Foo' is unknown; use one of DDIMScheduler, "),
    ({"scheduler": []}, r"sampler Mine: scheduler \[\] is unknown"),
    ({"fixed": None}, "sampler Mine: fixed None is no dictionary"),
    ({"fixed": {"use_karras_sigma": True}}, "sampler Mine: 'use_karras_sigma' is no option of DDIM"),
    ({"fixed": {"prediction_type": "sample"}}, "'prediction_type' is no option of DDIMScheduler that a"),
    ({"fixed": {"rescale_betas_zero_snr": True}}, "'rescale_betas_zero_snr' is no option of DDIM"),
    ({"fixed": {"clip_sample": "no"}}, "^sampler Mine: clip_sample 'no' of DDIMScheduler is not supported"),
    ({"fixed": {"sample_max_value": -1}}, "^sampler Mine: sample_max_value -1 of DDIMScheduler is not"),
    ({"method": len}, "sampler Mine: method <built-in function len> is none; give a keras_sd.Method"),
    ({"method": Method(1, 2)}, "sampler Mine: method Method.* is none; give a keras_sd.Method"),
]
ROWS = [
    (rows(lambda rows: None), "sampler Mine: its method makes None; make `Row` objects"),
    (rows(lambda rows: [tuple(rows[0])]), "its method makes .* make `Row` objects"),
    (rows(lambda rows: []), "its rows end 0 of 5 steps"),
    (rows(lambda rows: rows[:2]), "its rows end 2 of 5 steps; make one or more for each"),
    (rows(lambda rows: rows * 2), "its rows end 10 of 5 steps"),
    (row(ends_step=False), "its rows end 4 of 5 steps"),
    (row(timestep=1e9), "its row 0 at timestep 1000000000.0 cannot be computed; give a timestep from 0 to"),
    (row(timestep=None), "its row 0 at timestep None cannot be computed"),
    (row(level=(1, 0, 0)), "its row 0 at timestep .* cannot be computed"),
    (row(end=(float("nan"), 0)), "its row 0 at timestep .* cannot be computed"),
    (row(latents=0), "its row 0 at timestep .* cannot be computed"),
    (row(latents=np.full(9, np.nan)), "its row 0 at timestep .* cannot be computed"),
    (row(memory=[np.zeros(9)] * 6), "its row 0 at timestep .* cannot be computed"),
    (
        {"method": METHODS["DDIMScheduler"]._replace(steps=lambda *_: [])},
        "its method makes 0 steps of 5; return one for each",
    ),
    ({"method": METHODS["DDIMScheduler"]._replace(steps=lambda *_: [3])}, "makes 3; make `Step` objects"),
]


@pytest.mark.parametrize(("change", "line"), ARGUMENTS)
def test_a_sampler_of_ones_own_is_checked(change, line):
    with pytest.raises(UserError, match=line) as raised:
        Sampler(**({"name": "Mine", "purpose": "for the test"} | change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("change", "line"), ROWS)
def test_rows_of_a_sampler_of_ones_own_are_checked(change, line):
    mine = Sampler("Mine", "for the test", **change)
    assert isinstance(hash(mine), int)
    with pytest.raises(UserError, match=line) as raised:
        mine.tables(NoiseSchedule(SchedulerConfig()), 5)
    assert "\n" not in str(raised.value)


def test_options_of_a_sampler_of_ones_own_have_an_effect():
    schedule = NoiseSchedule(SchedulerConfig())
    mine = Sampler("Mine", "for the test", fixed={"timestep_spacing": "trailing"})
    assert mine.tables(schedule, 5).rows[0].timestep == 999
    assert SAMPLERS["ddim"].tables(schedule, 5).rows[0].timestep != 999
    both = Sampler("Mine", "for the test", "LMSDiscreteScheduler", {"use_karras_sigmas": True})
    config = SchedulerConfig.from_dict({"_class_name": "LMSDiscreteScheduler", "use_beta_sigmas": True})
    with pytest.raises(
        UserError, match="scheduler_config.json with the options of Mine: use_karras_sigmas and"
    ):
        both.options(config)
