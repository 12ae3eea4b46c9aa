"""What a model is sampled and trained with when nothing else is given."""

import json

import pytest

from keras_sd import presets
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.pipeline.defaults import FILE, ModelDefaults, usual
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests import tiny


def test_a_model_without_the_file_has_the_usual_values(tmp_path):
    defaults = ModelDefaults.load(tmp_path)
    assert defaults.guidance_scale == 7.5
    assert defaults.training("lora") == usual("lora")
    # As diffusers' scripts have them.
    assert usual("lora")["learning_rate"] == 1e-4
    assert usual("text-to-image")["learning_rate"] == 1e-5
    assert usual("dreambooth")["learning_rate"] == 5e-6
    assert usual("dreambooth", "lora")["learning_rate"] == 1e-4
    assert usual("lora")["adam_beta2"] == 0.999


def test_the_bundled_model_has_values_of_its_own():
    defaults = ModelDefaults.load(presets.find("emoji"))
    assert defaults.guidance_scale == 5.0
    assert defaults.training("lora") == {
        "learning_rate": 1e-3,
        "train_batch_size": 64,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "max_train_steps": 1000,
        "ema_decay": 0.999,
        "adam_beta2": 0.99,
        "guidance_scale": 5.0,
    }
    # A variant without values of its own has those of its method.
    assert defaults.training("dreambooth", "lora") == defaults.training("dreambooth")


def test_a_part_of_the_values_is_enough(tmp_path):
    values = {"training": {"lora": {"learning_rate": 1}, "dreambooth, lora": {"max_train_steps": 7}}}
    (tmp_path / FILE).write_text(json.dumps(values))
    defaults = ModelDefaults.load(tmp_path)
    assert defaults.training("lora") == usual("lora") | {"learning_rate": 1}
    assert defaults.training("dreambooth")["max_train_steps"] == 400
    assert defaults.training("dreambooth", "lora")["max_train_steps"] == 7


@pytest.mark.parametrize(
    "text, fault",
    [
        ("{", "JSON"),
        ("[]", "not a JSON dictionary"),
        ('{"smapling": {}}', "'smapling'"),
        ('{"training": {"lara": {}}}', "'lara'"),
        ('{"training": {"lora": {"rate": 1}}}', "'rate'"),
        ('{"training": {"lora": {"learning_rate": "fast"}}}', "learning_rate 'fast'"),
        ('{"training": {"lora": {"train_batch_size": 2.5}}}', "train_batch_size 2.5"),
        ('{"sampling": {"guidance_scale": true}}', "guidance_scale True"),
        ('{"sampling": {"guidance_scale": NaN}}', "guidance_scale is out of range"),
        ('{"sampling": {"guidance_scale": 1e999}}', "guidance_scale is out of range"),
        ('{"sampling": {"guidance_scale": -5}}', "guidance_scale is out of range"),
        ('{"training": {"lora": {"max_train_steps": ' + "9" * 99 + "}}}", "max_train_steps is out of range"),
        ("null", "not a JSON dictionary"),
        ("[" * 100_000, "JSON"),
        ("\xff", "JSON"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, fault):
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=fault) as error:
        ModelDefaults.load(tmp_path)
    assert FILE in str(error.value) and "\n" not in str(error.value)


def test_a_saved_model_keeps_its_values_and_samples_by_them(tmp_path):
    own = ModelDefaults({"sampling": {"guidance_scale": 3.0}})
    model = tiny.pipeline(SchedulerConfig(), defaults=own, jit_compile=False)
    model.save(tmp_path / "model")
    opened = StableDiffusion.load(tmp_path / "model", jit_compile=False)
    assert opened.defaults.values == own.values
    sampling = {"num_inference_steps": 2, "progress": False, "seed": 3}
    images = opened.text_to_image("red heart", **sampling)
    assert (images == opened.text_to_image("red heart", guidance_scale=3.0, **sampling)).all()
    assert (images != opened.text_to_image("red heart", guidance_scale=7.5, **sampling)).any()
    # All tasks have the same default.
    drawn = opened.image_to_image(images[0], "blue heart", **sampling)
    assert (drawn == opened.image_to_image(images[0], "blue heart", guidance_scale=3.0, **sampling)).all()
    model.defaults = ModelDefaults()
    model.save(tmp_path / "other")
    assert not (tmp_path / "other" / FILE).exists()
