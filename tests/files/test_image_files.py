"""PNG parameters and contact sheets."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from keras_sd.errors import UserError
from keras_sd.files.image_files import (
    format_parameters,
    image_grid,
    parse_parameters,
    read_parameters,
    save_gif,
    save_png,
)
from keras_sd.models.pixels import images_from_unit, resized

PARAMETERS = {
    "prompt": "red heart",
    "negative_prompt": "blurry",
    "Steps": 30,
    "Sampler": "DDIM",
    "CFG scale": 5,
    "Seed": 0,
    "Size": "64x64",
    "Model hash": "0123456789",
    "Model": "emoji",
}


def test_the_text_is_in_the_convention():
    assert format_parameters(PARAMETERS) == (
        "red heart\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: DDIM, CFG scale: 5, Seed: 0, Size: 64x64, Model hash: 0123456789, Model: emoji"
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"negative_prompt": ""},
        {"prompt": "two\nlines, Steps: 3, and a colon", "negative_prompt": "also\ntwo: lines"},
        {"prompt": "日本 ❤️ naïve", "Model": 'a "model", with: all\\sorts'},
        {"prompt": ""},
    ],
)
def test_parameters_come_back(tmp_path, change):
    parameters = PARAMETERS | change
    path = tmp_path / "folder" / "a.png"
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype="uint8")
    save_png(image, path, parameters)
    with Image.open(path) as file:
        assert file.format == "PNG" and file.info["parameters"] == format_parameters(parameters)
        np.testing.assert_array_equal(np.asarray(file), image)
    expected = {name: str(value) for name, value in parameters.items() if value != "" or name == "prompt"}
    assert read_parameters(path) == expected


def test_a_picture_may_say_nothing(tmp_path):
    save_png(np.zeros((4, 4, 3), "uint8"), tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") == {}
    assert parse_parameters("a prompt, alone") == {"prompt": "a prompt, alone"}
    (tmp_path / "b.png").write_bytes(b"GIF89a")
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match="not an image that can be read"):
            read_parameters(tmp_path / name)


def test_a_contact_sheet_shows_every_picture():
    images = np.arange(5, dtype="uint8")[:, None, None, None] * np.full((1, 10, 20, 3), 50, "uint8")
    plain = image_grid(images, columns=3)
    assert plain.shape == (2 * 14 + 4, 3 * 24 + 4, 3) and plain.dtype == np.uint8
    for index in range(5):
        top, left = 4 + index // 3 * 14, 4 + index % 3 * 24
        assert (plain[top : top + 10, left : left + 20] == 50 * index).all()
    assert (plain[18:, 52:] == 255).all()  # the empty place
    assert image_grid(list(images)).shape == plain.shape  # about square
    assert image_grid(images[:1], columns=7).shape == (18, 28, 3)

    larger = image_grid(images[1:2], scale=2)
    assert larger.shape == (28, 48, 3) and (larger[4:24, 4:44] == 50).all()


def test_labels_stand_below_their_pictures():
    images = np.full((2, 60, 60, 3), 255, "uint8")
    plain, empty = image_grid(images, columns=2), image_grid(images, ["", ""], columns=2)
    labels = ["heart", "a label that is much too long for the room that there is"]
    sheet = image_grid(images, labels, columns=2)
    assert plain.shape[0] < empty.shape[0] < sheet.shape[0]
    below = sheet[64:]
    assert (sheet[:64] == 255).all()
    assert below[:, :64].min() < 128 and below[:, 68:].min() < 128
    assert (below[:, 64:68] == 255).all() and (below[:, -4:] == 255).all()  # within their columns
    assert (below[:, 68:] < 128).sum() > (below[:, :64] < 128).sum()
    with pytest.raises(UserError, match="1 labels for 2 images"):
        image_grid(images, ["one"])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_become_no_image(number):
    numbers = np.zeros((1, 8, 8, 3), "float32")
    numbers[0, 1, 2, 0] = number
    with pytest.raises(UserError, match="not finite"):
        images_from_unit(numbers)


def test_texts_that_are_no_parameters_are_refused(tmp_path):
    path = tmp_path / "a.png"
    for text in ("a: b, " * 2**20, "x" * (2**20 + 1)):
        save_png(np.zeros((8, 8, 3), "uint8"), path, {"prompt": text})
        with pytest.raises(UserError, match="a.png: not an image that can be read"):
            read_parameters(path)


@pytest.mark.parametrize("piece", ["A", " ", ":", 'a:"', 'a: "x" b', ",", "a:", '\\"', "a "])
def test_settings_take_no_time(piece):
    begin = time.process_time()
    text = "p\nSteps: 1, " + piece * (2**20 // len(piece))
    assert parse_parameters(text)["Steps"] == "1"
    assert time.process_time() - begin < 5


def test_what_is_no_setting_is_passed_over():
    text = 'p\nSteps: 1, nothing, (x): 2, Model: a "b", c : "d, \\"e: f", Size: 8x8, '
    expected = {"prompt": "p", "Steps": "1", "Model": 'a "b"', "Size": "8x8"}
    assert parse_parameters(text) == expected | {"c": 'd, "e: f'}


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="pipe.png: is not a plain file; name the image's own file"):
        read_parameters(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="a folder; name the image's own file"):
        read_parameters(tmp_path)


IMAGE = np.zeros((4, 4, 3), "uint8")
NO_IMAGES = {
    "floats": IMAGE / 255,
    "three axes for two": IMAGE[..., :1],
    "two channels": IMAGE[..., :2],
    "many": np.stack([IMAGE, IMAGE])[None],
    "none": IMAGE[:0],
    "several sizes": [IMAGE, IMAGE[:2]],
    "a number": 5,
}


@pytest.mark.parametrize("images", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_are_no_images_is_refused_in_one_line(tmp_path, images):
    path = tmp_path / "a.png"
    for take in (
        lambda: save_png(images, path),
        lambda: save_gif(images, path),
        lambda: image_grid(images),
        lambda: resized(images, (2, 2)),
    ):
        with pytest.raises(UserError, match="^(images?|frames)( of type|: of several sizes)"):
            take()
    assert not path.exists()


@pytest.mark.parametrize(
    "take, message",
    [
        (lambda path: save_gif(IMAGE[None], path, 0), "frame_rate 0: out of range"),
        (lambda path: save_gif(IMAGE[None], path, np.nan), "frame_rate nan: out of range"),
        (lambda path: save_gif(IMAGE[None], path, 10**400), "frame_rate .* out of range"),
        (lambda path: save_gif([], path), "frames of type"),
        (lambda path: image_grid([]), "images of type"),
        (lambda path: image_grid(IMAGE[None], columns=-1), "columns -1: out of range"),
        (lambda path: image_grid(IMAGE[None], columns=0), "columns 0: out of range"),
        (lambda path: image_grid(IMAGE[None], scale=1.5), "scale 1.5: out of range"),
        (lambda path: save_png(IMAGE, path, {}), "no prompt"),
        (lambda path: save_png(IMAGE, path, {"prompt": 5}), "no prompt"),
    ],
)
def test_numbers_and_parameters_are_checked(tmp_path, take, message):
    with pytest.raises(UserError, match=message):
        take(tmp_path / "a.png")
    assert not any(tmp_path.iterdir())


def test_a_prompt_that_is_no_utf8_is_written_with_its_bytes_escaped(tmp_path):
    prompt = os.fsdecode(b"caf\xe9")
    save_png(IMAGE, tmp_path / "a.png", {"prompt": prompt, "Steps": 1})
    save_gif(IMAGE[None], tmp_path / "a.gif", parameters={"prompt": prompt, "Steps": 1})
    assert read_parameters(tmp_path / "a.png") == read_parameters(tmp_path / "a.gif")
    assert read_parameters(tmp_path / "a.png")["prompt"] == "caf\\udce9"
