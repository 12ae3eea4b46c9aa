"""Every training method through its command, on images in a folder and tiny configs."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd import config
from keras_sd.cli.main import cli
from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import train
from keras_sd.data.emoji import architecture
from keras_sd.errors import UserError
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training import architectures
from keras_sd.weights.loading import load_part
from tests.cli.test_export import files_of
from tests.programs import run_python

COLOURS = {"red": (220, 30, 40), "green": (20, 160, 60), "blue": (30, 60, 220), "yellow": (240, 210, 30)}
VAE = config.VAEConfig(
    sample_size=16,
    latent_channels=4,
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
)
TEXT = dataclasses.replace(
    architecture.EMOJI_TEXT_ENCODER,
    vocab_size=540,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    projection_dim=16,
    bos_token_id=538,
    eos_token_id=539,
    pad_token_id=539,
)
IMAGE = dataclasses.replace(
    architecture.EMOJI_IMAGE_ENCODER,
    image_size=16,
    patch_size=8,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=16,
)
# One level, as nearly all of the time of these tests is tracing and compiling the networks.
UNET = dataclasses.replace(
    architecture.EMOJI_UNET,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
PIXEL_UNET = dataclasses.replace(
    architectures.PIXEL_UNET,
    sample_size=16,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Squares of four colours with captions, six of them held out, and the configs as files."""
    folder = tmp_path_factory.mktemp("train")
    generator = np.random.default_rng(0)
    for part, count in (("images", 24), ("images/validation", 6)):
        (folder / part).mkdir()
        lines = []
        for index in range(count):
            name = list(COLOURS)[index % len(COLOURS)]
            picture = np.full((16, 16, 3), 255, "uint8")
            top, left = generator.integers(1, 5, 2)
            picture[top : top + 10, left : left + 10] = COLOURS[name]
            Image.fromarray(picture).save(folder / part / f"{index}.png")
            lines.append(json.dumps({"file_name": f"{index}.png", "text": f"{name} square"}) + "\n")
        (folder / part / "metadata.jsonl").write_text("".join(lines))
    for name, value in (
        ("vae", VAE),
        ("text", TEXT),
        ("image", IMAGE),
        ("unet", UNET),
        ("pixel", PIXEL_UNET),
    ):
        value.save(folder / f"{name}.json")
    return folder


def method_arguments(folder, method, output, *options, steps):
    arguments = ["--train-data-dir", folder / "images", "--output-dir", folder / output]
    arguments += ["--max-train-steps", steps, "--train-batch-size", 8, "--evaluation-steps", steps]
    return [method, *arguments, "--lr-warmup-steps", min(5, steps), "--learning-rate", "5e-3", *options]


def run(folder, method, output, *options, steps=30):
    """Runs one method as the command line does, and returns its figures by name."""
    arguments = method_arguments(folder, method, output, *options, steps=steps)
    train.main(list(map(str, arguments)), standalone_mode=False)
    return curves_of(folder / output)


def curves_of(run_folder):
    """The figures that a run has logged, by name."""
    curves = {}
    for line in (run_folder / "logs" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "time"}:
            curves.setdefault(name, []).append(record[name])
    return curves


def fell(losses, share):
    """Whether the mean of the last five losses is below that share of the first five's."""
    return np.mean(losses[-5:]) < share * np.mean(losses[:5])


@pytest.fixture(scope="module")
def vae(folder):
    options = ("--vae-config", folder / "vae.json", "--ema-decay", 0.9, "--no-jit-compile")
    return run(folder, "vae", "vae", *options, steps=80)


@pytest.fixture(scope="module")
def clip(folder):
    configs = ("--text-config", folder / "text.json", "--image-config", folder / "image.json")
    return run(folder, "clip", "clip", *configs, "--ema-decay", 0.9, "--no-jit-compile")


