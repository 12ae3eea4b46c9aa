"""A run that begins from a LoRA file and takes its ranks and alphas."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.main import main as keras_sd
from keras_sd.cli.train.main import main
from keras_sd.training.lora import add_lora, save_lora
from keras_sd.weights.lora_arithmetic import read_plain_lora, read_products
from keras_sd.weights.lora_files import KOHYA_FILE
from tests import tiny

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image, a model of 16 pixels, and LoRAs of its UNet."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype="uint8")
    Image.fromarray(pixels).save(folder / "photos" / "0.png")
    (folder / "photos" / "0.txt").write_text(tiny.TEXTS[0])
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    for name, options in (
        ("one", {"conv_rank": 2, "conv_alpha": 5.0}),
        ("several", {"rank_by_block": {ATTENTION: 1}}),
        ("lokr", {"adapter": "lokr", "rank": 1}),
        ("dora", {"use_dora": True}),
        ("whole", {"adapter": "lokr", "rank": 64}),
    ):
        unet = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).unet
        add_lora(unet, options.pop("rank", 3), 6.0, **options)
        save_lora(folder / name, {"unet": unet})
    return folder


def arguments(folder, file, *options):
    values = [
        "lora",
        "--train-data-dir",
        folder / "photos",
        "--pretrained-model-name-or-path",
        folder / "model",
    ]
    values += ["--output-dir", folder / "run", "--max-train-steps", 1, "--train-batch-size", 1]
    values += ["--lr-warmup-steps", 0, "--evaluation-steps", 0, "--no-jit-compile", "--dim-from-weights"]
    return [*values, *(["--lora-weights", folder / file / KOHYA_FILE] if file else []), *options]


def test_ranks_and_alphas_are_those_of_the_file(folder, run_program):
    code, _, errors = run_program(main, *arguments(folder, "one"))
    assert code == 0, errors
    code, _, errors = run_program(keras_sd, "export", folder / "run" / "checkpoint-1", folder / "exported")
    assert code == 0, errors
    before, after, exported = (
        {name: (update.down.shape, update.alpha) for name, update in read_plain_lora(path).updates.items()}
        for path in (folder / place / KOHYA_FILE for place in ("one", "run/model", "exported"))
    )
    assert after == before and exported == before
    found = {(len(shape), shape[0], alpha) for shape, alpha in after.values()}
    assert {(2, 3, 6.0), (4, 2, 5.0)} <= found


@pytest.mark.parametrize(("kind", "option"), [("dora", "--use-dora"), ("lokr", "--adapter=lokr")])
def test_files_of_every_kind_have_ranks(folder, run_program, kind, option):
    code, _, errors = run_program(
        main, *arguments(folder, kind, option, "--output-dir", folder / kind / "run")
    )
    assert code == 0, errors
    before, after = (
        {name: (update.shape, update.alpha) for name, update in read_products(path).updates.items()}
        for path in (folder / kind / KOHYA_FILE, folder / kind / "run" / "model" / KOHYA_FILE)
    )
    assert after == before and before


def test_ranks_by_block_are_in_the_header(folder, run_program):
    values = arguments(folder, None, "--rank", 2, "--conv-rank", 1, "--rank-by-block", f"{ATTENTION}=3")
    values.remove("--dim-from-weights")
    code, _, errors = run_program(main, *values, "--output-dir", folder / "blocks")
    assert code == 0, errors
    file, again = folder / "blocks" / "model", folder / "blocks" / "again"
    code, _, errors = run_program(
        main, *arguments(folder, None, "--lora-weights", file, "--output-dir", again)
    )
    assert code == 0, errors
    before, after = (
        {name: (update.down.shape, update.alpha) for name, update in read_plain_lora(path).updates.items()}
        for path in (file, again / "model")
    )
    assert after == before and {shape[0] for shape, _ in after.values()} == {1, 2, 3}
    values = arguments(folder, None, "--lora-weights", file, "--rank", 2, "--conv-rank", 1)
    values.remove("--dim-from-weights")
    code, _, errors = run_program(main, *values, "--output-dir", folder / "blocks" / "refused")
    told = "has rank 3, and 2 is trained; the file has ranks 1, 2, 3: give --rank, --conv-rank and "
    assert code == 2 and f"{told}--rank-by-block" in errors, errors


@pytest.mark.parametrize(
    ("file", "options", "told"),
    [
        (None, (), "--dim-from-weights: no file is named; give --lora-weights, or leave it out"),
        (
            "one",
            ("--rank", 3),
            "--rank: has no effect with --dim-from-weights, which takes them from the file",
        ),
        ("several", (), "has layers of ranks 1 (alpha 6), 3 (alpha 6); give --rank and --rank-by-block"),
        ("whole", ("--adapter", "lokr"), "has whole matrices, which have no rank; give --rank"),
        ("lokr", (), "is LoKr, and LoRA is trained; give --adapter lokr, or use another LoRA"),
    ],
)
def test_what_has_no_single_rank_is_refused(folder, run_program, file, options, told):
    code, _, errors = run_program(
        main, *arguments(folder, file, *options, "--output-dir", folder / "refused")
    )
    assert code == 2 and told in errors, errors
