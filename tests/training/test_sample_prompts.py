"""Files of prompts: kohya's lines, JSON and TOML; each faulty line is named."""

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.training.evaluation import on_one_size
from keras_sd.training.sample_prompts import read_sample_prompts

# As kohya's documentation has them.
TEXT = """# prompt 1
masterpiece, (1girl), in white shirts --n low quality, worst --w 768 --h 512 --d 1 --l 7.5 --s 28

a heart--broken - and -- mended --d 0
plain
"""


def write(tmp_path, text, name="prompts.txt"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_lines_of_kohya_are_read(tmp_path):
    first, second, third = read_sample_prompts(write(tmp_path, TEXT.replace(" -- mended", "")))
    assert first.prompt == "masterpiece, (1girl), in white shirts"
    assert first.place.endswith("prompts.txt, line 2")
    assert first.options() == {
        "negative_prompt": "low quality, worst",
        "height": 512,
        "width": 768,
        "seed": 1,
        "num_inference_steps": 28,
        "guidance_scale": 7.5,
    }
    assert (second.prompt, second.options()) == ("a heart--broken - and", {"seed": 0})
    assert (third.prompt, third.options()) == ("plain", {})


def test_json_and_toml_say_the_same(tmp_path):
    json = '[{"prompt": "a heart", "width": 64, "sample_steps": 9, "scale": 2, "negative_prompt": "red"}]'
    toml = '[prompt]\nwidth = 64\nscale = 2\n[[prompt.subset]]\nprompt = "a heart"\nsample_steps = 9\n'
    toml += 'negative_prompt = "red"\n'
    found = [
        read_sample_prompts(write(tmp_path, text, f"prompts.{kind}"))
        for kind, text in (("json", json), ("toml", toml))
    ]
    expected = {"negative_prompt": "red", "width": 64, "num_inference_steps": 9, "guidance_scale": 2.0}
    for (prompt,) in found:
        assert (prompt.prompt, prompt.options()) == ("a heart", expected)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "good\na --w wide\n", "a.txt, line 2: --w wide: not right; give a whole number from 1"),
        ("a.txt", "a --s 0\n", "line 1: --s 0: not right"),
        ("a.txt", "a --d -1\n", "line 1: --d -1: not right"),
        ("a.txt", "a --l nan\n", "line 1: --l nan: not right; give 0 or more"),
        ("a.txt", "a --ss ddim\n", "line 1: --ss is unknown here: samples are made by the model's own"),
        ("a.txt", "a -- b\n", "line 1: --b is unknown here: use n, w, h, d, s or l"),
        ("a.txt", "a --d 1 --d 2\n", "line 1: --d is given twice"),
        ("a.txt", "\n--d 1\n", "line 2: has no prompt"),
        ("a.txt", "# nothing\n", "a.txt: has no prompts"),
        ("a.csv", "a", "a.csv: not a file of prompts"),
        ("a.json", "{}", "a.json: {}: input should be a valid list"),
        ("a.json", '[{"text": "a"}]', "a.json, prompt 1: not a dictionary with a text as prompt"),
        ("a.json", '[{"prompt": "a", "width": "64"}]', "prompt 1: width '64': not right"),
        ("a.json", '[{"prompt": "a", "width": true}]', "prompt 1: width True: not right"),
        ("a.json", '[{"prompt": "a", "colour": 3}]', "prompt 1: colour is unknown here"),
        ("a.toml", "[prompt\n", "a.toml: not valid TOML"),
        ("a.toml", "[prompts]\n", "a.toml: prompts is unknown"),
        ("a.toml", "[prompt]\n", r"a.toml: there is no \[\[prompt.subset\]\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, told):
    with pytest.raises(UserError, match=told) as error:
        read_sample_prompts(write(tmp_path, text, name))
    assert "\n" not in str(error.value)


def test_images_of_several_sizes_share_a_sheet():
    images = [np.zeros((2, 3, 3), "uint8"), np.full((4, 1, 3), 7, "uint8")]
    sheets = on_one_size(images)
    assert sheets.shape == (2, 4, 3, 3)
    np.testing.assert_array_equal(sheets[0, :2], images[0])
    np.testing.assert_array_equal(sheets[1, :, :1], images[1])
    assert (sheets[0, 2:] == 255).all() and (sheets[1, :, 1:] == 255).all()