@pytest.fixture(scope="module")
def text_to_image(folder, vae, clip):
    parts = ("--pretrained-vae", folder / "vae/model", "--pretrained-clip", folder / "clip/model")
    sampling = ("--kid-images", 6, "--num-inference-steps", 4, "--validation-prompts", "red square")
    options = (*parts, *sampling, "--from-scratch", "--unet-config", folder / "unet.json", "--snr-gamma", 5)
    options += ("--noise-offset", 0.05, "--input-perturbation", 0.1, "--no-jit-compile")
    return run(folder, "text-to-image", "t2i", *options, steps=60)


def test_autoencoder_learns_to_reconstruct(folder, vae):
    assert fell(vae["loss"], 0.5)
    assert vae["reconstruction_psnr"][-1] > 12
    model = load_part(folder / "vae" / "model", "vae")
    pictures = [np.asarray(Image.open(path)) for path in (folder / "images").glob("*.png")]
    latents = model.encode(np.stack(pictures) / np.float32(127.5) - 1).mode()
    # The factor was measured on these very images.
    np.testing.assert_allclose(np.std(np.asarray(latents)) * model.config.scaling_factor, 1, rtol=1e-3)


def test_contrastive_training_tells_the_colours_apart(clip):
    assert fell(clip["loss"], 0.9)


def test_image_encoder_learns_to_meet_a_frozen_text_encoder(folder, clip):
    options = ("--frozen-text-encoder", folder / "clip/model", "--image-config", folder / "image.json")
    assert fell(run(folder, "clip", "locked", *options, "--no-jit-compile")["loss"], 0.95)
    before, after = (load_part(folder / name / "model", "text_encoder") for name in ("clip", "locked"))
    for old, new in zip(before.weights, after.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_text_to_image_writes_a_model_that_opens_and_samples(folder, text_to_image):
    assert fell(text_to_image["loss"], 0.9)
    for split in ("train", "held_out"):
        for weights in ("ema", "raw"):
            for metric in ("kid_emoji", "fid_emoji"):
                assert np.isfinite(text_to_image[f"{metric}_{split}_{weights}"]).all()
    assert (folder / "t2i" / "samples" / "step-000060.png").is_file()
    sd = StableDiffusion.load(folder / "t2i" / "model", jit_compile=False)
    images = sd.text_to_image("red square", num_images=2, num_inference_steps=4, progress=False)
    assert images.shape == (2, 16, 16, 3)


def tuning_options(model):
    options = ("--kid-images", 0, "--snr-gamma", 5, "--num-inference-steps", 2, "--no-jit-compile")
    return (*options, "--pretrained-model-name-or-path", model)


@pytest.fixture(scope="module")
def tuned(folder, text_to_image):
    return run(folder, "text-to-image", "tuned", *tuning_options(folder / "t2i/model"), steps=5)


def test_loaded_model_is_fine_tuned_from_its_weights(tuned, text_to_image):
    # It begins where the other run ended, not where a new network does.
    assert np.mean(tuned["loss"]) < 0.9 * text_to_image["loss"][0]


def test_another_base_model_is_refused_at_resume(folder, tuned):
    """A full fine-tuning takes all its weights from the checkpoint, and yet it is not that of this model."""
    other = shutil.copytree(folder / "t2i/model", folder / "other-base")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * array for name, array in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="made with other weights of the UNet .of another base model"):
        resume = ("--resume-from-checkpoint", "latest")
        run(folder, "text-to-image", "tuned", *tuning_options(other), *resume, steps=6)
    with pytest.raises(UserError, match="--max-train-steps 2: .*checkpoint-5 is of step 5; give 5 or more"):
        run(folder, "text-to-image", "tuned", *tuning_options(other), *resume, steps=2)


def ddim_options(folder):
    options = ("--unet-config", folder / "pixel.json", "--kid-images", 0, "--num-inference-steps", 2)
    return (*options, "--checkpointing-steps", 20)


@pytest.fixture(scope="module")
def ddim(folder):
    return run(folder, "ddim", "ddim", *ddim_options(folder), "--no-jit-compile", steps=40)


