"""What forbids to resume a run is told before a model is opened; what changes is told when it goes on."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.main import main
from tests import tiny

VALIDATION = ("--validation-steps", 2, "--validation-examples", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos, a model of 16 pixels, and a run on them; `closed` is the same model without its weights."""
    folder = tmp_path_factory.mktemp("resumption")
    (folder / "photos").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
        (folder / "photos" / f"{index}.txt").write_text(tiny.TEXTS[index])
    shutil.copytree(folder / "photos", folder / "others", copy_function=shutil.copy)  # with other times
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    shutil.copytree(folder / "model", folder / "closed")
    for path in folder.glob("closed/*/*.safetensors"):
        path.unlink()
    assert train(folder, "model", "--max-train-steps", 2, *VALIDATION) == 0
    return folder


def train(folder, model, *options):
    values = [
        "lora",
        "--train-data-dir",
        folder / "photos",
        "--pretrained-model-name-or-path",
        folder / model,
    ]
    values += ["--output-dir", folder / "run", "--train-batch-size", 2, "--lr-warmup-steps", 0, "--rank", 2]
    values += ["--checkpointing-steps", 1, "--evaluation-steps", 0, "--no-jit-compile", *options]
    sys.argv = ["program", *map(str, values)]
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


OTHERS = [
    (("--seed", 1), "seed (0 there and 1 here)"),
    (("--rank", 4), "rank (2 there and 4 here)"),
    (("--use-rslora",), "use_rslora (false there and true here)"),
    (("--use-dora",), "use_dora (false there and true here)"),
    (("--conv-rank", 2), "conv_rank (null there and 2 here)"),
    (("--rank-by-block", "mid_block=1"), "rank_by_block"),
    (("--adapter", "lokr"), 'adapter ("lora" there and "lokr" here)'),
    (("--lora-layers", "all"), "lora_layers"),
    (("--train-text-encoder",), "trained"),
    (("--snr-gamma", 5), "snr_gamma (null there and 5.0 here)"),
    (("--noise-offset", 0.1), "noise_offset (0.0 there and 0.1 here)"),
    (("--proportion-empty-prompts", 0.2), "proportion_empty_prompts (0.1 there and 0.2 here)"),
    (("--cache-dtype", "float16"), 'cache_dtype ("float32" there and "float16" here)'),
    (("--clip-skip", 2), "clip_skip (1 there and 2 here)"),
    (("--resolution", 32), "resolution (16 there and 32 here)"),
    (("--random-flip",), "random_flip (false there and true here)"),
    (("--validation-split", 0.5, *VALIDATION), "images, masks or captions"),
    (("--max-train-steps", 1), "--max-train-steps 1: "),
    (("--post-hoc-ema",), "has no averages for --post-hoc-ema"),
]


@pytest.mark.parametrize(("options", "told"), OTHERS, ids=lambda value: str(value[0]))
def test_what_forbids_to_resume_is_told_before_the_model_is_opened(folder, capfd, options, told):
    steps = () if "--max-train-steps" in options else ("--max-train-steps", 4)
    code = train(folder, "closed", "--resume-from-checkpoint", "latest", *steps, *options)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and told in last and "opening" not in last, last


def test_other_images_are_told_before_the_model_is_opened(folder, capfd):
    more = ("--train-data-dir", folder / "others", "--max-train-steps", 4)
    code = train(folder, "closed", "--resume-from-checkpoint", "latest", *more)
    errors = capfd.readouterr().err
    assert code == 2 and "made with other images, masks or captions" in errors
    assert f"those in {folder / 'run' / 'options.toml'}, or choose another" in errors


def test_another_network_is_told_before_the_model_is_opened(folder, capfd):
    more = ("--resume-from-checkpoint", "latest", "--max-train-steps", 4)
    tiny.pipeline().save(folder / "another")
    for path in folder.glob("another/*/*.safetensors"):
        path.unlink()
    assert train(folder, "another", *more) == 2
    assert "made with another config of the network" in capfd.readouterr().err


def test_changed_settings_are_told_where_the_run_goes_on(folder, capfd):
    changes = ("--max-train-steps", 3, "--validation-steps", 3, "--validation-examples", 3)
    more = (
        "--checkpoints-total-limit",
        1,
        "--evaluation-steps",
        3,
        "--kid-images",
        0,
        "--num-inference-steps",
        2,
    )
    assert train(folder, "model", "--resume-from-checkpoint", "latest", *changes, *more) == 0
    told = capfd.readouterr().err
    line = next(line for line in told.splitlines() if line.startswith("resuming after step 2 with changes: "))
    for name, value, before in (
        ("max_train_steps", 3, 2),
        ("evaluation_steps", 3, 0),
        ("validation_steps", 3, 2),
        ("checkpoints_total_limit", 1, 2),
    ):
        assert f"{name} is {value}, it was {before}" in line
    assert "checkpointing_steps" not in line and "report_to" not in line
    assert (
        "warning: evaluations are not those before the resumed step: --num-inference-steps 2, before 20; "
        "--kid-images 0, before 100; --validation-examples 3, before 2\n"
    ) in told
