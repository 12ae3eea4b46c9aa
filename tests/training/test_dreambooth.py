"""DreamBooth: pairs of subject and class, class images, what is trained, and its command."""

import sys
import warnings

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.program import run_command
from keras_sd.cli.train.dreambooth import dreambooth
from keras_sd.errors import UserError
from keras_sd.files.image_files import read_parameters
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.dreambooth import (
    dreambooth_example,
    generate_class_images,
    read_images,
    train_dreambooth,
)
from keras_sd.training.lora import add_lora
from keras_sd.training.objectives import DiffusionObjective, PriorPreservationObjective
from keras_sd.training.run_folder import release_output_dir
from keras_sd.training.text_to_image import diffusion_example
from keras_sd.training.trainer import Settings
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.training.test_trainer import copy_as_of_step

STEPS = 4
DRAWING = {"noise": NoiseDrawing(DiffusionSettings(), 1000), "condition": "context"}


def write_pictures(folder, count, seed):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), "uint8")).save(folder / f"{index}.png")
    return folder


def pipeline():
    return tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False, batch_size=2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images") / "subject", 3, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images") / "class", 2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipeline().save(folder)
    return folder


def encoded_example(value):
    """An encoded image all of whose numbers are `value`, without a spread."""
    return {
        "mean": np.full((4, 4, 4), value, "float32"),
        "standard_deviation": np.zeros((4, 4, 4), "float32"),
        "contexts": np.full((1, 12, 16), value, "float32"),
        "empty_context": np.full((12, 16), -1, "float32"),
    }


def test_subject_is_paired_with_any_picture_of_its_class():
    classes = [encoded_example(value) for value in (1, 2, 3)]
    drawn = [
        dreambooth_example(encoded_example(0), np.random.default_rng(seed), classes, **DRAWING)
        for seed in range(60)
    ]
    shapes = {"samples": (2, 4, 4, 4), "noise": (2, 4, 4, 4), "timesteps": (2,), "context": (2, 12, 16)}
    assert {name: array.shape for name, array in drawn[0].items()} == shapes
    for pair in drawn:
        assert (pair["samples"][0] == 0).all() and (pair["context"][0] == 0).all()
        assert (pair["samples"][1] == pair["context"][1, 0, 0]).all()
    chosen = [int(pair["samples"][1, 0, 0, 0]) for pair in drawn]
    assert all(chosen.count(value) >= 10 for value in (1, 2, 3))
    for name in ("noise", "timesteps"):
        left, right = (np.stack([pair[name][half] for pair in drawn]).ravel() for half in (0, 1))
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.3
    # All of it comes from the generator, and the subject's half as without a class.
    again = dreambooth_example(encoded_example(0), np.random.default_rng(7), classes, **DRAWING)
    alone = dreambooth_example(encoded_example(0), np.random.default_rng(7), **DRAWING)
    plain = diffusion_example(encoded_example(0), np.random.default_rng(7), **DRAWING)
    for name, array in again.items():
        np.testing.assert_array_equal(array, drawn[7][name])
        np.testing.assert_array_equal(array[0], alone[name])
        np.testing.assert_array_equal(alone[name], plain[name])


def test_loss_is_that_of_the_subject_and_a_share_of_that_of_the_class():
    sd, generator = pipeline(), np.random.default_rng(0)
    pairs = [
        dreambooth_example(encoded_example(0.5), generator, [encoded_example(-0.5)], **DRAWING)
        for _ in range(3)
    ]
    batch = {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}
    parts = (sd.unet, sd._denoiser.schedule, DiffusionSettings(5.0))
    losses = [
        np.asarray(DiffusionObjective(*parts)({name: array[:, half] for name, array in batch.items()}))
        for half in (0, 1)
    ]
    both = np.asarray(PriorPreservationObjective(*parts, prior_loss_weight=0.3)(batch))
    assert abs(losses[0].mean() - losses[1].mean()) > 0.01
    assert both.mean() == pytest.approx(losses[0].mean() + 0.3 * losses[1].mean(), rel=1e-5)


