"""A model out of a checkpoint is the one that its run has exported, for every method of fine-tuning.

The methods that train from the beginning are exported in `test_train`, which has their runs.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.cli.main import cli
from keras_sd.cli.train.main import train
from keras_sd.errors import UserError
from keras_sd.training.checkpoints import Checkpoints
from keras_sd.training.post_hoc_ema import Snapshots
from tests import tiny

METHODS = {
    "text-to-image": (
        *("--train-text-encoder", "--text-encoder-lr", 0.02),
        *("--learning-rate-by-block", "conv_in=0 down_blocks=0.5"),
        *("--prediction-type", "v_prediction", "--rescale-betas-zero-snr"),
    ),
    "lora": ("--train-text-encoder", "--rank", 2, "--clip-skip", 2, "--post-hoc-ema", "float32"),
    "lcm": ("--rank", 2),
    "dreambooth": ("--instance-prompt", "a sks heart", "--train-text-encoder"),
    "textual-inversion": ("--placeholder-token", "<heart>", "--num-vectors", 2),
    "super-resolution": ("--crop-size", 8),
}


def export(*arguments):
    cli.main(["export", *map(str, arguments)], standalone_mode=False)


def files_of(folder):
    """Name -> content of what is in a folder, without the sign of an exported one."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "trained.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = []
    for index in range(4):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": tiny.TEXTS[index]}) + "\n")
    (folder / "images" / "metadata.jsonl").write_text("".join(lines))
    pipeline = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET)
    # One by which scores depend on more of a text than its sign.
    projection = generator.normal(size=pipeline.clip_head["text_projection.weight"].shape)
    pipeline.clip_head["text_projection.weight"] = projection.astype("float32")
    pipeline.save(folder / "base")
    upscaler = {"in_channels": 6, "sample_size": 16, "num_class_embeds": 10}
    dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, **upscaler).save(folder / "upscaler.json")
    return folder


def run(folder, method, output, *options):
    data = "--instance-data-dir" if method == "dreambooth" else "--train-data-dir"
    model = ("--pretrained-model-name-or-path", folder / "base")
    model = ("--unet-config", folder / "upscaler.json") if method == "super-resolution" else model
    arguments = [method, data, folder / "images", *model, "--output-dir", output, *METHODS[method]]
    arguments += ["--max-train-steps", 2, "--train-batch-size", 2, "--checkpointing-steps", 1]
    arguments += ["--learning-rate", 0.01, "--lr-warmup-steps", 0, "--evaluation-steps", 0]
    train.main([*map(str, (*arguments, *options)), "--no-jit-compile"], standalone_mode=False)


@pytest.mark.parametrize("method", METHODS)
def test_last_checkpoint_gives_the_model_of_the_run(folder, method):
    output = folder / method
    run(folder, method, output)
    export(output / "checkpoint-2", folder / f"{method}-2")
    whole, exported = files_of(output / "model"), files_of(folder / f"{method}-2")
    assert whole.keys() == exported.keys()
    assert [name for name in whole if whole[name] != exported[name]] == []
    export(output / "checkpoint-1", folder / f"{method}-1")
    assert files_of(folder / f"{method}-1") != exported
    export(output / "checkpoint-1", folder / f"{method}-1", "--weights", "raw", "--overwrite")
    if method == "lora":
        trained = load_file(output / "model" / "pytorch_lora_weights.safetensors")
        layers = {name.split("layers.")[1][0] for name in trained if name.startswith("text_encoder.")}
        assert layers == {"0"}  # of two, the last of which is skipped
    if method == "text-to-image":
        schedule = json.loads((output / "model" / "scheduler" / "scheduler_config.json").read_text())
        assert schedule["rescale_betas_zero_snr"] and schedule["timestep_spacing"] == "trailing"
        assert schedule["prediction_type"] == "v_prediction"
    if method == "lora":
        check_post_hoc_averages(folder, output)
        check_options_and_refusals(folder, output)


def check_post_hoc_averages(folder, output):
    """An average after the run is the model that a checkpoint with its weights gives."""
    state = Checkpoints(output, {}).load(output / "checkpoint-2")
    average, _ = Snapshots(output).average(0.08)
    other = Checkpoints(folder / "averaged", state.config)
    other.save(2, {**state.groups, "ema": average}, state.position)
    for name in ("run.json", "lora_metadata.json"):
        shutil.copy(output / name, folder / "averaged")
    export(folder / "averaged" / "checkpoint-2", folder / "expected")
    ema = ["ema", output, folder / "post-hoc", "--sigma-rel", 0.08]
    cli.main(list(map(str, ema)), standalone_mode=False)
    assert files_of(folder / "post-hoc") == files_of(folder / "expected")
    assert files_of(folder / "post-hoc") != files_of(output / "model")
    with pytest.warns(UserWarning, match="--sigma-rel 0.28: the snapshots give an average whose weights are"):
        more = ["ema", output, folder / "post-hoc", "--sigma-rel", 0.28, "--overwrite", "--step", 1]
        cli.main(list(map(str, more)), standalone_mode=False)
    shutil.copytree(output, folder / "went-back")
    shutil.rmtree(folder / "went-back" / "checkpoint-2")
    with pytest.warns(UserWarning, match="so the snapshots of later steps are left out, the first of step 2"):
        more = ["ema", folder / "went-back", folder / "earlier", "--sigma-rel", 0.08]
        cli.main(list(map(str, more)), standalone_mode=False)
    for options, told in (
        (("--sigma-rel", 0.5), "--sigma-rel 0.5: out of range"),
        (("--sigma-rel", 0.1, "--step", 3), "--step 3: has no snapshot; choose one of the last ones, 1, 2"),
    ):
        with pytest.raises(UserError, match=told):
            cli.main(["ema", str(output), str(folder / "x"), *map(str, options)], standalone_mode=False)


