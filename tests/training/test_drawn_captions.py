"""Training on captions whose tags are drawn anew each time, in chunks, through the command."""

import contextlib
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.train.main import train
from keras_sd.errors import UserError
from tests import tiny
from tests.programs import Program

DRAWN = ("--shuffle-caption", "--keep-tokens", 1, "--caption-tag-dropout-rate", 0.2)
LONG = ("--max-token-length", 225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A kohya project: two sub-folders with repeats, tags in .caption files, and a model."""
    folder = tmp_path_factory.mktemp("drawn")
    generator = np.random.default_rng(0)
    for index in range(4):
        below = folder / "images" / ("3_red heart" if index < 2 else "1_face")
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), "uint8")).save(below / f"{index}.png")
        (below / f"{index}.caption").write_text(f"red, heart {index}, blue, dark")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, output, *options, steps=4):
    common = ["--train-data-dir", folder / "images", "--output-dir", folder / output]
    common += ["--pretrained-model-name-or-path", folder / "model", "--mixed-precision", "no"]
    common += ["--max-train-steps", steps, "--train-batch-size", 2, "--lr-warmup-steps", 0, "--rank", 2]
    common += ["--lr-scheduler", "constant", "--learning-rate", 0.01, "--evaluation-steps", 0]
    common += ["--checkpointing-steps", 2, "--proportion-empty-prompts", 0.3]
    return [str(argument) for argument in ("lora", *common, *options)]


def trained(folder, output, *options, steps=4):
    train.main(arguments(folder, output, *options, steps=steps), standalone_mode=False)
    return weights(folder / output)


def weights(run):
    return load_file(run / "model" / "pytorch_lora_weights.safetensors")


def apart(one, other):
    return max(np.abs(one[name] - other[name]).max() for name in one)


@pytest.fixture(scope="module")
def drawn(folder):
    return trained(folder, "drawn", *DRAWN, *LONG)


def test_a_resumed_run_draws_the_same(folder, drawn):
    shutil.copytree(folder / "drawn" / "checkpoint-2", folder / "resumed" / "checkpoint-2")
    resumed = trained(folder, "resumed", *DRAWN, *LONG, "--resume-from-checkpoint", "latest")
    for name, array in drawn.items():
        np.testing.assert_array_equal(resumed[name], array)
    with pytest.raises(UserError, match="made with another shuffle_caption"):
        trained(folder, "resumed", *LONG, "--resume-from-checkpoint", "latest", steps=6)


@contextlib.contextmanager
def faulty_images(folder, count):
    images = folder / "images" / "1_face"
    for number in range(count):
        (images / f"bad{number}.png").write_bytes(b"no image")
        (images / f"bad{number}.caption").write_text("face")
    yield
    for path in images.glob("bad*"):
        path.unlink()


def test_both_backends_draw_the_same_and_leave_out_faulty_images(folder, drawn):
    with faulty_images(folder, 2):
        options = (*DRAWN, *LONG, "--on-bad-sample", "skip")
        done = Program(["-m", "keras_sd.train", *arguments(folder, "jax", *options)]).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    other = weights(folder / "jax")
    assert max(np.abs(array).max() for array in drawn.values()) > 0.02
    assert apart(drawn, other) < 2e-3
    notes = [line for line in done.stderr.splitlines() if line.startswith("data: ")]
    assert any("'1_face' (2 images) 1, '3_red heart' (2 images) 3" in note for note in notes), done.stderr
    assert any("2 faulty examples are left out, the first is" in note for note in notes)
    assert "lose their end" not in done.stderr


def test_a_file_of_data_sets_says_the_same(folder, drawn):
    text = "[general]\nshuffle_caption = true\nkeep_tokens = 1\ncaption_tag_dropout_rate = 0.2\n"
    text += "[[datasets]]\nbatch_size = 2\n"
    for name, repeats in (("1_face", 1), ("3_red heart", 3)):
        text += f"[[datasets.subsets]]\nimage_dir = 'images/{name}'\nnum_repeats = {repeats}\n"
    (folder / "data.toml").write_text(text)
    command = arguments(folder, "config", "--dataset-config", folder / "data.toml", *LONG)
    del command[1:3]  # the folder
    place = command.index("--train-batch-size")
    del command[place : place + 2]  # the file has it
    train.main(command, standalone_mode=False)
    for name, array in weights(folder / "config").items():
        np.testing.assert_array_equal(array, drawn[name])
    with pytest.raises(UserError, match="--shuffle-caption: has no effect with --dataset-config"):
        train.main([*command, "--shuffle-caption"], standalone_mode=False)


def test_captions_in_chunks_that_are_encoded_before_the_run(folder, drawn, recwarn):
    fixed = trained(folder, "fixed", *LONG)
    assert apart(fixed, drawn) > 1e-3
    short = trained(folder, "short")
    assert apart(fixed, short) > 1e-3
    (line,) = [str(warning.message) for warning in recwarn.list if "lose their end" in str(warning.message)]
    assert "captions: 4 different ones are longer than 10 tokens" in line


def test_options_without_effect_are_refused(folder):
    for options in (("--keep-tokens", 1), ("--caption-separator", ";")):
        with pytest.raises(UserError, match=f"{options[0]}: has no effect without --shuffle-caption"):
            trained(folder, "refused", *options)
    with pytest.raises(UserError, match="--caption-column: has no effect on a folder without metadata"):
        trained(folder, "refused", "--caption-column", "text")
    emoji = arguments(folder, "refused", "--dataset-name", "emoji", "--caption-lines", "first")
    del emoji[1:3]
    with pytest.raises(UserError, match="--caption-lines: has no effect on emoji"):
        train.main(emoji, standalone_mode=False)
    assert not (folder / "refused" / "run.json").exists()


def test_all_faulty_examples_are_named(folder):
    with faulty_images(folder, 30):
        done = Program(["-m", "keras_sd.train", *arguments(folder, "bad")]).finish()
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert sum("not an image; replace it" in line for line in lines[:-1]) == 20
    assert "... and 10 more" in lines[-2] and "error: " in lines[-1]
    assert "30 faulty examples" in lines[-1] and "--on-bad-sample skip" in lines[-1]
