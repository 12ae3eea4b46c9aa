"""DoRA, LoCon, LoKr and rsLoRA in `dreambooth --lora` and `lcm`: trained, opened, and generated with."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli.train.main import main
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.weights.lora_files import KOHYA_FILE, PEFT_FILE, read_tensors
from tests import tiny
from tests.programs import run_python

BLOCKS = ("--rank-by-block", "down_blocks.0.attentions.0.transformer_blocks.0.attn1=1")
ADAPTERS = {
    "dora": ("--rank", 2, "--use-dora", "--use-rslora", "--conv-rank", 2, *BLOCKS),
    "lokr": ("--rank", 2, "--adapter", "lokr", "--conv-rank", 1, "--lokr-factor", 2),
}
METHODS = {
    "lcm": ("--train-data-dir",),
    "dreambooth": ("--lora", "--instance-prompt", "a sks toy", "--instance-data-dir"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos and a model of 16 pixels."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
        (folder / "photos" / f"{index}.txt").write_text(tiny.TEXTS[index])
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, method, adapter, output):
    values = [
        method,
        *METHODS[method],
        folder / "photos",
        "--pretrained-model-name-or-path",
        folder / "model",
    ]
    values += [
        "--output-dir",
        output,
        "--max-train-steps",
        2,
        "--train-batch-size",
        2,
        "--learning-rate",
        0.1,
    ]
    values += ["--lr-scheduler", "constant", "--lr-warmup-steps", 0, "--ema-decay", 0]
    return [*values, "--evaluation-steps", 0, "--no-jit-compile", *ADAPTERS[adapter]]


def image_of(folder, lora=None):
    pipeline = StableDiffusion.load(folder / "model", jit_compile=False)
    if lora is not None:
        pipeline.load_lora(lora)
    return pipeline.text_to_image("a sks toy", num_inference_steps=1, seed=0, progress=False)[0]


@pytest.fixture(scope="module")
def plain(folder):
    return image_of(folder)


@pytest.mark.parametrize(
    ("backend", "method", "adapter"),
    [
        *(("tensorflow", method, adapter) for method in METHODS for adapter in ADAPTERS),
        ("jax", "dreambooth", "dora"),
        ("jax", "lcm", "lokr"),
    ],
)
def test_adapters_are_trained_and_opened(folder, plain, tmp_path, run_program, backend, method, adapter):
    values = arguments(folder, method, adapter, tmp_path / "run")
    if backend == "jax":
        run_python(["-m", "keras_sd.train", *values])
    else:
        code, _, errors = run_program(main, *values)
        assert code == 0, errors
    files = {path.name for path in (tmp_path / "run" / "model").glob("*.safetensors")}
    assert files == {KOHYA_FILE} | ({PEFT_FILE} if adapter == "dora" else set())
    names = " ".join(read_tensors(tmp_path / "run" / "model" / KOHYA_FILE))
    assert ("dora_scale" in names) == (adapter == "dora") and ("lokr_w1" in names) == (adapter == "lokr")
    assert "resnets_0_conv1" in names
    images = [image_of(folder, tmp_path / "run" / "model" / file) for file in sorted(files)]
    for image in images:
        assert (image != plain).any()
        np.testing.assert_allclose(image.astype(int), images[0].astype(int), atol=1)