def test_only_missing_class_pictures_are_drawn(tmp_path):
    sd = pipeline()

    def generate(count):
        generate_class_images(
            sd, tmp_path, "a (red) heart", count, num_inference_steps=2, guidance_scale=3.0, seed=40
        )
        return {path.name: path for path in sorted(tmp_path.glob("*.png"))}

    files = generate(5)
    assert list(files) == [f"class-0000{index}.png" for index in range(5)]
    parameters = [read_parameters(path) for path in files.values()]
    assert [one["Seed"] for one in parameters] == ["40", "41", "42", "43", "44"]
    assert {(one["prompt"], one["Steps"], one["CFG scale"]) for one in parameters} == {
        ("a (red) heart", "2", "3")
    }
    pixels = {name: np.asarray(Image.open(path)).astype(int) for name, path in files.items()}
    assert np.abs(pixels["class-00001.png"] - pixels["class-00004.png"]).max() > 10

    # As after a kill, and with an image that was put there by hand.
    for name in ("class-00001.png", "class-00004.png"):
        files[name].unlink()
    files["class-00003.png"].rename(tmp_path / "own.png")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in ("class-00000.png", "own.png")}
    files = generate(5)
    assert list(files) == [f"class-0000{index}.png" for index in range(4)] + ["own.png"]
    assert not list(tmp_path.glob(".*"))
    for name in ("class-00001.png", "class-00003.png"):
        np.testing.assert_allclose(np.asarray(Image.open(files[name])), pixels[name], atol=1)
    assert kept == {name: files[name].stat().st_mtime_ns for name in kept}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    generate(3)  # fewer than there are
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def largest_change(left, right):
    assert left.keys() == right.keys()
    return max(np.abs(left[name] - right[name]).max() for name in left)


def short_run(folder, resume=None):
    """Settings of a run of `STEPS` steps with a checkpoint in the middle."""
    return Settings(
        output_dir=folder,
        max_train_steps=STEPS,
        train_batch_size=2,
        learning_rate=1e-2,
        lr_warmup_steps=0,
        checkpointing_steps=STEPS // 2,
        jit_compile=False,
        resume_from_checkpoint=resume,
    )


def train(folder, subject, others, resume=None):
    """Trains low-rank updates of a tiny UNet."""
    settings = short_run(folder, resume)
    keras.utils.set_random_seed(0)
    sd = pipeline()
    add_lora(sd.unet, 2, 2)

    finished = train_dreambooth(
        settings,
        sd,
        read_images(subject, "a sks heart", 16),
        read_images(others, "a heart", 16) if others else [],
    )
    return sd, finished


def test_low_rank_updates_resume_to_the_bit_and_leave_the_model_as_it_is(tmp_path, subject, others):
    sd, finished = train(tmp_path / "whole", subject, others)
    assert finished
    copy_as_of_step(2, tmp_path / "whole", tmp_path / "parts")
    assert train(tmp_path / "parts", subject, others, resume="latest")[1]
    for group in ("weights", "ema", "optimizer"):
        whole, parts = (
            load_file(tmp_path / name / f"checkpoint-{STEPS}" / f"{group}.safetensors")
            for name in ("whole", "parts")
        )
        assert_equal(whole, parts)
    with pytest.raises(UserError, match="another number of images of the class"):
        train(tmp_path / "parts", subject, None, resume="latest")

    before, state = pipeline(), torch_state(sd.unet)
    updates = {name for name in state if ".lora_" in name}
    assert updates and all(np.abs(state[name]).max() > 0 for name in updates)
    assert_equal(
        {name: array for name, array in state.items() if name not in updates}, torch_state(before.unet)
    )
    for part in ("text_encoder", "vae"):
        assert_equal(torch_state(getattr(sd, part)), torch_state(getattr(before, part)))


