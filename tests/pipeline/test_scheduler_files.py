"""The file that says how a model is sampled: carried through `convert` and `save`, and drawn by diffusers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from keras_sd import StableDiffusion
from keras_sd.cli.convert import convert
from keras_sd.diffusion.denoiser import NoiseStreams
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from tests import tiny
from tests.reference import run_reference

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}
FILES = {
    "dpm karras": SD
    | {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.21.4",
        "algorithm_type": "dpmsolver++",
        "lambda_min_clipped": float("-inf"),
        "solver_order": 3,
        "use_karras_sigmas": True,
        "steps_offset": 1,
    },
    "euler trailing": SD
    | {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "interpolation_type": "linear",
        "a key of tomorrow": [1, {"two": None}],
    },
    "pndm": SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None},
    "unipc": SD | {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0], "steps_offset": 1},
}
DIFFUSERS = """
    from diffusers import DiffusionPipeline

    for path in sorted(folder.glob("*/*/model_index.json")):
        pipeline = DiffusionPipeline.from_pretrained(path.parent, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            prompt=["red heart"] * 2, guidance_scale=3.0, num_inference_steps=10,
            latents=inputs["noise"].permute(0, 3, 1, 2), output_type="np",
        ).images
        outputs["/".join(path.parts[-3:-1])] = torch.from_numpy(images)
"""


def scheduler_of(path):
    return json.loads((path / "scheduler/scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each file: the model with it, the same converted, and opened and saved."""
    folder = tmp_path_factory.mktemp("schedulers")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False).save(folder / "plain")
    for name, values in FILES.items():
        source = folder / name / "source"
        shutil.copytree(folder / "plain", source)
        (source / "scheduler/scheduler_config.json").write_text(json.dumps(values))
        index = json.loads((source / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", values["_class_name"]]
        (source / "model_index.json").write_text(json.dumps(index))
        done = CliRunner().invoke(convert, [str(source), str(folder / name / "converted")])
        assert done.exit_code == 0, done.output
        model = StableDiffusion.load(source, jit_compile=False)
        model.save(folder / name / "saved")
        context, negative = np.split(model.encode_text(["red heart"] * 2 + [""] * 2), 2)
        noise = NoiseStreams([0, 1]).draw((4, 4, 4))
        latents = model.denoise(noise, context, negative, num_inference_steps=10, guidance_scale=3.0)
        np.save(folder / name / "own.npy", model.decode(latents))
    shutil.rmtree(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def drawn(folders):
    return run_reference(DIFFUSERS, {"noise": NoiseStreams([0, 1]).draw((4, 4, 4))}, folders)


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_carried_through(name, folders, drawn):
    for written in ("converted", "saved"):
        assert scheduler_of(folders / name / written) == FILES[name]
        before, after = (np.round(drawn[f"{name}/{kind}"] * 255) for kind in ("source", written))
        assert np.abs(before - after).max() <= 1 and before.std() > 10


@pytest.mark.parametrize("name", FILES)
def test_a_model_is_drawn_by_its_own_sampler(name, folders, drawn):
    expected = np.round(drawn[f"{name}/source"] * 255)
    assert np.abs(np.load(folders / name / "own.npy") - expected).max() <= 1


def test_schedulers_draw_different_images(drawn):
    """Another scheduler in place of the model's own would be seen."""
    images = [np.round(drawn[f"{name}/source"] * 255) for name in FILES]
    assert min(np.abs(images[i] - images[i - 1]).max() for i in range(len(images))) > 3


def test_only_what_was_changed_is_written_anew():
    config = SchedulerConfig.from_dict(FILES["dpm karras"])
    changed = dataclasses.replace(config, prediction_type="epsilon")
    assert changed.to_dict() == FILES["dpm karras"] | {"prediction_type": "epsilon"}
    assert config.to_dict() == FILES["dpm karras"]
    # What a checkpoint keeps does not depend on the file's wording.
    assert config.noise_schedule().keys() == SchedulerConfig().to_dict().keys()
    assert SchedulerConfig.from_dict(config.noise_schedule()) == config


def test_a_schedule_that_no_file_describes_is_written_out():
    assert SchedulerConfig().to_dict()["_class_name"] == "DDIMScheduler"
    assert SchedulerConfig.from_dict({"steps_offset": 0}).to_dict("DDPMScheduler") == (
        SchedulerConfig(steps_offset=0).to_dict() | {"_class_name": "DDPMScheduler"}
    )


def test_verification_compares_the_files(folders, tmp_path):
    source = folders / "pndm/source"
    done = CliRunner().invoke(convert, [str(source), str(tmp_path / "model"), "--verify"])
    assert done.exit_code == 0 and "| scheduler | source |" in done.output, done.output

    from keras_sd.parity import compare as parity
    from keras_sd.weights.readers import read_checkpoint

    before = read_checkpoint(source)
    after = before._replace(scheduler=before.scheduler | {"skip_prk_steps": False, "clip_sample": False})
    (entry,) = parity.compare_schedulers(before, after)
    assert entry.output == "scheduler" and not entry.passes
    assert entry.verdict == "differs in skip_prk_steps, clip_sample"