def check_options_and_refusals(folder, output):
    export(output / "checkpoint-2", folder / "half", "--dtype", "bfloat16")
    tensors = load_file(folder / "half" / "pytorch_lora_weights.safetensors")
    assert {str(array.dtype) for array in tensors.values()} == {"bfloat16"}
    with pytest.raises(UserError, match="half: exists; choose another folder, or replace it with --over"):
        export(output / "checkpoint-2", folder / "half")
    with pytest.raises(UserError, match="holds something else"):
        export(output / "checkpoint-2", folder / "images", "--overwrite")
    with pytest.raises(UserError, match="checkpoint-9: no such checkpoint folder"):
        export(output / "checkpoint-9", folder / "x")
    with pytest.raises(UserError, match="is a run, not a checkpoint; give one of it, RUN/checkpoint-N"):
        export(output, folder / "x")
    shutil.copytree(output / "checkpoint-1", folder / "alone" / "checkpoint-1")
    with pytest.raises(UserError, match="run.json: not found; give the checkpoint in the folder of a run"):
        export(folder / "alone" / "checkpoint-1", folder / "x")
    check_places(output)
    check_descriptions(output)
    (output / "checkpoint-1" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint-1: not a valid checkpoint"):
        export(output / "checkpoint-1", folder / "x")
    # Another base model in the place of that of the run.
    description = json.loads((output / "run.json").read_text())
    description["options"]["pretrained_model_name_or_path"] = "emoji"
    (output / "run.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="emoji: its vae is not the one that the run has begun with"):
        export(output / "checkpoint-2", folder / "x")
    assert not (folder / "x").exists()


def check_places(output):
    for place in ("checkpoint-9", "checkpoint-9/model", "checkpoint-1/model", "checkpoint-1/a/b"):
        with pytest.raises(UserError, match="is in the place of a checkpoint; choose a folder outside"):
            export(output / "checkpoint-2", output / place)
        assert not (output / place).exists()


def check_descriptions(output):
    """What a damaged or another run's `run.json` would make of a checkpoint."""
    path = output / "run.json"
    text = path.read_text()
    run = json.loads(text)

    def lacking(name):
        return {key: value for key, value in run["options"].items() if key != name}

    cases = [
        ("[" * 100_000, "run.json: not a JSON file"),
        ("[1]", "run.json: not a JSON dictionary"),
        *((json.dumps({**run, **change}), told) for change, told in (
            ({"version": 2}, "run.json: version 2 is not supported"),
            ({"version": None}, "run.json: version None is not supported"),
            ({"method": ["lora"]}, "run.json: is damaged .method"),
            ({"method": "paint"}, "method 'paint' cannot be exported"),
            ({"method": "lcm"}, 'run.json: method is "lcm", but the checkpoint was trained with "lora"'),
            ({"directory": 5}, "run.json: is damaged .directory"),
            ({"options": []}, "run.json: is damaged .options"),
            ({"options": {}}, "run.json: is damaged .option train_text_encoder is missing"),
            ({"options": lacking("rank")}, "run.json: is damaged .option rank is missing"),
        )),
        *((json.dumps({**run, "options": {**run["options"], name: value}}), told) for name, value, told in (
            ("pretrained_model_name_or_path", 5, "damaged .option pretrained_model_name_or_path is 5"),
            ("pretrained_model_name_or_path", None, "damaged .option pretrained_model_name_or_path"),
            ("train_text_encoder", "yes", 'damaged .option train_text_encoder is "yes"'),
            ("train_text_encoder", False, "run.json: trained is "),
            ("rank", -1, "damaged .option rank is -1"),
            ("rank", 4, "run.json: rank is 4, but the checkpoint was trained with 2; resume the run"),
            ("lora_alpha", 16, "run.json: lora_alpha is 16, but the checkpoint was trained with 2"),
            ("lora_layers", "all", 'run.json: lora_layers is "all", but the checkpoint was trained with'),
            ("seed", 7, "run.json: seed is 7, but the checkpoint was trained with 0"),
        )),
    ]  # fmt: skip
    for content, told in cases:
        path.write_text(content)
        with pytest.raises(UserError, match=told) as raised:
            export(output / "checkpoint-2", output.parent / "x")
        assert "\n" not in str(raised.value)
    path.write_text(text)


def test_figures_of_a_trained_text_encoder_are_those_of_an_uninterrupted_run(folder):
    """Captions are scored by the text encoder as it was, whenever the first evaluation comes."""
    options = ("--evaluation-steps", 1, "--kid-images", 4, "--num-inference-steps", 1)
    whole, killed = folder / "whole", folder / "killed"
    run(folder, "lora", whole, *options)
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("checkpoint-2", "model"))
    run(folder, "lora", killed, *options, "--resume-from-checkpoint", "latest")
    figures = [
        [line.partition('"time"')[2].partition(",")[2] for line in path.read_text().splitlines()]
        for path in (whole / "logs" / "metrics.jsonl", killed / "logs" / "metrics.jsonl")
    ]
    assert figures[0] == figures[1] and sum("clip_score_train_raw" in line for line in figures[0]) == 2
    record = json.loads((killed / "logs" / "record.json").read_text())
    assert record == {"evaluated": 2, "exported": 2}
