"""Repeats of images by the names of kohya's folders, in methods without captions, and on resuming."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.train.main import train
from keras_sd.errors import UserError
from keras_sd.training.dreambooth import drawn_example, read_images, train_dreambooth
from keras_sd.training.trainer import Settings
from tests import tiny

BATCH = 4


def write_images(folder, *names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), "uint8")
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("repeats")
    write_images(place / "plain", "x/a.png", "y/b.png")
    write_images(place / "repeated", "3_x/a.png", "y/b.png")
    tiny.ONE_LEVEL_PIXEL_UNET.save(place / "unet.json")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(place / "model")
    return place


def arguments(place, method, images, *options):
    of_method = {
        "ddim": ["--train-data-dir", place / images, "--unet-config", place / "unet.json"],
        "textual-inversion": ["--train-data-dir", place / images, "--placeholder-token", "<x>"],
        "dreambooth": ["--instance-data-dir", place / images, "--instance-prompt", "a sks"],
    }[method]
    if method != "ddim":
        of_method += ["--pretrained-model-name-or-path", place / "model"]
    common = ["--train-batch-size", BATCH, "--mixed-precision", "no", "--no-jit-compile", "--seed", 3]
    steps = ["--max-train-steps", 1, "--evaluation-steps", 0, "--lr-warmup-steps", 0, "--no-random-flip"]
    output = ["--output-dir", place / f"{method}-{images}"]
    return [str(one) for one in (method, *of_method, *common, *steps, *output, *options)]


def trained(place, method, images):
    train.main(arguments(place, method, images), standalone_mode=False)
    return load_file(place / f"{method}-{images}" / "checkpoint-1" / "weights.safetensors")


@pytest.mark.parametrize("method", ["ddim", "textual-inversion", "dreambooth"])
def test_repeats_are_honoured(place, method, capfd):
    """The batch holds each of two images twice, or one of them three times."""
    plain, repeated = (trained(place, method, images) for images in ("plain", "repeated"))
    assert any((plain[name] != repeated[name]).any() for name in plain)
    assert "repeats in an epoch, by names of folders: '3_x' (1 images) 3" in capfd.readouterr().err
    (place / "repeated" / "3_x").rename(place / "repeated" / "2_x")
    with pytest.raises(UserError, match="made with other images or captions; resume with the same"):
        more = ("--max-train-steps", "2", "--resume-from-checkpoint", "latest")
        train.main(arguments(place, method, "repeated", *more), standalone_mode=False)
    (place / "repeated" / "2_x").rename(place / "repeated" / "3_x")


def test_images_of_a_class_count_as_often_as_they_are_repeated():
    generator = np.random.default_rng(0)
    drawn = [drawn_example(["a", "b", "c"], generator, np.array([1, 0, 3])) for _ in range(400)]
    assert drawn.count("b") == 0 and 2.2 < drawn.count("c") / drawn.count("a") < 4


def test_other_repeats_of_the_same_images_are_told(place, tmp_path):
    class Repeated:
        """Of a source whose fingerprint says nothing of its repeats."""

        def __init__(self, images, repeats):
            self.images, self._repeats = images, repeats

        def __getattr__(self, name):
            return getattr(self.images, name)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

        def repeats(self):
            return np.array(self._repeats)

    def run(repeats, **resuming):
        settings = Settings(
            tmp_path / "run",
            max_train_steps=1,
            train_batch_size=2,
            jit_compile=False,
            evaluation_steps=0,
            **resuming,
        )
        pipeline = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False)
        return train_dreambooth(settings, pipeline, Repeated(read_images(place / "plain", "a", 16), repeats))

    assert run([1, 2])
    with pytest.raises(UserError, match="made with other repeats of the images"):
        run([1, 3], resume_from_checkpoint="latest")
