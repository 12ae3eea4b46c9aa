"""Folders of early releases, against what diffusers' pipelines make of their configs."""

import json

import pytest

from keras_sd.weights.loading import open_parts
from keras_sd.weights.readers import read_checkpoint
from tests import tiny
from tests.reference import run_reference

PLAIN, EARLY = "StableDiffusionPipeline", {"_diffusers_version": "0.6.0"}
# Class of the pipeline, and what is other in the files of its UNet, VAE and scheduler; None removes a key.
CASES = {
    "new": (PLAIN, {}, {}, {}),
    "side of an early UNet": (PLAIN, EARLY | {"sample_size": 32}, {}, {}),
    "side of a later UNet": (PLAIN, {"_diffusers_version": "0.9.0", "sample_size": 32}, {}, {}),
    "side of an early inpainting UNet": (
        "StableDiffusionInpaintPipeline",
        EARLY | {"sample_size": 32},
        {},
        {},
    ),
    "scheduler says nothing": (PLAIN, {}, {}, {"clip_sample": None, "steps_offset": None}),
    "scheduler says so": (PLAIN, {}, {}, {"clip_sample": True, "steps_offset": 3}),
    "image to image": (
        "StableDiffusionImg2ImgPipeline",
        {},
        {},
        {"clip_sample": None, "steps_offset": None},
    ),
    "inpainting": ("StableDiffusionInpaintPipeline", {}, {}, {"clip_sample": None, "steps_offset": None}),
    "inpainting by PNDM": (
        "StableDiffusionInpaintPipeline",
        {},
        {},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": None},
    ),
    "upscaling": (
        "StableDiffusionUpscalePipeline",
        EARLY | {"sample_size": 32},
        {"scaling_factor": None},
        {"clip_sample": None, "steps_offset": None},
    ),
    "upscaling by another scale": ("StableDiffusionUpscalePipeline", {}, {"scaling_factor": 0.18215}, {}),
}

DIFFUSERS = """
    import json
    import diffusers

    told = {}
    for path in sorted(folder.glob("*/model_index.json")):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(path.parent, safety_checker=None)
        told[path.parent.name] = {
            "sample_size": pipeline.unet.config.sample_size,
            "scaling_factor": pipeline.vae.config.scaling_factor,
            "scheduler": dict(pipeline.scheduler.config),
        }
    (folder / "told.json").write_text(json.dumps(told, default=str))
"""


def changed(path, values):
    """Changes keys of a JSON file."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    pipeline = tiny.pipeline(jit_compile=False)
    for name, (kind, unet, vae, scheduler) in CASES.items():
        path = folder / name
        pipeline.save(path)
        changed(path / "unet/config.json", unet)
        changed(path / "vae/config.json", vae)
        changed(path / "scheduler/scheduler_config.json", scheduler)
        class_name = scheduler.get("_class_name", "DDIMScheduler")
        index = {"_class_name": kind, "scheduler": ["diffusers", class_name]}
        if "Upscale" in kind:
            index |= {"image_encoder": None, "low_res_scheduler": ["diffusers", "DDPMScheduler"]}
            index |= {"requires_safety_checker": None}
            low_res = path / "low_res_scheduler"
            low_res.mkdir()
            (low_res / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
        changed(path / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def told(folders):
    run_reference(DIFFUSERS, {}, folders)
    return json.loads((folders / "told.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_configs_are_set_right_as_in_diffusers(name, folders, told):
    checkpoint = read_checkpoint(folders / name)
    parts = open_parts(checkpoint)
    assert parts["unet"].config.sample_size == told[name]["sample_size"]
    assert parts["vae"].config.scaling_factor == told[name]["scaling_factor"]
    config, theirs = parts["scheduler_config"], told[name]["scheduler"]
    assert config.steps_offset == theirs["steps_offset"]
    assert config.clip_sample == theirs.get("clip_sample", False)
    if "skip_prk_steps" in theirs:
        assert (config.repairs or {}).get("skip_prk_steps") is theirs["skip_prk_steps"] is True
    # The file is written again as it was read.
    assert config.to_dict() == json.loads((folders / name / "scheduler/scheduler_config.json").read_text())


def test_something_is_set_right(folders, told):
    """The cases are not those that need nothing."""
    assert told["side of an early UNet"]["sample_size"] == 64
    assert told["upscaling"]["scaling_factor"] == 0.08333
    assert told["scheduler says nothing"]["scheduler"]["clip_sample"] is False
    assert told["inpainting"]["scheduler"]["clip_sample"] is True
    assert told["upscaling"]["scheduler"]["steps_offset"] == 0
