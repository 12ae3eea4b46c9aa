"""Repeats of images by the names of kohya's folders, in methods without captions, and on resuming."""

from pathlib import Path

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
    file = place / f"{method}-{images}" / "checkpoint-1" / "weights.safetensors"
    if not file.exists():
        train.main(arguments(place, method, images), standalone_mode=False)
    return load_file(file)


@pytest.mark.parametrize("method", ["ddim", "textual-inversion", "dreambooth"])
def test_repeats_are_honoured(place, method, capfd):
    """The batch holds each of two images twice, or one of them three times."""
    plain, repeated = (trained(place, method, images) for images in ("plain", "repeated"))
    assert any((plain[name] != repeated[name]).any() for name in plain)
    assert "repeats in an epoch, by names of folders: '3_x' (1 images) 3" in capfd.readouterr().err
    (place / "repeated" / "3_x").rename(place / "repeated" / "2_x")
    with pytest.raises(UserError, match="made with other images, masks or captions"):
        more = ("--max-train-steps", "2", "--resume-from-checkpoint", "latest")
        train.main(arguments(place, method, "repeated", *more), standalone_mode=False)
    (place / "repeated" / "2_x").rename(place / "repeated" / "3_x")


def write_config(place, name, *subsets):
    text = "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
    path = place / f"{name}.toml"
    path.write_text(f"[[datasets]]\nresolution = {SIDES[name]}\n{text}")
    return path


SIDES = {"ddim": 8, "textual-inversion": 16, "dreambooth": 16, "refused": 16}


def with_config(place, method, path, *options):
    command = arguments(place, method, "none", "--dataset-config", path, *options)
    for flag in ("--train-data-dir", "--instance-data-dir", "--instance-prompt"):
        if flag in command:
            index = command.index(flag)
            del command[index : index + 2]
    command[command.index("--output-dir") + 1] = str(place / f"config-{Path(path).stem}")
    return command


@pytest.mark.parametrize("method", ["ddim", "textual-inversion", "dreambooth"])
def test_a_file_of_data_sets_says_the_same(place, method):
    words = "class_tokens = 'a sks'\n" if method == "dreambooth" else ""
    subsets = [f"image_dir = '{place}/plain/{name}'\n{words}" for name in ("x", "y")]
    path = write_config(place, method, subsets[0] + "num_repeats = 3", subsets[1])
    train.main(with_config(place, method, path), standalone_mode=False)
    expected = trained(place, method, "repeated")
    found = load_file(place / f"config-{method}" / "checkpoint-1" / "weights.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    path = write_config(place, method, subsets[0] + "num_repeats = 2", subsets[1])
    with pytest.raises(UserError, match="made with "):
        more = ("--max-train-steps", "2", "--resume-from-checkpoint", "latest")
        train.main(with_config(place, method, path, *more), standalone_mode=False)


def test_images_of_a_class_in_a_file_of_data_sets(place, capfd):
    """The same as with folders and prompts, and with tags that are drawn anew."""
    folders = arguments(place, "dreambooth", "plain", "--class-prompt", "a toy", "--num-class-images", 2)
    folders += ["--with-prior-preservation", "--class-data-dir", str(place / "repeated")]
    folders[folders.index("--output-dir") + 1] = str(place / "folders")
    train.main(folders, standalone_mode=False)
    expected = load_file(place / "folders" / "checkpoint-1" / "weights.safetensors")
    subject = f"image_dir = '{place}/plain'\nclass_tokens = 'a sks'"
    others = f"image_dir = '{place}/repeated'\nclass_tokens = 'a toy'\nis_reg = true"
    for index, more in enumerate(("", "\nshuffle_caption = true")):
        path = write_config(
            place, "dreambooth", subject.replace("a sks", "a sks" + ", a, b" * index) + more, others
        )
        command = with_config(place, "dreambooth", path)
        command[command.index("--output-dir") + 1] = str(place / f"pairs{index}")
        train.main(command, standalone_mode=False)
        found = load_file(place / f"pairs{index}" / "checkpoint-1" / "weights.safetensors")
        is_same = all((found[name] == array).all() for name, array in expected.items())
        assert is_same == (index == 0) and found.keys() == expected.keys()


@pytest.mark.parametrize(
    ("method", "lines", "fault"),
    [
        ("ddim", "shuffle_caption = true", "shuffle_caption has no effect, as no captions are read; remove"),
        ("ddim", "is_reg = true", "is_reg has an effect in DreamBooth alone; remove it"),
        ("textual-inversion", "class_tokens = 'x'", "class_tokens has no effect, as no captions are read"),
        ("dreambooth", "class_tokens = 'x'\nis_reg = true", "no subset of images of the subject; add one"),
    ],
)
def test_keys_without_an_effect(place, method, lines, fault):
    path = write_config(place, "refused", f"image_dir = '{place}/plain'\n{lines}")
    with pytest.raises(UserError, match=fault):
        train.main(with_config(place, method, path), standalone_mode=False)


def test_dreambooth_names_what_is_missing_or_too_much(place):
    command = with_config(place, "dreambooth", write_config(place, "refused", f"image_dir = '{place}/plain'"))
    del command[command.index("--dataset-config") : command.index("--dataset-config") + 2]
    with pytest.raises(UserError, match="--instance-data-dir: missing; give a folder of images"):
        train.main(command, standalone_mode=False)
    path = write_config(place, "refused", f"image_dir = '{place}/plain'\nclass_tokens = 'x'")
    for option in ("--class-prompt", "--instance-prompt"):
        with pytest.raises(UserError, match=f"{option}: has no effect with --dataset-config"):
            train.main(with_config(place, "dreambooth", path, option, "x"), standalone_mode=False)
    lcm = ["lcm", "--dataset-config", str(path), "--pretrained-model-name-or-path", str(place / "model")]
    path.write_text(path.read_text() + "shuffle_caption = true\n")
    with pytest.raises(UserError, match="caption_tag_dropout_rate have no effect with lcm; remove them"):
        train.main([*lcm, "--output-dir", str(place / "lcm")], standalone_mode=False)


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
