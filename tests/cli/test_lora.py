"""`keras-sd lora`: merging into a LoRA and into a model, lower ranks, and what two models differ by."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.cli.main import main
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_kohya
from tests import tiny

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = f"lora_unet_{LAYER.replace('.', '_')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("loras"), np.random.default_rng(0)
    tiny.pipeline(jit_compile=False).save(folder / "model")
    for name, rank in (("a", 2), ("b", 1)):
        down, up = (generator.standard_normal(shape, dtype="float32") for shape in ((rank, 8), (8, rank)))
        write_kohya(folder / f"{name}.safetensors", {NAME: LowRank(down, up, 1.0)})
    return folder


def product(path):
    tensors = load_file(path)
    down, up, alpha = (tensors[f"{NAME}.{key}"] for key in ("lora_down.weight", "lora_up.weight", "alpha"))
    return float(alpha) / len(down) * up @ down


def test_merge_resize_and_extract(folder, run_program):
    a, b, both = (folder / f"{name}.safetensors" for name in ("a", "b", "both"))
    assert run_program(main, "lora", "merge", f"{a}:0.5", b, "--output", both)[0] == 0
    wanted = 0.5 * product(a) + product(b)
    np.testing.assert_allclose(product(both), wanted, atol=1e-5)

    code, output, errors = run_program(main, "lora", "merge", f"{a}:0.5", b, "--model", folder / "model",
                                       "--output", folder / "merged")  # fmt: skip
    assert code == 0, errors
    kernels = [
        load_file(folder / name / "unet" / "diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"]
        for name in ("model", "merged")
    ]
    np.testing.assert_allclose(kernels[1] - kernels[0], wanted, atol=1e-5)

    code, output, errors = run_program(
        main, "lora", "extract", folder / "model", folder / "merged", folder / "difference.safetensors",
        "--rank", 3,
    )  # fmt: skip
    assert code == 0, errors
    assert "1 layers, rank 3" in output
    np.testing.assert_allclose(product(folder / "difference.safetensors"), wanted, atol=1e-5)

    code, output, errors = run_program(
        main, "lora", "resize", both, folder / "small.safetensors", "--rank", 1
    )
    assert code == 0 and "rank 1, relative error" in output
    values = np.linalg.svd(wanted, compute_uv=False)
    assert f"{np.sqrt((values[1:] ** 2).sum() / (values**2).sum()):.1%}" in output
    assert np.linalg.matrix_rank(product(folder / "small.safetensors")) == 1


def test_bad_input_ends_in_one_line(folder, run_program, tmp_path):
    a, model = folder / "a.safetensors", folder / "model"
    lokr, new = tmp_path / "lokr.safetensors", tmp_path / "new.safetensors"
    ones = np.ones((2, 2), "float32")
    save_file({f"{NAME}.lokr_w1": ones, f"{NAME}.lokr_w2": np.ones((4, 4), "float32")}, lokr)
    for arguments, fault in (
        (("merge", lokr, "--output", new), "only LoRA and LoCon can be computed with"),
        (("merge", f"{a}:nan", "--output", new), "not a finite number"),
        (("merge", f"{a}:1e39", "--output", new), "1e+39 is not a finite number in float32"),
        (("merge", f"{a}:x", "--output", new), "the weight 'x' is no number; give one, such as 0.8"),
        (("merge", tmp_path / "none", "--output", new), "no such LoRA"),
        (("merge", a, "--output", a), "exists"),
        (("merge", a, "--model", model, "--rank", 2, "--output", new), "--rank: has no effect with --model"),
        (("resize", a, new), "--rank: missing"),
        (("resize", a, tmp_path / "new.txt", "--rank", 2), "new.txt"),
        (("extract", model, model, new), "is the same as"),
    ):
        code, _, errors = run_program(main, "lora", *arguments)
        assert code == 2 and fault in errors and len(errors.strip().splitlines()) == 1, errors
    assert not new.exists()


def test_a_lokr_merges_into_a_model(folder, run_program, tmp_path):
    lokr = tmp_path / "lokr.safetensors"
    w1, w2 = np.ones((2, 2), "float32"), np.arange(16, dtype="float32").reshape(4, 4)
    save_file({f"{NAME}.lokr_w1": w1, f"{NAME}.lokr_w2": w2}, lokr)
    command = ("lora", "merge", f"{lokr}:0.5", "--model", folder / "model", "--output", tmp_path / "merged")
    assert run_program(main, *command)[0] == 0
    kernels = [
        load_file(place / "unet" / "diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"]
        for place in (folder / "model", tmp_path / "merged")
    ]
    np.testing.assert_allclose(kernels[1] - kernels[0], 0.5 * np.kron(w1, w2), atol=1e-5)