def command(model, subject, output, *options):
    """Runs the command as the command line does."""
    arguments = ["--pretrained-model-name-or-path", model, "--instance-data-dir", subject]
    arguments += ["--instance-prompt", "a sks heart", "--output-dir", output, "--max-train-steps", 2]
    arguments += ["--train-batch-size", 2, "--num-inference-steps", 2, "--num-validation-images", 2]
    arguments += ["--sample-batch-size", 2, "--learning-rate", "1e-2", "--no-jit-compile", *options]
    dreambooth.main(list(map(str, arguments)), standalone_mode=False)


PRIOR = ("--with-prior-preservation", "--class-prompt", "a heart")


def test_command_draws_the_class_and_trains_both_networks(tmp_path, model, subject):
    command(model, subject, tmp_path, *PRIOR, "--num-class-images", 3, "--train-text-encoder")
    assert len(list((tmp_path / "class-images").glob("class-*.png"))) == 3
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    before, after = pipeline(), StableDiffusion.load(tmp_path / "model")
    for name in ("unet", "text_encoder"):
        assert largest_change(*(torch_state(getattr(sd, name)) for sd in (before, after))) > 1e-3
    assert_equal(torch_state(before.vae), torch_state(after.vae))


def test_command_writes_low_rank_updates_and_no_second_run_over_them(tmp_path, model, subject):
    command(model, subject, tmp_path, "--lora", "--rank", 2, "--train-text-encoder")
    tensors = load_file(tmp_path / "model" / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder"}
    assert all(2 in array.shape and np.abs(array).max() > 0 for array in tensors.values())
    assert not (tmp_path / "model" / "unet").exists()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="earlier run.*--resume-from-checkpoint latest"):
        command(model, subject, tmp_path, "--lora", "--rank", 2)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def refused(monkeypatch, capsys, *arguments):
    """The line that the real command ends with, which leaves with exit code 2."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["dreambooth", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(dreambooth, "dreambooth")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and lines[-1].startswith("dreambooth: error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1]


def test_pictures_that_cannot_be_used_are_refused_by_name(tmp_path, subject, monkeypatch, capsys):
    empty, broken = tmp_path / "empty", write_pictures(tmp_path / "broken", 20, 0)
    empty.mkdir()
    picture = broken / "13.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    run = tmp_path / "run"
    common = ("--instance-prompt", "a sks heart", "--output-dir", run, "--instance-data-dir")
    cases = [
        ((tmp_path / "missing",), "missing: no such folder"),
        ((empty,), "empty: no images"),
        ((broken,), "13.png: truncated"),
        ((subject, *PRIOR, "--class-data-dir", broken), "13.png: truncated"),
        ((subject, *PRIOR, "--class-data-dir", picture), "13.png: a file, not a folder"),
        ((subject, *PRIOR, "--class-data-dir", subject / "class"), "keep them apart"),
    ]
    for arguments, told in cases:
        assert told in refused(monkeypatch, capsys, *common, *arguments)
    assert not run.exists() and not (subject / "class").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--with-prior-preservation"], "--class-prompt"),
        (["--num-class-images", "0"], "--num-class-images"),
        (["--lora", "--rank", "0"], "--rank"),
        (["--rank", "4"], "without --lora"),
        (["--lora-alpha", "4"], "without --lora"),
        (["--pretrained-model-name-or-path", "unheard"], "unheard"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, subject, monkeypatch, capsys, arguments, told):
    run = tmp_path / "run"
    common = ("--instance-data-dir", subject, "--instance-prompt", "a sks heart", "--output-dir", run)
    assert told in refused(monkeypatch, capsys, *common, *arguments)
    release_output_dir(run)  # as at the end of the process
    assert not run.exists()


def test_prompts_that_are_not_given_or_not_used_are_told(tmp_path, subject, monkeypatch, capsys):
    assert "--instance-prompt" in refused(monkeypatch, capsys, "--instance-data-dir", subject)
    with pytest.raises(UserError, match="without --with-prior-preservation"):
        command("unheard", subject, tmp_path, "--class-prompt", "a heart")
