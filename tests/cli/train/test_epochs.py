"""A run of some epochs, from a file of options, which it keeps so that it can be run again."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.epochs import images_of_epoch, saving_steps_of_epochs, steps_of_epochs
from keras_sd.cli.train.main import main, train
from keras_sd.errors import UserError
from keras_sd.training.checkpoints import Checkpoints
from tests import tiny


def test_updates_are_those_of_the_images():
    options = {"num_train_epochs": 3, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    images = images_of_epoch([None] * 3, [2, 1, 4])
    assert images == 7 and images_of_epoch([None] * 3) == 3
    assert steps_of_epochs(options, images) == 6  # 21 images in batches of 4
    assert steps_of_epochs(options | {"gradient_accumulation_steps": 2}, images) == 3
    assert steps_of_epochs(options | {"train_batch_size": 100}, images) == 1
    with pytest.raises(UserError, match="--num-train-epochs 2147483647: .* updates are too many"):
        steps_of_epochs(options | {"num_train_epochs": 2**31 - 1}, 100)


def test_updates_between_checkpoints_are_those_of_the_images(run_program, tmp_path):
    options = {"checkpointing_epochs": 2, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert saving_steps_of_epochs(options, 7) == 4  # 14 images, of which the last update has two
    assert saving_steps_of_epochs(options | {"gradient_accumulation_steps": 2}, 9) == 2
    assert saving_steps_of_epochs(options | {"train_batch_size": 100}, 7) == 1
    both = ("--checkpointing-epochs", 2, "--save-every-n-steps", 3, "--output-dir", tmp_path / "run")
    code, _, errors = run_program(main, "lora", *both)
    assert code == 2 and errors.endswith(
        "--checkpointing-epochs 2: --checkpointing-steps is given too; leave one out\n"
    )
    assert not (tmp_path / "run").exists()


def test_images_seen_before_another_batch_size_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"train_batch_size": 4})
    checkpoints.save(3, {}, {"batch": 3, "examples": 12})
    options = {"num_train_epochs": 3, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert steps_of_epochs(options, 7, tmp_path / "checkpoint-3") == 3 + 5  # of the 9 other images
    assert steps_of_epochs(options | {"num_train_epochs": 1}, 7, tmp_path / "checkpoint-3") == 3


def losses(run):
    lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_run_of_epochs_and_its_repetition(tmp_path, capfd):
    """Of three images, one of which an epoch shows twice."""
    for index, name in enumerate(("2_a/0", "1_b/1", "1_b/2")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    tiny.ONE_LEVEL_PIXEL_UNET.save(tmp_path / "unet.json")
    (tmp_path / "run.toml").write_text(
        f"""
        [data]
        train_data_dir = "{tmp_path}/images"
        unet_config = "{tmp_path}/unet.json"
        [run]
        num_train_epochs = 3
        save_every_n_epochs = 1
        train_batch_size = 5
        lr_warmup_steps = 0
        lr_scheduler = "linear"
        learning_rate = 0.01
        jit_compile = false
        evaluation_steps = 0
        """,
        encoding="utf-8",
    )
    arguments = ["ddim", "--config-file", tmp_path / "run.toml", "--output-dir", tmp_path / "first"]
    train.main(list(map(str, arguments)), standalone_mode=False)
    assert "3 steps (3 epochs), batch size 5" in capfd.readouterr().err  # 12 images in batches of 5
    saved = {path.name for path in (tmp_path / "first").glob("checkpoint-*")}
    assert saved == {"checkpoint-2", "checkpoint-3"}  # after each, of which two are kept
    rates = (tmp_path / "first" / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    np.testing.assert_allclose(
        [json.loads(line)["learning_rate"] for line in rates], [0.01, 0.02 / 3, 0.01 / 3], rtol=1e-5
    )
    again = ["ddim", "--config-file", tmp_path / "first" / "options.toml", "--output-dir", tmp_path / "again"]
    train.main(list(map(str, again)), standalone_mode=False)
    assert losses(tmp_path / "again") == losses(tmp_path / "first")
