"""The upscaler's examples, and a small one trained by the real command."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.main import train
from keras_sd.config import UNetConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.pipeline.upscaler import Upscaler
from keras_sd.training.architectures import LOW_RES_SCHEDULER, UPSCALER_SCHEDULER
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.super_resolution import degraded, upscaling_example
from tests import tiny

UNET = UNetConfig(
    sample_size=16,
    in_channels=6,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2,
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",) * 2,
    num_class_embeds=21,
    norm_num_groups=4,
)


def draw(image, seed, **options):
    arguments = {"factor": 2, "crop": 16, "noise_levels": 1} | options
    return upscaling_example(
        {"image": image},
        np.random.default_rng(seed),
        noise=NoiseDrawing(DiffusionSettings(), NoiseSchedule(UPSCALER_SCHEDULER)),
        low_res_schedule=NoiseSchedule(LOW_RES_SCHEDULER),
        **arguments,
    )


def test_degraded_picture_is_of_the_same_square():
    rows, columns = np.mgrid[:32, :32]
    image = np.stack([8 * rows, 8 * columns, np.zeros_like(rows)], axis=-1).astype("uint8")
    squares = set()
    for seed in range(20):
        drawn = draw(image, seed)
        assert drawn["samples"].shape == drawn["noise"].shape == drawn["channels"].shape == (16, 16, 3)
        assert drawn["class_labels"] == 0
        # Noise of the lowest level (1 %), and what filters do.
        seen = (drawn["channels"] + 1) * 127.5
        assert np.abs(seen - drawn["samples"]).mean() < 3
        squares.add(tuple(drawn["samples"][0, 0]))
    assert len(squares) > 10


def test_level_says_how_much_noise_is_on_the_degraded_picture():
    image = np.full((16, 16, 3), 128, "uint8")
    drawn = [draw(image, seed, noise_levels=101) for seed in range(50)]
    levels = np.array([example["class_labels"] for example in drawn])
    deviations = np.array([example["channels"].std() for example in drawn])
    np.testing.assert_allclose(deviations, NoiseSchedule(LOW_RES_SCHEDULER).noise_rates[levels], rtol=0.15)
    assert np.median(levels) < 40 < 80 < levels.max() <= 100


def test_degraded_pictures_keep_their_mean_and_lose_detail():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8")
    made = [degraded(image, 4, np.random.default_rng(seed)) for seed in range(10)]
    for picture in made:
        assert picture.shape == image.shape
        assert abs(picture.mean(dtype="float64") - image.mean()) < 8 and picture.std() < 0.7 * image.std()
    assert len({picture.tobytes() for picture in made}) > 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaler")
    generator = np.random.default_rng(0)
    for split in ("images", "images/validation"):
        (folder / split).mkdir()
        for index in range(12):
            blocks = generator.integers(0, 256, (4, 4, 3), dtype="uint8").repeat(4, 0).repeat(4, 1)
            Image.fromarray(blocks).save(folder / split / f"{index}.png")
    UNET.save(folder / "unet.json")
    return folder


def command(folder, **options):
    arguments = {
        "unet-config": folder / "unet.json",
        "train-data-dir": folder / "images",
        "train-batch-size": 8,
        "crop-size": 8,
        "max-train-steps": 40,
        "evaluation-steps": 40,
        "num-inference-steps": 2,
        "validation-images": 4,
        "learning-rate": 5e-3,
        "lr-warmup-steps": 0,
        "output-dir": folder / "run",
    } | options
    line = [f"--{name}={value}" for name, value in arguments.items()]
    train.main(["super-resolution", "--no-jit-compile", *line], standalone_mode=False)


def test_upscaler_is_trained_and_opens(folder):
    command(folder)
    records = [json.loads(line) for line in (folder / "run/logs/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    figures = next(record for record in records if "psnr" in record)
    assert figures["lanczos_edge_error"] > 0 and np.isfinite(figures["edge_error"])
    assert (folder / "run/samples/step-000040.png").is_file()

    upscaler = Upscaler.load(folder / "run/model", jit_compile=False)
    small = np.random.default_rng(1).integers(0, 256, (3, 6, 10, 3), dtype="uint8")
    made = upscaler.upscale(small, num_inference_steps=2)
    assert made.shape == (3, 12, 20, 3)
    # An image is the same alone or in a batch.
    alone = upscaler.upscale(small[1], num_inference_steps=2, seed=1)
    assert np.abs(alone[0].astype(int) - made[1]).max() <= 1


def test_squares_that_do_not_fit_and_other_models_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="--crop-size 7"):
        command(folder, **{"crop-size": 7, "output-dir": tmp_path / "run"})
    with pytest.raises(UserError, match="6 channels"):
        Upscaler(tiny.pipeline(jit_compile=False).unet, UPSCALER_SCHEDULER, LOW_RES_SCHEDULER)
