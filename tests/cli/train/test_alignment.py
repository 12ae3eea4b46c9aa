"""An alignment by the real commands: both backends, resumed, exported, and refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.cli.main import main as keras_sd
from keras_sd.cli.train.main import main
from tests import tiny
from tests.cli.test_export import files_of
from tests.programs import Program
from tests.training.test_stored_encodings import write_images

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a model with an image encoder, one without, and that encoder alone."""
    folder = tmp_path_factory.mktemp("alignment")
    write_images(folder / "images", 6)
    pipeline = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET)
    pipeline.save(folder / "model")
    pipeline.save(folder / "without")
    (folder / "without" / "image_encoder").rename(folder / "encoder")
    index = json.loads((folder / "without" / "model_index.json").read_text())
    index.pop("image_encoder", None)
    (folder / "without" / "model_index.json").write_text(json.dumps(index))
    return folder


def arguments(folder, output, *more, model="model", weight=0.5):
    values = ["text-to-image", "--train-data-dir", folder / "images", "--output-dir", output]
    values += ["--pretrained-model-name-or-path", folder / model, "--max-train-steps", STEPS]
    values += ["--train-batch-size", 2, "--learning-rate", 0.01, "--lr-warmup-steps", 0, "--random-flip"]
    values += ["--evaluation-steps", 0, "--ema-decay", 0.5, "--alignment-weight", weight]
    return [*map(str, values), *map(str, more)]


def on_jax(*values):
    done = Program(["-m", "keras_sd.train", *values]).finish()
    assert done.returncode == 0, done.stderr


def state(output):
    checkpoint = output / f"checkpoint-{STEPS}"
    return {
        f"{group}/{name}": array
        for group in ("weights", "ema", "optimizer")
        for name, array in load_file(checkpoint / f"{group}.safetensors").items()
    }


def figures(output):
    records = map(json.loads, (output / "logs" / "metrics.jsonl").read_text().splitlines())
    return [(one["loss"], one["alignment"]) for one in records if "loss" in one]


@pytest.fixture(scope="module")
def jax_run(folder):
    on_jax(*arguments(folder, folder / "jax"))
    return folder / "jax"


def test_both_backends_train_to_the_same_weights(folder, jax_run, run_program):
    output = folder / "tensorflow"
    code, _, told = run_program(main, *arguments(folder, output, "--no-jit-compile"))
    assert code == 0, told
    np.testing.assert_allclose(figures(output), figures(jax_run), atol=1e-4)
    assert len(figures(output)) == STEPS
    ours, theirs = state(output), state(jax_run)
    assert any(name.startswith("weights/alignment_projection.layers.2.") for name in ours)
    for name, array in ours.items():
        # What has no gradient moves by a rounding error, which Adam divides by its own size.
        if not name.endswith("to_k.bias"):
            np.testing.assert_allclose(array, theirs[name], atol=1e-3, err_msg=name)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, jax_run, tmp_path):
    on_jax(*arguments(folder, tmp_path / "run", "--max-train-steps", 2))
    on_jax(*arguments(folder, tmp_path / "run", "--resume-from-checkpoint", "latest"))
    left, right = state(tmp_path / "run"), state(jax_run)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)
    assert figures(tmp_path / "run") == figures(jax_run)


def test_a_resumed_run_takes_a_larger_batch(folder, jax_run, tmp_path, run_program):
    shutil.copytree(jax_run, tmp_path / "run")
    more = ["--resume-from-checkpoint", "latest", "--max-train-steps", STEPS + 1, "--train-batch-size", 3]
    more += ["--gradient-accumulation-steps", 2, "--no-jit-compile"]
    code, _, told = run_program(main, *arguments(folder, tmp_path / "run", *more))
    assert code == 0, told
    assert "updates are now of 6 images, and their order continues after the 8 seen" in told
    position = json.loads((tmp_path / "run" / f"checkpoint-{STEPS + 1}" / "position.json").read_text())
    assert position["examples"] == 9 + 6  # eight are two batches of three and a part of the third
    assert figures(tmp_path / "run")[:STEPS] == figures(jax_run)


def test_the_written_model_has_nothing_of_the_alignment(folder, jax_run, tmp_path, run_program):
    written, before = files_of(jax_run / "model"), files_of(folder / "model")
    assert written.keys() == before.keys()
    for name in written:
        if name.endswith(".safetensors"):
            ours, theirs = (load_file(place / name) for place in (jax_run / "model", folder / "model"))
            shapes = [{key: array.shape for key, array in one.items()} for one in (ours, theirs)]
            assert shapes[0] == shapes[1], name
    code, _, told = run_program(keras_sd, "export", jax_run / f"checkpoint-{STEPS}", tmp_path / "exported")
    assert code == 0, told
    assert files_of(tmp_path / "exported") == written


def test_encodings_are_computed_anew_with_random_crops(folder, tmp_path, run_program):
    more = ["--no-center-crop", "--alignment-model", folder / "encoder", "--no-jit-compile"]
    values = arguments(folder, tmp_path / "run", *more, model="without")
    code, _, told = run_program(main, *values)
    assert code == 0, told
    assert len(figures(tmp_path / "run")) == STEPS


def test_refused(folder, jax_run, tmp_path, run_program):
    def told(*more, output=tmp_path / "run", **options):
        code, _, errors = run_program(main, *arguments(folder, output, *more, **options))
        assert code == 2, errors
        return errors

    assert "has no image encoder; name a CLIP that has one by --alignment-model" in told(model="without")
    assert "holds text_encoder, unet, vae, not the image_encoder" in told(
        "--alignment-model", folder / "without"
    )
    assert "--alignment-model: has no effect without --alignment-weight" in told(
        "--alignment-model", folder / "encoder", weight=0
    )
    kept = "the targets of an alignment are not kept on disk"
    assert f"--cache-latents disk: {kept}; use memory or off" in told("--cache-latents", "disk")
    assert f"{kept}; leave it out" in told("--cache-dir", tmp_path / "cache")
    assert "made with another alignment_weight (0.5 there and 0.0 here)" in told(
        "--resume-from-checkpoint", "latest", output=jax_run, weight=0
    )
    assert not (tmp_path / "run").exists()
