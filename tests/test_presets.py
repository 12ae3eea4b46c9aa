"""Names of models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_sd import StableDiffusion, presets
from keras_sd.errors import UserError

KNOWN = "emoji, emoji-upscaler, sd-1.5, sd-2.1, sd-2.1-base"


def test_unknown_names_are_answered_with_the_known_ones():
    for name in ("emojy", "/no/such/folder", "./folder"):
        with pytest.raises(UserError, match=f"no such model; give a folder, .* or a preset: {KNOWN}"):
            StableDiffusion.from_preset(name)


def test_a_folder_is_found_where_it_is(tmp_path):
    assert presets.find(tmp_path) == presets.find(str(tmp_path)) == tmp_path


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
        try:
            presets.find("sd-1.5")
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
    line, modules = done.stdout.splitlines()
    assert line.startswith("stable-diffusion-v1-5/stable-diffusion-v1-5: neither a folder here nor to be had")
    assert modules == "set()"
