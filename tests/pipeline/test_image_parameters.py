"""What an image's file says is enough to make the image again, whatever options it was made with."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd.cli import generate
from keras_sd.cli import main as cli
from keras_sd.errors import UserError
from keras_sd.files.image_files import read_parameters
from keras_sd.pipeline.image_parameters import lora_hash, options_of
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.textual_inversion import write_embeddings
from tests import tiny

# A value of every option that changes an image. An option that is not here fails the test below.
VALUES = {
    "prompt": "red (heart:1.2), <cat> \\(tiny\\)",
    "prompts": ("red heart", 'blue "heart", <cat>: tiny'),
    "negative_prompt": 'dark, "x": y',
    "num_inference_steps": 5,
    "guidance_scale": 2.123456789,
    "guidance_interval": (0.25, 1.0),
    "guidance_rescale": 0.35,
    "reuse_interval": 2,
    "clip_skip": 2,
    "seed": 2**64 - 1,
    "sampler": "euler_a",
    "eta": 0.0,
    "height": 24,
    "width": 16,
    "num_images": 2,
    "num_frames": 3,
    "frame_rate": 12.5,
    "strength": 0.625,
    "noise_level": 7,
    "dtype": "bfloat16",
    "quantize": "int8",
    "upscaler": "emoji-upscaler",
    "upscaler_steps": 2,
}
ETA = {"sampler": "ddim", "eta": 0.5}
# What an image does not depend on, but for rounding, and what is said in another way.
NO_VALUES = {
    "output": "where it goes",
    "overwrite": "where it goes",
    "batch_size": "images are the same in any batch",
    "jit_compile": "images are the same, but for rounding",
    "engine": "images are the same, but for rounding",
    "lora_folder": "its LoRAs are listed as those of --lora are",
    "upscale": "the model's own upscaler is named as that of --upscaler is",
}
FILES = {"model", "vae", "loras", "embeddings"}


@pytest.fixture
def keras_sd_command(run_program):
    """Runs a command without XLA, which images that are made once or twice do not pay for."""

    def run(*arguments):
        command, *others = arguments
        return run_program(cli.main, command, "--no-jit-compile", *others)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and a folder with all that may be added to it."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny.pipeline()
    model.save(folder / "model")
    generator = np.random.default_rng(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for name in ("a/ink", "b/ink", "c/wash: light"):
        down, up = generator.standard_normal((2, 16)), generator.standard_normal((8, 2))
        lora = {"unet": {layer: LowRank(down.astype("float32"), up.astype("float32"), 2.0)}}
        write_lora(folder / "parts" / f"{name}.safetensors", lora)
    vectors = generator.standard_normal((2, 16)).astype("float32")
    write_embeddings(folder / "parts" / "cat.safetensors", {"<cat>": vectors})
    tiny.randomize(model.vae, 9, 0.2)
    model.save(folder / "parts" / "other")
    return folder


def added(files):
    parts = files / "parts"
    return {
        "model": str(files / "model"),
        "vae": str(parts / "other"),
        "loras": (f"{parts / 'a/ink.safetensors'}:0.8", f"{parts / 'b/ink.safetensors'}:-1.25"),
        "embeddings": (f"{parts / 'cat.safetensors'}:<cat>",),
    }


def arguments_of(command, options):
    """The options as a shell would give them."""
    arguments = []
    for parameter in command.params:
        if parameter.name not in options:
            continue
        value = options[parameter.name]
        if parameter.param_type_name == "argument":
            arguments += ["--", *value] if parameter.nargs == -1 else ["--", value]
            continue
        values = value if parameter.multiple else [value]
        for each in reversed(values):
            pieces = each if parameter.nargs > 1 else [each]
            arguments = [parameter.opts[0], *map(str, pieces), *arguments]
    return arguments


def pixels(path):
    with Image.open(path) as image:
        return np.stack([np.asarray(image.convert("RGB")) for _ in map(image.seek, range(image.n_frames))])


@pytest.mark.parametrize("changes", [{}, pytest.param(ETA, marks=pytest.mark.slow)], ids=["euler_a", "eta"])
def test_what_generate_writes_makes_the_image_again(keras_sd_command, files, tmp_path, changes):
    command = generate.generate
    names = {parameter.name for parameter in command.params}
    assert names <= VALUES.keys() | NO_VALUES.keys() | FILES
    given = {name: value for name, value in (VALUES | changes | added(files)).items() if name in names}
    code, _, errors = keras_sd_command(
        "generate", "--output", tmp_path / "first.png", *arguments_of(command, given)
    )
    assert code == 0, errors
    single = given | {"seed": 0}
    del single["num_images"]
    for name, wanted in (("first", given), ("first-1", single)):
        found = options_of(read_parameters(tmp_path / f"{name}.png"), files / "parts")
        vae = found.pop("vae")
        assert {"eta": 0.0, "vae": wanted["vae"]} | found == wanted and vae.endswith("other/vae")
        again = ("--output", tmp_path / f"{name}-again.png", *arguments_of(command, found | {"vae": vae}))
        code, _, errors = keras_sd_command("generate", *again)
        assert code == 0, errors
        np.testing.assert_array_equal(
            pixels(tmp_path / f"{name}.png"), pixels(tmp_path / f"{name}-again.png")
        )


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_what_walk_writes_makes_the_walk_again(keras_sd_command, files, tmp_path, suffix):
    command = generate.walk
    names = {parameter.name for parameter in command.params}
    assert names <= VALUES.keys() | NO_VALUES.keys() | FILES
    given = {name: value for name, value in (VALUES | added(files)).items() if name in names}
    given |= {"dtype": "float32"}
    if suffix == "png":
        del given["frame_rate"]  # of a GIF
    path, again = tmp_path / f"walk.{suffix}", tmp_path / f"again.{suffix}"
    code, _, errors = keras_sd_command("walk", "--output", path, *arguments_of(command, given))
    assert code == 0, errors
    found = options_of(read_parameters(path), files / "parts")
    usual = {"eta": 0.0, "dtype": "float32"}
    assert usual | found | {"vae": given["vae"]} == given
    code, _, errors = keras_sd_command("walk", "--output", again, *arguments_of(command, found))
    assert code == 0, errors
    np.testing.assert_array_equal(pixels(path), pixels(again))


def test_tags_of_prompts_and_of_the_web_interface(keras_sd_command, files, tmp_path):
    """A LoRA that a prompt called is found too; names and hashes are the web interface's."""
    options = ("--model", files / "model", "--num-inference-steps", 2, "--output", tmp_path / "a.png")
    folder = ("--lora-folder", files / "parts" / "a")
    code, _, errors = keras_sd_command("generate", "a <lora:ink:0.5> heart", *options, *folder)
    assert code == 0, errors
    parameters = read_parameters(tmp_path / "a.png")
    ink = files / "parts" / "a" / "ink.safetensors"
    tensors = ink.read_bytes()[8 + int.from_bytes(ink.read_bytes()[:8], "little") :]
    digits = hashlib.sha256(tensors).hexdigest()[:12]
    assert parameters["prompt"] == "a <lora:ink:0.5> heart"
    assert parameters["Lora hashes"] == f"ink: {digits}"
    found = options_of(parameters, files / "parts")
    assert found["loras"] == (f"{ink}:0.5",) and found["prompt"] == "a  heart"
    again = ("--output", tmp_path / "again.png", *arguments_of(generate.generate, found))
    assert keras_sd_command("generate", *again)[0] == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "again.png"))
    with pytest.raises(UserError, match=r"LoRA ink \(.*\): not in .*; give the folder"):
        options_of(parameters, tmp_path)
    with pytest.raises(UserError, match="Steps 'many': not as keras_sd writes it"):
        options_of(parameters | {"Steps": "many"}, files / "parts")
    with pytest.raises(UserError, match="Sampler 'Restart': not as"):
        options_of(parameters | {"Sampler": "Restart"}, files / "parts")
    save_file(load_file(ink), tmp_path / "ink.safetensors", {"sshs_model_hash": "0123456789abcdef"})
    assert lora_hash(tmp_path / "ink.safetensors") == "0123456789ab"


