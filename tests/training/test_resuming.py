"""The line of a resumed run names every setting that has changed and is no matter of the weights."""

import dataclasses

import pytest

from keras_sd.errors import UserError
from keras_sd.training.checkpoints import TrainingState
from keras_sd.training.resuming import check_averages, describe
from keras_sd.training.settings import Settings


def resumed(tmp_path, before, now):
    settings = Settings(tmp_path, **before)
    checkpoint = TrainingState(3, {}, {"batch": 3, "examples": 96}, settings.identity())
    return describe(checkpoint, dataclasses.replace(settings, **now))


def test_what_a_run_leaves_behind_is_told(tmp_path):
    line = resumed(
        tmp_path,
        {"post_hoc_ema": "float16", "evaluation_steps": 10},
        {"post_hoc_ema": "float32", "validation_steps": 7, "report_to": "none", "checkpointing_steps": 5},
    )
    assert line == (
        "resuming after step 3 with changes: checkpointing_steps is 5, it was 500; "
        "validation_steps is 7, it was 0; post_hoc_ema is float32, it was float16; "
        "report_to is none, it was tensorboard"
    )


def test_what_changes_no_result_is_not_told(tmp_path):
    assert resumed(tmp_path, {}, {"jit_compile": False}) == "resuming after step 3"


def test_checkpoints_of_older_versions_say_nothing_of_it(tmp_path):
    settings = Settings(tmp_path, evaluation_steps=10)
    config = {name: value for name, value in settings.identity().items() if name != "evaluation_steps"}
    checkpoint = TrainingState(3, {}, {"batch": 3, "examples": 96}, config)
    assert describe(checkpoint, settings) == "resuming after step 3"


def test_averages_that_were_not_kept_are_refused():
    check_averages("checkpoint-3", {"weights", "post_hoc_0.05"}, ["post_hoc_0.05"])
    with pytest.raises(UserError, match="checkpoint-3: has no averages for `post_hoc_ema`"):
        check_averages("checkpoint-3", {"weights"}, ["post_hoc_0.05"])
