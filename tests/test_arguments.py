"""What is no name of a file or a model is refused in one line, wherever a name is taken."""

import numpy as np
import pytest

import keras_sd
from keras_sd import presets
from keras_sd.captions.caption_settings import CaptionSettings
from keras_sd.captions.dataset import CaptionedFolder
from keras_sd.data.sources import available_splits
from keras_sd.errors import UserError
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.weights.loading import load_clip, load_part
from keras_sd.weights.readers import read_checkpoint
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors
from tests import tiny


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(unet=tiny.ONE_BLOCK_UNET)


TAKES = {
    "find": lambda name, _: presets.find(name),
    "load": lambda name, _: keras_sd.StableDiffusion.load(name),
    "from_preset": lambda name, _: keras_sd.StableDiffusion.from_preset(name),
    "Upscaler.load": lambda name, _: keras_sd.Upscaler.load(name),
    "Upscaler.is_in": lambda name, _: keras_sd.Upscaler.is_in(name),
    "read_checkpoint": lambda name, _: read_checkpoint(name),
    "load_part": lambda name, _: load_part(name, "vae"),
    "load_clip": lambda name, _: load_clip(name),
    "read_safetensors": lambda name, _: read_safetensors(name),
    "write_safetensors": lambda name, _: write_safetensors(name, {}),
    "Tokenizer.load": lambda name, _: Tokenizer.load(name),
    "Tokenizer.save": lambda name, _: Tokenizer.clip().save(name),
    "load_lora": lambda name, pipeline: pipeline.load_lora(name),
    "load_textual_inversion": lambda name, pipeline: pipeline.load_textual_inversion(name),
    "save": lambda name, pipeline: pipeline.save(name),
    "FolderSource": lambda name, _: keras_sd.FolderSource(name, 8),
    "load_source": lambda name, _: keras_sd.load_source(name, "train", 8),
    "available_splits": lambda name, _: available_splits(name),
    "CaptionedFolder": lambda name, _: CaptionedFolder(name, CaptionSettings(mode="caption")),
    "save_png": lambda name, _: keras_sd.save_png(np.zeros((4, 4, 3), "uint8"), name),
    "save_gif": lambda name, _: keras_sd.save_gif(np.zeros((1, 4, 4, 3), "uint8"), name),
    "read_parameters": lambda name, _: keras_sd.read_parameters(name),
    "Settings": lambda name, _: keras_sd.Settings(name),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_what_is_no_name_is_refused(take, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = ": (not a name|empty|no name of a file|no path|no name); "
    for name in (None, 5, b"x", "", "a\0b", "\ud800", {}):
        with pytest.raises(UserError, match=refused) as caught:
            take(name, pipeline)
        assert "\n" not in str(caught.value)
