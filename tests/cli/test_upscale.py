"""`generate --upscale`: what is drawn and upscaled in one command is what two make, and can be made again."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli import main as cli
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.files.image_files import read_parameters
from keras_sd.models.unet import UNet
from keras_sd.pipeline.defaults import ModelDefaults
from keras_sd.pipeline.image_parameters import options_of
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.pipeline.upscaler import Upscaler
from tests import tiny

SAMPLING = ("--num-inference-steps", 2, "--guidance-scale", 2)
SCHEDULES = SchedulerConfig(), SchedulerConfig(beta_schedule="squaredcos_cap_v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an upscaler on pixels with defaults of its own, and one with text on latents."""
    folder = tmp_path_factory.mktemp("models")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    config = dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, in_channels=6, num_class_embeds=50)
    own = ModelDefaults({"sampling": {"num_inference_steps": 3}})
    Upscaler(tiny.randomize(UNet(config), 5, 0.2), *SCHEDULES, defaults=own).save(folder / "pixels")
    config = dataclasses.replace(tiny.ONE_BLOCK_UNET, in_channels=7, num_class_embeds=50)
    with_text = tiny.pipeline(SCHEDULES[0], config, low_res_scheduler_config=SCHEDULES[1])
    with_text.save(folder / "text")
    (folder / "file.txt").write_text("no model")
    shutil.copyfile(folder / "model/vae/diffusion_pytorch_model.safetensors", folder / "encoder.safetensors")
    shutil.copytree(folder / "model", folder / "names")
    (folder / "names/keras_sd.json").write_text('{"sampling": {"upscaler": "emoji"}}')
    return folder


@pytest.fixture
def generate(run_program, folder, tmp_path):
    """Runs `generate` with the tiny model; returns the image, or asserts that there are several."""

    def run(name, *options, prompt="red heart"):
        output = ("--model", folder / "model", "--output", tmp_path / name, "--no-jit-compile")
        code, _, errors = run_program(cli.main, "generate", prompt, *options, *output)
        assert code == 0, errors
        return np.asarray(Image.open(tmp_path / name))

    return run


def test_images_are_upscaled_as_by_the_library_and_made_again(generate, folder, tmp_path):
    several = ("--num-images", 2, "--seed", 5)
    generate("drawn.png", *SAMPLING, *several)
    generate("large.png", *SAMPLING, *several, "--upscaler", folder / "pixels")
    drawn, large = (
        np.stack([np.asarray(Image.open(tmp_path / f"{name}-{index}.png")) for index in range(2)])
        for name in ("drawn", "large")
    )
    upscaler = Upscaler.load(folder / "pixels", jit_compile=False)
    assert upscaler.defaults.sampling["num_inference_steps"] == 3
    np.testing.assert_array_equal(large, upscaler.upscale(drawn, seed=5))
    assert (large != upscaler.upscale(drawn, seed=5, num_inference_steps=2)).any()
    # The file of the second says how it is made alone.
    said = read_parameters(tmp_path / "large-1.png")
    assert (said["Size"], said["Seed"], said["Postprocess upscale by"]) == ("16x16", "6", "2")
    found = options_of(said)
    assert (found["upscaler"], found["upscaler_steps"]) == (str(folder / "pixels"), 3)
    flags = {"seed", "num_inference_steps", "guidance_scale", "sampler", "height", "width"}
    flags |= {"upscaler", "upscaler_steps"}
    assert flags | {"prompt", "model"} == found.keys()
    given = [each for name in flags for each in (f"--{name.replace('_', '-')}", found[name])]
    assert np.abs(generate("again.png", *given).astype(int) - large[1]).max() <= 1


def test_an_upscaler_with_text_gets_the_prompt_without_its_loras(generate, folder, tmp_path):
    prompt, negative = "red heart", ("--negative-prompt", "dark")
    small = generate("small.png", *SAMPLING, *negative)
    options = ("--upscaler", folder / "text", "--upscaler-steps", 2)
    large = generate("large.png", *SAMPLING, *negative, *options, prompt=f"{prompt} <lora:none:1>")
    model = StableDiffusion.load(folder / "text", jit_compile=False)
    expected = model.upscale(small, f"{prompt} ", "dark", num_inference_steps=2, progress=False)
    assert large.shape == (64, 64, 3)
    # The prompt of the first stage still had the tag of no LoRA, which it leaves out.
    np.testing.assert_array_equal(large, expected[0])


def test_an_upscaler_with_text_is_quantized_as_the_model_is(generate, folder, tmp_path):
    options = ("--upscaler", folder / "text", "--upscaler-steps", 2, "--quantize", "int8", "--seed", 3)
    large = generate("large.png", *SAMPLING, *options)
    found = options_of(read_parameters(tmp_path / "large.png"))
    assert (found["quantize"], found["upscaler"]) == ("int8", str(folder / "text"))
    small = generate("small.png", *SAMPLING, *options[4:])
    given = {"num_inference_steps": 2, "progress": False, "seed": 3}
    exact, coded = (
        StableDiffusion.load(folder / "text", jit_compile=False, quantize=quantize).upscale(
            small, "red heart", **given
        )[0]
        for quantize in (None, "int8")
    )
    np.testing.assert_array_equal(large, coded)
    assert (exact != coded).any()


def test_the_model_names_its_upscaler(run_program, folder, tmp_path):
    model = StableDiffusion.load(folder / "model", jit_compile=False)
    model.defaults = ModelDefaults({"sampling": {"upscaler": "emoji-upscaler", "num_inference_steps": 2}})
    model.save(tmp_path / "own")
    output = tmp_path / "large.png"
    options = ("--model", tmp_path / "own", "--upscale", "--upscaler-steps", 1, "--output", output)
    code, _, errors = run_program(cli.main, "generate", "red heart", *options, "--no-jit-compile")
    assert code == 0, errors
    assert Image.open(output).size == (32, 32)
    said = read_parameters(output)
    assert (said["Steps"], said["Postprocess upscaler"], said["Postprocess steps"]) == (
        "2",
        "emoji-upscaler",
        "1",
    )


@pytest.mark.parametrize(
    "options, line",
    [
        (("--upscale",), "--upscale: {model} names no upscaler of its own; give one by --upscaler, such as"),
        (("--upscaler-steps", 3), "--upscaler-steps: has no effect without --upscale or --upscaler; leave"),
        (("--upscaler", "emoji"), "--upscaler emoji: is no upscaler; use emoji-upscaler, x4-upscaler"),
        (("--upscaler", "none.ckpt"), "'none.ckpt': no such file"),
        (("--upscaler", "{file}"), "--upscaler {file}: is no upscaler"),
        (("--upscaler", "{folder}/file.txt"), "{folder}/file.txt: of no known kind"),
        (("--upscaler", "{folder}"), "{folder}: no model_index.json there"),
        (
            ("--model", "{folder}/names", "--upscale"),
            "--upscale: emoji, which {folder}/names names, is no upscaler",
        ),
        (("--upscaler", "emoji-upscaler", "--upscaler-steps", 1001), "--upscaler-steps 1001: out of range"),
    ],
)
def test_unfit_upscalers_are_one_line_before_a_model_is_opened(run_program, folder, options, line):
    places = {"folder": folder, "model": folder / "model", "file": folder / "encoder.safetensors"}
    options = [str(option).format(**places) for option in options]
    code, output, errors = run_program(cli.main, "generate", "heart", "--model", places["model"], *options)
    assert (code, output) == (2, "") and "opening" not in errors
    assert line.format(**places) in errors.strip().split("\n")[-1]
