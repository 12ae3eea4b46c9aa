"""The grid of sample images: each line of a file of prompts has the image that the model makes of it."""

import click
import numpy as np
import pytest

from keras_sd.cli.train.run import Run
from keras_sd.cli.train.samples import sample_grid
from keras_sd.errors import UserError
from keras_sd.files.image_files import image_grid
from keras_sd.training.evaluation import on_one_size
from keras_sd.training.settings import Settings
from tests import tiny


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False)


def grid_of(pipeline, tmp_path, lines=None, columns=None, prompts=()):
    options = {"resolution": 16, "num_inference_steps": 2, "validation_prompts": list(prompts)}
    if lines is not None:
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        options["validation_prompts_file"] = tmp_path / "prompts.txt"
    run = Run(Settings(tmp_path, seed=5), None, None, None, options)
    with click.Context(click.Command("lora")):
        return sample_grid(run, pipeline, lambda: ["red heart"], columns=columns, guidance_scale=2.0)


def image(pipeline, prompt, seed, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, **options}
    return pipeline.text_to_image(prompt, seed=seed, progress=False, **options)


def test_a_file_gives_each_line_its_own_options(pipeline, tmp_path):
    lines = ["red heart", "blue heart --n a face --d 9 --s 3 --l 4", "# other sizes", "woman --w 24 --h 20"]
    images = [
        image(pipeline, "red heart", 5),
        image(pipeline, "blue heart", 9, negative_prompt="a face", num_inference_steps=3, guidance_scale=4.0),
        image(pipeline, "woman", 7, height=20, width=24),
    ]
    shown = "blue heart (seed 9, steps 3, guidance 4, without a face)"
    labels = ["red heart", shown, "woman"]
    sheets = on_one_size([one[0] for one in images])
    assert sheets.shape == (3, 20, 24, 3)
    grid = grid_of(pipeline, tmp_path, lines)
    for _ in range(2):  # as every evaluation is
        np.testing.assert_array_equal(grid(), image_grid(sheets, labels=labels, scale=2))


def test_rows_of_a_subject_have_seeds_of_their_own(pipeline, tmp_path):
    grid = grid_of(pipeline, tmp_path, ["red heart", "blue heart --d 30"], columns=2)()
    images = [
        *(image(pipeline, "red heart", seed)[0] for seed in (5, 6)),
        *(image(pipeline, "blue heart", seed)[0] for seed in (30, 31)),
    ]
    labels = ["red heart"] * 2 + ["blue heart (seed 30)"] * 2
    expected = image_grid(np.stack(images), columns=2, labels=labels, scale=2)
    assert np.abs(grid.astype(int) - expected).max() <= 1  # two at a time, up to rounding


def test_prompts_without_a_file_are_as_ever(pipeline, tmp_path):
    expected = [image(pipeline, text, 5 + index)[0] for index, text in enumerate(("a", "b"))]
    expected = image_grid(np.stack(expected), labels=["a", "b"], scale=2)
    found = grid_of(pipeline, tmp_path, prompts=("a", "b"))()
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a --w 17", "prompts.txt, line 2: width 17: does not fit the model; use a multiple of 4"),
        ("a --s 1001", "line 2: 1001 steps: the model has 1000 timesteps; give fewer"),
        ("a --n b --l 1", "line 2: a negative prompt has no effect with the guidance scale 1"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_training(pipeline, tmp_path, line, told):
    with pytest.raises(UserError, match=told):
        grid_of(pipeline, tmp_path, ["good", line])
