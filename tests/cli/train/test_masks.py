"""A masked loss through the real commands: white masks change nothing, others do, and faults are one line."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.encode import encode
from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import main
from tests import tiny
from tests.programs import Program
from tests.training.test_stored_encodings import write_images

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, masks that are white, and others that are half black."""
    folder = tmp_path_factory.mktemp("masks")
    write_images(folder / "images", 6)
    for name in ("white", "half"):
        (folder / name).mkdir()
    for path in (folder / "images").glob("*.png"):
        image = Image.open(path)
        Image.new("L", image.size, 255).save(folder / "white" / path.name)
        half = np.zeros(image.size[::-1], "uint8")
        half[:, : image.width // 2] = 255
        Image.fromarray(half).save(folder / "half" / path.name)
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def arguments(folder, output, method, *more):
    images = "--instance-data-dir" if method == "dreambooth" else "--train-data-dir"
    values = [method, images, folder / "images", "--output-dir", output, "--evaluation-steps", 0]
    values += ["--pretrained-model-name-or-path", folder / "model", "--max-train-steps", STEPS]
    values += ["--train-batch-size", 2, "--learning-rate", 0.01, "--lr-warmup-steps", 0]
    values += {
        "lora": ["--rank", 2, "--lr-scheduler", "constant"],
        "dreambooth": ["--instance-prompt", "sks"],
        "textual-inversion": ["--placeholder-token", "<x>"],
    }[method]
    return [*map(str, values), *map(str, more)]


def weights(output):
    return load_file(output / f"checkpoint-{STEPS}" / "weights.safetensors")


def are_same(*outputs):
    one, other = map(weights, outputs)
    return all((other[name] == array).all() for name, array in one.items())


@pytest.mark.parametrize("method", ["lora", "dreambooth", "textual-inversion"])
def test_white_masks_change_nothing_and_others_do(folder, tmp_path, run_program, method):
    runs = {
        "none": [],
        "white": ["--mask-data-dir", folder / "white", "--cache-latents", "disk", "--cache-dir", tmp_path],
        "half": ["--mask-data-dir", folder / "half"],
    }
    for name, more in runs.items():
        values = arguments(folder, tmp_path / name, method, "--no-jit-compile", *more)
        code, _, told = run_program(main, *values)
        assert code == 0, told
    assert are_same(tmp_path / "none", tmp_path / "white")
    assert not are_same(tmp_path / "none", tmp_path / "half")


def test_resumed_on_jax(folder, tmp_path):
    masks = ["--mask-data-dir", folder / "half", "--cache-latents", "off", "--no-center-crop"]
    values = arguments(folder, tmp_path / "resumed", "lora", *masks, "--max-train-steps", 2)
    first = Program(["-m", "keras_sd.train", *values])
    whole = Program(["-m", "keras_sd.train", *arguments(folder, tmp_path / "whole", "lora", *masks)])
    for one in (first, whole):
        done = one.finish()
        assert done.returncode == 0, done.stderr
    values = arguments(folder, tmp_path / "resumed", "lora", *masks, "--resume-from-checkpoint", "latest")
    done = Program(["-m", "keras_sd.train", *values]).finish()
    assert done.returncode == 0, done.stderr
    assert are_same(tmp_path / "whole", tmp_path / "resumed")


def refusal(run_program, *values):
    code, _, told = run_program(main, *values)
    assert code == 2, told
    return told


def test_refused(folder, tmp_path, run_program):
    def told(*more, method="lora"):
        return refusal(run_program, *arguments(folder, tmp_path / "run", method, *more))

    assert "--unmasked-weight 0.5: has no effect without --alpha-mask or --mask-data-dir" in told(
        "--unmasked-weight", 0.5
    )
    assert "--alpha-mask is given too" in told("--alpha-mask", "--mask-data-dir", folder / "white")
    assert "none: no such folder of masks; correct its name" in told("--mask-data-dir", tmp_path / "none")
    assert "has an alpha channel; leave it out" in told("--alpha-mask")
    small = tmp_path / "small"
    small.mkdir()
    Image.new("L", (30, 30)).save(small / "000.png")
    for method in ("lora", "dreambooth"):
        lines = told("--mask-data-dir", small, method=method)
        assert "6 faulty examples" in lines and "mask of 30 x 30 pixels" in lines
    (tmp_path / "sets.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}/images'\n"
        f"conditioning_data_dir = '{folder}/white'\n"
    )
    values = ["lcm", "--dataset-config", tmp_path / "sets.toml", "--output-dir", tmp_path / "run"]
    values += ["--pretrained-model-name-or-path", folder / "model"]
    assert "alpha_mask and conditioning_data_dir have no effect with lcm" in refusal(run_program, *values)


def test_encoded_beforehand(folder, tmp_path, monkeypatch, capfd):
    masks = ["--mask-data-dir", str(folder / "half")]
    values = [str(folder / "images"), str(tmp_path / "cache"), *masks, "--no-jit-compile"]
    values += ["--pretrained-model-name-or-path", str(folder / "model")]
    monkeypatch.setattr("sys.argv", ["keras-sd", *values])
    with pytest.raises(SystemExit) as ended:
        run_command(encode, "encode")
    assert not ended.value.code, capfd.readouterr().err
    assert len(list((tmp_path / "cache").glob("masks-*"))) == 1