def test_tasks_with_images_say_their_own_settings(keras_sd_command, files, tmp_path):
    Image.new("RGB", (16, 24), "red").save(tmp_path / "image.png")
    Image.new("L", (16, 24), "white").save(tmp_path / "mask.png")
    options = (
        "--model",
        files / "model",
        "--num-inference-steps",
        4,
        "--guidance-rescale",
        0.5,
        "--strength",
        0.5,
    )
    for command, images in (("image-to-image", ["image"]), ("inpaint", ["image", "mask"])):
        names = {parameter.name for parameter in cli.cli.commands[command].params}
        assert names <= {*VALUES, *NO_VALUES, *FILES, "image", "mask"}
        paths = [tmp_path / f"{name}.png" for name in images]
        output = tmp_path / f"{command}.png"
        code, _, errors = keras_sd_command(command, *paths, "heart", *options, "--output", output)
        assert code == 0, errors
        found = options_of(read_parameters(output))
        assert (found["strength"], found["guidance_rescale"]) == (0.5, 0.5)


GOOD = {"prompt": "a"}


@pytest.mark.parametrize(
    "title, value",
    [
        *(("Size", value) for value in ("5", "1x2x3", "-1x-5", "99999x8", "axb")),
        *(("Steps", value) for value in ("-3", "0", "1.5", "", "9" * 9999)),
        *(("CFG scale", value) for value in ("nan", "-1", "inf")),
        *(("Seed", value) for value in ("-1", str(2**64))),
        *(("Guidance interval", value) for value in ("0.1", "0.5 to 0.5", "nan to 1", "0 to 0.5 to 1")),
        *(("Walk", value) for value in ("[]", "[3]", "x")),
        *(("Lora hashes", value) for value in ("x", "x: 12", "x: 123456789012", "x: 123456789012, y")),
        *(("Denoising strength", value) for value in ("0", "2", "nan")),
        ("Precision", "float8"),
        ("TI hashes", "y"),
        ("Eta", "2"),
        ("Frame rate", "0"),
        ("Frames", "0"),
        ("Batch size", "0"),
    ],
)
def test_settings_that_are_not_ours_are_refused_by_name(title, value):
    with pytest.raises(UserError, match=f"{title}.*: not ") as caught:
        options_of(GOOD | {title: value})
    assert len(str(caught.value)) < 300


def test_what_does_not_say_how_an_image_was_made():
    assert options_of(GOOD) == GOOD
    with pytest.raises(UserError, match="no prompt"):
        options_of({})
    for title in ("prompt", "Steps", "Lora hashes", "VAE hash"):
        with pytest.raises(UserError, match=f"{title} None: no text"):
            options_of(GOOD | {title: None})


def test_settings_that_are_not_known_are_named():
    settings = {"Hires upscale": "2", "VAE": "foo", "Model hash": "12", "Version": "v1"}
    with pytest.warns(UserWarning, match="^Hires upscale: '2', VAE: 'foo': not known here, and left out"):
        assert options_of(GOOD | settings) == GOOD


def test_a_tiny_strength_is_read_as_it_was_given():
    """The commands accept any number above 0."""
    assert options_of({"prompt": "a", "Denoising strength": "0.0000001"})["strength"] == 1e-7
