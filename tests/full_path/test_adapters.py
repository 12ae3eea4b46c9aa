"""DoRA, LoCon and LoKr by the real command on both backends, and their files in diffusers and LyCORIS."""

import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from keras_sd import StableDiffusion
from tests.full_path.commands import (
    KILLED_AFTER,
    Runs,
    assert_all_trained,
    assert_backends_agree,
    assert_same_run,
    checkpoint,
)
from tests.reference import run_reference

DORA = ("--use-dora", "--use-rslora", "--conv-rank", 3, "--conv-alpha", 2, "--train-text-encoder")
BLOCKS = ("--rank-by-block", "mid_block=0 text_encoder=4", "--alpha-by-block", "text_encoder=2")
LOKR = ("--adapter", "lokr", "--rank", 2, "--lora-alpha", 1, "--lora-layers", "all")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(folder):
    inputs = ("--pretrained-model-name-or-path", folder / "model", "--train-data-dir", folder / "photographs")
    common = (*inputs, "--train-batch-size", 2, "--learning-rate", 1e-2)
    words = ("--trigger-word", "ohwx", "--trigger-word", "toy")
    return {
        "dora": Runs(folder, "lora", *common, *DORA, *BLOCKS, *words),
        "lokr": Runs(folder, "lora", *common, *LOKR),
    }


@pytest.fixture(scope="module")
def dora(runs):
    return runs["dora"].train("dora", "jax")


@pytest.fixture(scope="module")
def lokr(runs):
    return runs["lokr"].train("lokr", "jax")


def test_dora_is_trained_in_the_blocks_and_killed_runs_end_the_same(runs, dora):
    first, last = checkpoint(dora, step=KILLED_AFTER), checkpoint(dora)
    assert first.keys() == last.keys() and not any("mid_block" in name for name in first)
    for name, array in last.items():
        assert np.isfinite(array).all() and not np.array_equal(array, first[name]), name
    magnitudes = [name for name in first if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == len(first) / 3
    ranks = {
        len(a)
        for name, a in load_file(dora / "model" / "lora_kohya.safetensors").items()
        if ".lora_down" in name
    }
    assert ranks == {8, 3, 4}
    assert_same_run(dora, runs["dora"].train_killed("killed", "jax"))


def test_lokr_is_the_same_on_both_backends(runs, lokr):
    first = checkpoint(lokr, step=KILLED_AFTER)
    start = {name: array * 0 if "w2_b" in name else array for name, array in first.items()}
    on_tensorflow = runs["lokr"].train("tensorflow", "tensorflow")
    assert_all_trained(lokr, first)
    assert_backends_agree(lokr, on_tensorflow, start)


def test_the_header_tells_how_it_was_trained(dora):
    for name in ("lora_kohya", "pytorch_lora_weights"):
        with safe_open(dora / "model" / f"{name}.safetensors", "np") as file:
            header = file.metadata()
        assert header["modelspec.trigger_phrase"] == "ohwx, toy" and header["ss_output_name"] == "dora"
        assert header["ss_network_module"] == "lycoris.kohya" and header["ss_network_dim"] == "8"
        arguments = json.loads(header["ss_network_args"])
        assert arguments["dora_wd"] and arguments["rs_lora"] and arguments["conv_dim"] == 3
        assert json.loads(header["ss_dataset_dirs"]) == {"photographs": {"n_repeats": 1, "img_count": 10}}
        assert json.loads(header["ss_tag_frequency"])["photographs"]["a ginger cat"] == 1
        assert header["ss_num_train_images"] == "10" and header["ss_learning_rate"] == "0.01"
        content = (dora / "model" / f"{name}.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert header["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


GENERATE = """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    def generate(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        return pipeline("a cup of coffee", latents=inputs["noise"].permute(0, 3, 1, 2), guidance_scale=3.0,
                        num_inference_steps=4, output_type="pt").images.permute(0, 2, 3, 1)

    def opened():
        return StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)

    outputs["plain"] = generate(opened())
    pipeline = opened()
    pipeline.load_lora_weights(folder / "dora" / "model")
    outputs["dora"] = generate(pipeline)
    pipeline = opened()
    file = folder / "lokr" / "model" / "lora_kohya.safetensors"
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})  # its own names some layers twice
    network, tensors = create_network_from_weights(
        1.0, str(file), pipeline.vae, pipeline.text_encoder, pipeline.unet)
    network.apply_to(pipeline.text_encoder, pipeline.unet, False, True)
    network.load_state_dict(tensors, strict=False)
    outputs["lokr"] = generate(pipeline)
"""


def test_diffusers_and_lycoris_generate_the_same_images(folder, dora, lokr):
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), dtype="float32")
    theirs = run_reference(GENERATE, {"noise": noise}, folder)
    sd = StableDiffusion.load(folder / "model")

    def generate():
        context, negative = sd.encode_text(["a cup of coffee", ""])
        options = {"num_inference_steps": 4, "guidance_scale": 3.0}
        return sd.decode(sd.denoise(noise, context[None], negative[None], **options))

    images = {"plain": generate()}
    for name, run in (("dora", dora), ("lokr", lokr)):
        sd.load_lora(run / "model", name)
        images[name] = generate()
        sd.unload_lora()
        assert np.abs(images[name].astype(int) - images["plain"]).max() > 2
    for name, image in images.items():
        assert np.abs(image.astype(float) - 255 * theirs[name]).max() <= 2, name
