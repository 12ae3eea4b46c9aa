"""What `load` is asked for, and what lies in a folder, has an effect or is refused by name."""

import json
import os

import pytest

from keras_sd import StableDiffusion
from keras_sd.errors import UserError
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.pipeline().save(tmp_path / "model")
    return tmp_path / "model"


def test_options_of_load(folder):
    pipeline = StableDiffusion.load(folder, prediction_type="v_prediction")
    assert pipeline.scheduler_config.prediction_type == "v_prediction"
    for option in ({"prediction_type": "x"}, {"weights": "x"}, {"weights": None}, {"partial": "yes"}):
        with pytest.raises(UserError, match=next(iter(option))):
            StableDiffusion.load(folder, **option)
    for path in (None, 5, b"x", []):
        with pytest.raises(UserError, match="path.*: (not a name|empty)"):
            StableDiffusion.load(path)
    with pytest.raises(UserError, match="vae 5: not a name"):
        StableDiffusion.load(folder, vae=5)


def test_a_scheduler_file_without_a_class(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    del values["_class_name"]
    path.write_text(json.dumps(values | {"use_karras_sigmas": True}))
    with pytest.warns(UserWarning, match="use_karras_sigmas"):
        StableDiffusion.load(folder)
    path.write_text(json.dumps(values | {"thresholding": "x"}))
    with pytest.raises(UserError, match="thresholding 'x'"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("name", ["model_index.json", "image_encoder/config.json"])
def test_a_pipe_in_place_of_a_file_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="not a plain file"):
        StableDiffusion.load(folder)
    with pytest.raises(UserError, match="not a plain file"):
        StableDiffusion.load(folder / name)