def test_pixel_ddim_learns_and_writes_its_unet(folder, ddim):
    assert fell(ddim["loss"], 0.8)
    assert load_part(folder / "ddim" / "model", "unet").config == PIXEL_UNET
    assert (folder / "ddim" / "samples" / "step-000040.png").is_file()


def test_without_jit_compilation_xla_compiles_nothing(folder, tmp_path, text_to_image):
    """TensorFlow tells of the first program that XLA compiles; samples and features are programs too."""
    pixel = ("--unet-config", folder / "pixel.json", "--num-inference-steps", 2, "--kid-images", 6)
    latent = ("--pretrained-model-name-or-path", folder / "t2i" / "model", "--num-inference-steps", 2)
    for method, options in (("ddim", pixel), ("lora", (*latent, "--kid-images", 6))):
        options = (*options, "--no-jit-compile", "--mixed-precision", "no")
        arguments = map(str, method_arguments(folder, method, tmp_path / method, *options, steps=1))
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "0"}
        command = [sys.executable, "-m", "keras_sd.train", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert any("kid" in name for name in curves_of(tmp_path / method))
        assert "using XLA" not in done.stderr


def test_one_backend_goes_on_where_the_other_stopped(folder, ddim):
    """It resumes a checkpoint of this one and loses what this one has lost in the same steps."""
    shutil.copytree(folder / "ddim" / "checkpoint-20", folder / "other" / "checkpoint-20")
    options = (*ddim_options(folder), "--resume-from-checkpoint", "latest")
    arguments = map(str, method_arguments(folder, "ddim", "other", *options, steps=40))
    # With XLA: without it, JAX would compile each operation on its own.
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    run_python(["-m", "keras_sd.train", *arguments], other)
    resumed = curves_of(folder / "other")["loss"]
    assert len(ddim["loss"]) == 40 and len(resumed) == 20
    assert resumed[:3] == pytest.approx(ddim["loss"][20:23], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["paint"], "paint"),
        (["ddim", "--train-data-dir", "nowhere/at all"], "nowhere/at all"),
        (["ddim", "--max-train-steps", "0"], "--max-train-steps"),
        (["ddim", "--unet-config", "missing.json"], "missing.json"),
        (["vae", "--mixed-precision", "fp8"], "fp8"),
        (["lcm", "--num-ddim-timesteps", "51"], "--num-ddim-timesteps"),
        (["ddim", "--kid-images", "3"], "--kid-images 3"),
        (["lora", "--validation-steps", "0", "--validation-examples", "4"], "--validation-examples: has no"),
        (["lora", "--max-train-steps", "30", "--validation-examples", "4"], "in a run of fewer than 500"),
        (["lora", "--validation-split", "0.3"], "--validation-split 0.3: the data has a split"),
        (["vae", "--validation-steps", "3"], "--validation-steps: this method has no validation loss"),
        (["lora", "--evaluation-steps", "0", "--sample-at-first"], "--sample-at-first: has no effect"),
        (["lora", "--post-hoc-ema", "--offload-ema"], "--post-hoc-ema float16: its averages are kept"),
        (["lora", "--report-to", "comet_ml"], "--report-to 'comet_ml': unknown; use tensorboard, wandb"),
        (["lora", "--dataset-name", "emoji", "--pretrained-model-name-or-path", "unheard"], "unheard"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_program, arguments, told):
    output = [] if arguments == ["paint"] else ["--output-dir", str(tmp_path / "run")]
    main = functools.partial(run_command, train, "python -m keras_sd.train")
    code, _, errors = run_program(main, *arguments, *output)
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and told in lines[0], errors
    assert not (tmp_path / "run" / "checkpoint-1").exists()


def test_checkpoints_give_the_models_of_their_runs(folder, vae, clip, text_to_image, ddim):
    for name, step in (("vae", 80), ("clip", 30), ("t2i", 60), ("ddim", 40)):
        exported = folder / f"{name}-exported"
        cli.main(["export", str(folder / name / f"checkpoint-{step}"), str(exported)], standalone_mode=False)
        assert files_of(exported) == files_of(folder / name / "model"), name
