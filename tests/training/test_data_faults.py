"""A file of the data set that vanishes in the middle of a run: the steps before are saved."""

import dataclasses
import shlex
import threading
import time

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.main import main
from keras_sd.data.folders import FolderSource
from keras_sd.errors import UserError
from tests import tiny
from tests.programs import Program
from tests.training.test_trainer import assert_same_state, state, train

SIDE = 16
STEPS = 40  # more than are read ahead


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(8):
        picture = generator.integers(0, 256, (SIDE, SIDE, 3), dtype="uint8")
        Image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def newest_step(run):
    return max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_before_a_vanished_file_are_saved_and_resumed_to_the_bit(tmp_path, images, accumulation):
    source = FolderSource(images, tiny.ONE_LEVEL_PIXEL_UNET.sample_size, need_captions=False)
    options = {
        "pictures": source,
        "train_batch_size": 3,
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": STEPS,
    }
    assert train(tmp_path / "whole", evaluation_steps=0, **options)

    def hide(step):
        if step == 4:
            (images / "5.png").rename(tmp_path / "5.png")

    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", evaluation_steps=4, evaluate=hide, **options)
    step = newest_step(tmp_path / "run")
    assert 4 <= step < STEPS
    assert f"{images / '5.png'}: no such image file" in str(caught.value)
    assert f"checkpoint-{step}; once that is mended, resume with `resume_from_" in str(caught.value)
    assert "\n" not in str(caught.value)

    (tmp_path / "5.png").rename(images / "5.png")
    assert train(tmp_path / "run", evaluation_steps=0, resume_from_checkpoint="latest", **options)
    assert_same_state(state(tmp_path / "whole", STEPS), state(tmp_path / "run", STEPS))


class Unreadable(list):
    """Pictures that cannot be read once the run has begun."""

    def __getitem__(self, index):
        raise UserError("picture: no such image file; add it")

    def fingerprint(self):
        return "pictures"


def test_where_no_step_was_taken_there_is_nothing_to_save(tmp_path):
    with pytest.raises(UserError, match="^picture: no such image file; add it; there is no checkpoint yet$"):
        train(tmp_path / "run", pictures=Unreadable(range(8)), evaluation_steps=0, max_train_steps=2)


def hide_after_a_checkpoint(tmp_path, is_running):
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert is_running() and time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "images" / "5.png").rename(tmp_path / "5.png")


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_command_ends_in_one_line_with_the_command_that_resumes(tmp_path, images, run_program, backend):
    dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, sample_size=SIDE).save(tmp_path / "unet.json")
    values = ["ddim", "--train-data-dir", images, "--unet-config", tmp_path / "unet.json", "--output-dir"]
    values += [tmp_path / "run", "--max-train-steps", 100_000, "--train-batch-size", 3]
    values += ["--checkpointing-steps", 10, "--evaluation-steps", 0, "--no-jit-compile"]
    if backend == "jax":
        program = Program(["-m", "keras_sd.train", *values])
        hide_after_a_checkpoint(tmp_path, program.is_running)
        done = program.finish()
        code, errors = done.returncode, done.stderr
    else:
        thread = threading.Thread(target=hide_after_a_checkpoint, args=(tmp_path, lambda: True))
        thread.start()
        code, _, errors = run_program(main, *values)
        thread.join()
    step = newest_step(tmp_path / "run")
    last = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors
    assert f"error: {images / '5.png'}: no such image file" in last and f"checkpoint-{step}; " in last

    (tmp_path / "5.png").rename(images / "5.png")
    _, command = last.split("resume with: ")
    words = shlex.split(command)
    assert words[-2:] == ["--resume-from-checkpoint", "latest"]
    if backend == "tensorflow":
        resumed = [*words[words.index("ddim") :], "--max-train-steps", step + 2]
        code, _, errors = run_program(main, *resumed)
        assert code == 0 and f"resuming after step {step}" in errors
        assert newest_step(tmp_path / "run") == step + 2
