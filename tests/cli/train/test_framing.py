"""Training commands on photos of mixed shapes: buckets, resolutions, crops and flips, on both backends."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import train
from tests import tiny
from tests.programs import Program

# Height and width; with three buckets of 32 pixels, four images in each.
SIZES = [(40, 80), (50, 90), (48, 80), (44, 88), (80, 40), (90, 50), (80, 48), (88, 44), (50, 50), (60, 66)]
SIZES += [(70, 64), (40, 44)]
LINE = "buckets for batches of 2, width x height: images: 24 x 40: 4, 32 x 32: 4, 40 x 24: 4; "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of mixed shapes with captions, and a model of 16 pixels."""
    folder = tmp_path_factory.mktemp("framing")
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "photos" / f"{index:02}.png")
        (folder / "photos" / f"{index:02}.txt").write_text(tiny.TEXTS[index % len(tiny.TEXTS)])
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, output, *options, method="lora"):
    of_model = ["--pretrained-model-name-or-path", folder / "model"] if method == "lora" else []
    return [
        *("train", method, "--train-data-dir", folder / "photos", "--output-dir", folder / output),
        *(*of_model, "--train-batch-size", 2, "--learning-rate", 1e-2),
        *("--lr-scheduler", "constant", "--lr-warmup-steps", 0, "--checkpointing-steps", 100),
        *("--evaluation-steps", 0, *options),
    ]


def run_here(monkeypatch, *given):
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
    try:
        run_command(train, "train")
    except SystemExit as end:
        return end.code
    return 0


BUCKETS = ("--resolution", 32, "--aspect-ratio-buckets", 3)
STEPS = 7


def weights(folder, output):
    return load_file(folder / output / "model" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def runs(folder):
    """LoRA on TensorFlow; on JAX on two devices, and in two parts on one."""
    evaluated = ("--evaluation-steps", STEPS, "--kid-images", 0, "--num-inference-steps", 1)
    printed = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        import contextlib
        import io

        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            given = arguments(folder, "tensorflow", *BUCKETS, "--max-train-steps", STEPS, *evaluated)
            assert run_here(monkeypatch, *given) == 0, errors.getvalue()
        printed["tensorflow"] = errors.getvalue()
    two = ("--distribution", "data", "--max-train-steps", STEPS)
    programs = {
        "devices": Program(
            ["-m", "keras_sd.train", *arguments(folder, "devices", *BUCKETS, *two)[1:]],
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        ),
        "resumed": Program(
            ["-m", "keras_sd.train", *arguments(folder, "resumed", *BUCKETS, "--max-train-steps", 3)[1:]]
        ),
    }
    done = {name: program.finish() for name, program in programs.items()}
    more = ("--max-train-steps", STEPS, "--resume-from-checkpoint", "latest")
    again = ["-m", "keras_sd.train", *arguments(folder, "resumed", *BUCKETS, *more)[1:]]
    done["again"] = Program(again).finish()
    for name, result in done.items():
        assert result.returncode == 0, result.stderr
        printed[name] = result.stderr
    return printed


def test_buckets_train_the_same_weights_on_both_backends_and_on_two_devices(folder, runs):
    expected = weights(folder, "tensorflow")
    assert sum(np.abs(array).max() > 1e-3 for array in expected.values()) > len(expected) / 2
    for output in ("devices", "resumed"):
        for key, array in weights(folder, output).items():
            np.testing.assert_allclose(array, expected[key], atol=2e-3, err_msg=f"{output}: {key}")


def test_a_line_tells_how_images_fall_into_buckets(runs):
    for printed in runs.values():
        assert LINE in printed and "% of the images' area is cropped away" in printed


def test_samples_are_squares_of_the_resolution(folder, runs):
    (sample,) = (folder / "tensorflow" / "samples").glob("*.png")
    with Image.open(sample) as image:
        assert image.width > 4 * 2 * 32  # a grid of four columns, each pixel twice as large


def test_framing_is_part_of_a_runs_identity(folder, runs, monkeypatch, capsys):
    for options, name in (
        (("--resolution", 32), "aspect_ratio_buckets"),
        ((*BUCKETS[2:], "--resolution", 24), "resolution"),
        ((*BUCKETS, "--interpolation", "box"), "interpolation"),
    ):
        more = ("--max-train-steps", 9, "--resume-from-checkpoint", "latest")
        assert run_here(monkeypatch, *arguments(folder, "resumed", *options, *more)) == 2
        assert f"made with another {name}" in capsys.readouterr().err.splitlines()[-1]


PIXEL_UNET = tiny.ONE_LEVEL_PIXEL_UNET


def test_pixel_models_train_on_buckets_with_random_crops_and_flips(folder, monkeypatch, capsys):
    (folder / "unet.json").write_text(json.dumps(PIXEL_UNET.to_dict()))
    options = ("--unet-config", folder / "unet.json", "--resolution", 16, "--enable-bucket")
    options += ("--no-center-crop", "--random-flip", "--interpolation", "bicubic", "--max-train-steps", 4)
    assert run_here(monkeypatch, *arguments(folder, "ddim", *options, method="ddim")) == 0
    assert "buckets for batches of 2, width x height: images: " in capsys.readouterr().err
    config = json.loads((folder / "ddim" / "model" / "unet" / "config.json").read_text())
    assert config["sample_size"] == 16


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", ("--resolution", 20), "20 is not a multiple of 8"),
        ("lora", ("--resolution", 64, "--aspect-ratio-buckets", 3), "enlarge them by --bucket-upscale"),
        ("lora", ("--bucket-upscale",), "--bucket-upscale: has no effect without --aspect-ratio-buckets"),
        ("lora", ("--no-center-crop", "--cache-latents", "disk"), "--cache-latents disk: keeps one crop"),
        ("clip", ("--resolution", 32), "--resolution: has no effect as the image encoder has one size"),
        ("clip", ("--enable-bucket",), "--enable-bucket: has no effect as the image encoder"),
        ("super-resolution", ("--aspect-ratio-buckets", 3), "--aspect-ratio-buckets: has no effect as this"),
        ("super-resolution", ("--random-crop", 8), "--random-crop: is called --crop-size now"),
        ("vae", ("--random-crop=8",), "--random-crop: is called --crop-size now"),
        ("vae", ("--crop-size", 8, "--enable-bucket"), "--enable-bucket: has no effect with --crop-size"),
    ],
)
def test_options_without_effect_are_refused_by_name(folder, monkeypatch, capsys, method, options, message):
    given = arguments(folder, "refused", *options, "--max-train-steps", 2, method=method)
    assert run_here(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("model", "more"), [("model", ("--resolution", 64)), ("emoji", ())])
def test_small_images_are_refused_before_a_model_is_opened(folder, monkeypatch, capsys, model, more):
    """Those of the model's own resolution, too, which its configs tell."""
    given = arguments(folder, "small", "--aspect-ratio-buckets", 3, *more)
    if model == "emoji":
        given[given.index("--pretrained-model-name-or-path") + 1] = model
    assert run_here(monkeypatch, *given) == 2
    told = capsys.readouterr().err
    assert "smaller than their bucket" in told.splitlines()[-1] and "opening" not in told


def test_a_share_that_nothing_measures_is_refused(folder, monkeypatch, capsys):
    more = ("--validation-split", 0.5, "--max-train-steps", 3)
    assert run_here(monkeypatch, *arguments(folder, "split", *more)) == 2
    line = "--validation-split: has no effect without --validation-steps or --evaluation-steps"
    assert line in capsys.readouterr().err.splitlines()[-1]
