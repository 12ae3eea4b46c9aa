"""What a model is sampled and trained with when nothing else is given."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_sd import presets
from keras_sd.cli import main as cli
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.files.image_files import read_parameters
from keras_sd.pipeline.defaults import FILE, ModelDefaults, usual
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests import tiny


def test_a_model_without_the_file_has_the_usual_values(tmp_path):
    defaults = ModelDefaults.load(tmp_path)
    assert defaults.sampling == {
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "upscaler": "",
    }
    assert defaults.training("lora") == usual("lora")
    # As diffusers' scripts have them.
    assert usual("lora")["learning_rate"] == 1e-4
    assert usual("text-to-image")["learning_rate"] == 1e-5
    assert usual("dreambooth")["learning_rate"] == 5e-6
    assert usual("dreambooth", "lora")["learning_rate"] == 1e-4
    assert usual("lora")["adam_beta2"] == 0.999


def test_the_bundled_model_has_values_of_its_own():
    defaults = ModelDefaults.load(presets.find("emoji"))
    assert (defaults.sampling["guidance_scale"], defaults.sampling["upscaler"]) == (2.0, "emoji-upscaler")
    upscaling = ModelDefaults.load(presets.find("emoji-upscaler"))
    assert upscaling.sampling["num_inference_steps"] == 10
    assert defaults.training("lora") == {
        "learning_rate": 1e-3,
        "train_batch_size": 64,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "max_train_steps": 1000,
        "ema_decay": 0.999,
        "adam_beta2": 0.99,
        "guidance_scale": 2.0,
    }
    # A variant without values of its own has those of its method.
    assert defaults.training("dreambooth", "lora") == defaults.training("dreambooth")


def test_a_single_file_has_no_place_for_them_and_says_so(tmp_path):
    sd = tiny.pipeline()
    sd.defaults = ModelDefaults({"sampling": {"guidance_scale": 2.0}})
    with pytest.warns(UserWarning, match="a single file has no place.*defaults: guidance_scale 2.0;"):
        sd.save(tmp_path / "single.safetensors")
    sd.save(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / FILE).read_text()) == sd.defaults.values


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
        ('{"sampling": {"guidance_rescale": 1.5}}', "guidance_rescale is out of range; give 0 to 1"),
        ('{"sampling": {"num_inference_steps": 0}}', "num_inference_steps is out of range; give 1 or more"),
        ('{"sampling": {"num_inference_steps": 2.5}}', "num_inference_steps 2.5"),
        ('{"sampling": {"upscaler": "owner/model"}}', "upscaler 'owner/model' is no preset"),
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
    values = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    own = ModelDefaults({"sampling": values})
    model = tiny.pipeline(SchedulerConfig(), defaults=own, jit_compile=False)
    model.save(tmp_path / "model")
    opened = StableDiffusion.load(tmp_path / "model", jit_compile=False)
    assert opened.defaults.values == own.values
    usual = {"progress": False, "seed": 3}
    images = opened.text_to_image("red heart", **usual)
    assert (images == opened.text_to_image("red heart", **values, **usual)).all()
    for other in ({"guidance_scale": 7.5}, {"num_inference_steps": 3}, {"guidance_rescale": 0}):
        assert (images != opened.text_to_image("red heart", **values | other, **usual)).any()
    # All tasks have the same defaults.
    drawn = opened.image_to_image(images[0], "blue heart", **usual)
    assert (drawn == opened.image_to_image(images[0], "blue heart", **values, **usual)).all()
    model.defaults = ModelDefaults()
    model.save(tmp_path / "other")
    assert not (tmp_path / "other" / FILE).exists()


def test_a_model_without_guidance_does_not_warn_of_its_own_rescale(recwarn):
    own = ModelDefaults({"sampling": {"num_inference_steps": 1, "guidance_rescale": 0.7}})
    model = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, defaults=own, jit_compile=False)
    model.text_to_image("red heart", guidance_scale=1, progress=False)
    assert not [each for each in recwarn if "guidance_rescale" in str(each.message)]
    with pytest.warns(UserWarning, match="guidance_rescale has no effect"):
        model.text_to_image("red heart", guidance_scale=1, guidance_rescale=0.5, progress=False)


def test_files_tell_what_the_model_chose():
    own = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    model = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, defaults=ModelDefaults({"sampling": own}))
    said = model.parameters("heart", seed=0, size=(16, 16))
    assert (said["Steps"], said["CFG scale"], said["Guidance rescale"]) == (2, "3", "0.7")
    # Off is not the usual value of this model, so it is told; other models leave it out.
    assert model.parameters("heart", seed=0, size=(16, 16), guidance_rescale=0)["Guidance rescale"] == "0"
    model.defaults = ModelDefaults()
    assert "Guidance rescale" not in model.parameters("heart", seed=0, size=(16, 16))


def test_the_command_takes_the_values_of_the_model(run_program, tmp_path):
    own = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    model = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, defaults=ModelDefaults({"sampling": own}))
    model.save(tmp_path / "model")
    output = tmp_path / "heart.png"
    options = ("--model", tmp_path / "model", "--output", output, "--no-jit-compile")
    code, _, errors = run_program(cli.main, "generate", "red heart", *options)
    assert code == 0, errors
    said = read_parameters(output)
    assert (said["Steps"], said["CFG scale"], said["Guidance rescale"]) == ("2", "3", "0.5")
    expected = StableDiffusion.load(tmp_path / "model", jit_compile=False)
    drawn = np.asarray(Image.open(output))
    np.testing.assert_array_equal(drawn, expected.text_to_image("red heart", progress=False)[0])
    # The steps of which a strength leaves none are the model's, too.
    given = (output, "red heart", "--strength", 0.1, "--model", tmp_path / "model")
    code, _, errors = run_program(cli.main, "image-to-image", *given)
    assert code == 2 and "--strength 0.1: leaves none of 2 steps" in errors
