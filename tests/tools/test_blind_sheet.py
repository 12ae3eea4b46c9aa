import json

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.demo import PROMPTS
from keras_sd.files.image_files import read_parameters
from keras_sd.pipeline.defaults import ModelDefaults
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests import tiny
from tools.blind_sheet import blind_sheet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    own = ModelDefaults({"sampling": {"num_inference_steps": 1}})
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, defaults=own).save(folder)
    return folder


def test_the_key_alone_tells_what_an_image_shows(model, tmp_path):
    folder = tmp_path / "blind"
    options = ["--model", str(model), "--seed", "7", "--scale", "2", "--order-seed", "1"]
    blind_sheet.main(["--output-dir", str(folder), *options], standalone_mode=False)
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    assert list(key) == [f"{number:02}.png" for number in range(1, 13)]
    assert sorted(each["prompt"] for each in key.values()) == sorted(PROMPTS)
    assert [each["prompt"] for each in key.values()] != list(PROMPTS)
    sd = StableDiffusion.load(model)
    for name in ("01.png", "12.png"):
        drawn = np.asarray(Image.open(folder / name))
        alone = sd.text_to_image(key[name]["prompt"], seed=key[name]["seed"], progress=False)[0]
        assert drawn.shape == (32, 32, 3)
        assert np.abs(drawn[::2, ::2].astype(int) - alone).max() <= 1
        assert key[name]["seed"] == 7 + PROMPTS.index(key[name]["prompt"])
        assert read_parameters(folder / name) == {}
