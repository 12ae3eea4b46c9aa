"""The autoencoder against a discriminator: one step against torch, and runs of the real command."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load, load_file

from keras_sd import presets
from keras_sd.cli.main import cli as export_main
from keras_sd.cli.main import main as keras_sd
from keras_sd.cli.train.main import main
from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.vae import AutoencoderKL
from keras_sd.training.autoencoder import train_autoencoder
from keras_sd.training.autoencoder_losses import AutoencoderLosses
from keras_sd.training.autoencoder_objective import AdversarialAutoencoderObjective
from keras_sd.training.lora import freeze
from keras_sd.training.settings import Settings
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.programs import run_python
from tests.reference import group_of, run_reference
from tests.training.test_stored_encodings import write_images

LOSSES = AutoencoderLosses(
    kl_weight=0.01,
    perceptual_weight=0.3,
    adversarial_weight=0.7,
    adversarial_start=2,
    discriminator_width=8,
    discriminator_depth=2,
)
TORCH = """
    import json
    from diffusers import AutoencoderKL
    from torch.nn import functional as F
    from transformers import CLIPVisionModelWithProjection

    torch.set_grad_enabled(True)
    settings = json.loads((folder / "settings.json").read_text())
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    clip = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").requires_grad_(False)
    weights = {name.removeprefix("discriminator/"): tensor.requires_grad_()
               for name, tensor in inputs.items() if name.startswith("discriminator/")}
    mean, deviation = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "deviation"))


    def judge(x):
        x = F.leaky_relu(F.conv2d(x, weights["conv_in.weight"], weights["conv_in.bias"], 2, 1), 0.2)
        x = F.conv2d(x, weights["convolutions.0.weight"], stride=2, padding=1)
        x = F.leaky_relu(F.group_norm(x, 8, weights["norms.0.weight"], weights["norms.0.bias"], 1e-6), 0.2)
        x = F.conv2d(F.pad(x, (1, 2, 1, 2)), weights["convolutions.1.weight"])
        x = F.leaky_relu(F.group_norm(x, 8, weights["norms.1.weight"], weights["norms.1.bias"], 1e-6), 0.2)
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), weights["conv_out.weight"], weights["conv_out.bias"])


    def distance(one, other):
        total = 0
        normalized = [((x + 1) / 2 - mean) / deviation for x in (one, other)]
        states = [clip.vision_model(x, output_hidden_states=True).hidden_states[1:] for x in normalized]
        for a, b in zip(*states):
            a, b = (F.normalize(state[:, 1:], dim=-1) for state in (a, b))
            total = total + ((a - b) ** 2).sum(-1).mean(1)
        return total


    images = inputs["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = vae.encode(images).latent_dist
    made = vae.decode(posterior.mean + posterior.std * inputs["noise"].permute(0, 3, 1, 2)).sample
    error = made - images
    reconstruction = (error.abs() + 2 * error ** 2).mean()
    reconstruction = reconstruction + settings["perceptual"] * distance(images, made).mean()
    adversarial = -judge(made).mean()
    last = vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
             for loss in (reconstruction, adversarial)]
    factor = settings["adversarial"] * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    divergence = settings["kl"] * posterior.kl().mean() / posterior.mean[0].numel()
    whole = reconstruction + divergence + factor * adversarial
    fixed = made.detach()
    hinge = 0.5 * (F.relu(1 - judge(images)) + F.relu(1 + judge(fixed))).mean()
    of_vae = dict(vae.named_parameters())
    for name, gradient in zip(of_vae, torch.autograd.grad(whole, list(of_vae.values()), retain_graph=True)):
        outputs["vae/" + name] = gradient
    for name, gradient in zip(weights, torch.autograd.grad(hinge, list(weights.values()))):
        outputs["discriminator/" + name] = gradient
    outputs |= {"loss": whole, "discriminator_loss": hinge, "adversarial_weight": factor}
    without = torch.autograd.grad(reconstruction + divergence, last)[0]
    outputs["kernel before"] = without
"""


def make_objective(losses=LOSSES):
    encoder = tiny.randomize(ImageEncoder(tiny.IMAGE_ENCODER), 4)
    freeze(encoder)
    objective = AdversarialAutoencoderObjective(
        tiny.randomize(AutoencoderKL(tiny.VAE), 1), losses, image_encoder=encoder
    )
    tiny.randomize(objective.discriminator, 2)
    return objective


def batch():
    generator = np.random.default_rng(3)
    size = tiny.IMAGE_ENCODER.image_size
    latent = size // tiny.VAE.downsampling
    return {
        "images": generator.integers(0, 256, (3, size, size, 3), "uint8"),
        "noise": generator.standard_normal((3, latent, latent, tiny.VAE.latent_channels), "float32"),
    }


def gradients_of(objective, part):
    """Figures of a step, and the gradients of a part of the objective by published name."""
    trained = objective.trainable_variables
    with tf.GradientTape() as tape:
        figures = objective(batch(), training=True)
        loss = objective.compute_loss(y_pred=figures)
    values = [keras.ops.convert_to_numpy(variable) for variable in trained]
    for variable, gradient in zip(trained, tape.gradient(loss, trained), strict=True):
        variable.assign(gradient)
    gradients = torch_state(part)
    for variable, value in zip(trained, values, strict=True):
        variable.assign(value)
    means = {name: float(np.mean(figure)) for name, figure in figures.items()}
    return means, gradients


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    objective = make_objective()
    for name, model in (("vae", objective.vae), ("image_encoder", objective.image_encoder)):
        write_part(folder, name, model.config.to_dict(), torch_state(model))
    settings = {
        "kl": LOSSES.kl_weight,
        "perceptual": LOSSES.perceptual_weight,
        "adversarial": LOSSES.adversarial_weight,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "deviation": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    weights = {f"discriminator/{name}": array for name, array in torch_state(objective.discriminator).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in (batch() | weights).items()}
    return run_reference(TORCH, arrays, folder)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        scale = max(np.abs(array).max(), floor)
        assert np.abs(actual[name] - array).max() <= 1e-4 * scale, name


def test_a_step_against_torch(reference):
    objective = make_objective()
    objective.enter_phase_of(LOSSES.adversarial_start)
    for part in ("vae", "discriminator"):
        figures, gradients = gradients_of(objective, getattr(objective, part))
        for name, figure in figures.items():
            assert figure == pytest.approx(float(reference[name]), rel=1e-4), name
        assert_close(gradients, group_of(reference, part))


def test_before_the_start_only_the_discriminator_learns_of_the_other(reference):
    objective = make_objective()
    figures, gradients = gradients_of(objective, objective.discriminator)
    assert "adversarial_weight" not in figures
    assert_close(gradients, group_of(reference, "discriminator"))
    _, gradients = gradients_of(objective, objective.vae)
    name = "decoder.conv_out.weight"
    assert_close({name: gradients[name]}, {name: reference["kernel before"]})


def test_windows_of_the_perceptual_distance_cover_the_image():
    distance = make_objective().distance
    size = tiny.IMAGE_ENCODER.image_size
    images = np.zeros((1, 2 * size - 4, size + 2, 3), "float32")
    for row in (0, size, 2 * size - 5):
        for column in (0, size + 1):
            others = images.copy()
            others[0, row, column] = 1
            assert distance(images, others) > 1e-7
    np.testing.assert_array_equal(distance(images, images), [0])
    small = np.random.default_rng(0).random((2, size // 2, size // 2, 3), "float32")
    assert distance(small, -small).shape == (2,)


# Which compiles faster than one of three levels.
ONE_LEVEL_VAE = dataclasses.replace(
    tiny.VAE,
    block_out_channels=(16,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
)
ARGUMENTS = ["vae", "--pretrained-vae", "whole_model", "--train-data-dir", "images", "--resolution", 16]
ARGUMENTS += ["--train-batch-size", 2, "--learning-rate", 0.002, "--lr-warmup-steps", 0]
ARGUMENTS += ["--lr-scheduler", "constant", "--evaluation-steps", 0, "--perceptual-weight", 0.3]
ARGUMENTS += ["--perceptual-model", "whole_model", "--adversarial-weight", 0.7, "--adversarial-start", 2]
ARGUMENTS += ["--discriminator-width", 8, "--discriminator-depth", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversarial")
    write_images(folder / "images", 6)
    sd = tiny.pipeline(vae=ONE_LEVEL_VAE)
    sd.image_encoder = tiny.randomize(ImageEncoder(tiny.IMAGE_ENCODER), 4)
    sd.save(folder / "whole_model")
    return folder


def train(place, output, steps, *more):
    arguments = [*ARGUMENTS, "--output-dir", place / output, "--max-train-steps", steps, *more]
    return [str(place / word if word in ("images", "whole_model") else word) for word in arguments]


def test_runs_on_both_backends_agree_and_resume_to_the_bit(place, run_program):
    """Resumed before and after the discriminator is heard."""
    resume = ("--resume-from-checkpoint", "latest")
    for run, steps, *more in (("whole", 4), ("parts", 1), ("parts", 3, *resume), ("parts", 4, *resume)):
        code, _, errors = run_program(main, *train(place, run, steps, *more))
        assert code == 0, errors
        assert ("before the discriminator counts" in errors) == (steps == 1)
    run_python(["-m", "keras_sd.train", *train(place, "jax", 4)])
    groups = [
        load_file(place / run / "checkpoint-4/weights.safetensors") for run in ("whole", "parts", "jax")
    ]
    whole, parts, other = groups
    assert any(name.startswith("discriminator") for name in whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    # Where there is hardly a gradient, Adam turns rounding errors into whole updates: single numbers differ.
    differences = np.concatenate([(other[name] - array).ravel() for name, array in whole.items()])
    assert np.abs(differences).max() < 4 * 0.002
    assert np.sqrt(np.mean(differences**2)) < 2e-4
    written = (place / "whole/model/vae/diffusion_pytorch_model.safetensors").read_bytes()
    assert load(written).keys() == torch_state(AutoencoderKL(ONE_LEVEL_VAE)).keys()
    arguments = ["export", str(place / "parts/checkpoint-4"), str(place / "again")]
    export_main(arguments, standalone_mode=False)
    assert (place / "again/vae/diffusion_pytorch_model.safetensors").read_bytes() == written


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--perceptual-weight", 0.1], "--perceptual-weight: the distance needs features"),
        (["--perceptual-model", "emoji"], "--perceptual-model: has no effect without --perceptual-weight"),
        (["--adversarial-start", 1], "--adversarial-start: has no effect without --adversarial-weight"),
        (
            ["--adversarial-weight", 1, "--discriminator-width", 12],
            "--discriminator-width 12: not a multiple",
        ),
        (["--adversarial-weight", "nan"], "nan"),
        (
            ["--adversarial-weight", 1, "--discriminator-depth", 9],
            "--discriminator-depth 9: out of range; use a whole number from 1 to 8",
        ),
        (
            ["--adversarial-weight", 1, "--discriminator-width", 8192],
            "--discriminator-width 8192: out of range",
        ),
        (["--perceptual-weight", 1, "--perceptual-model", "nope"], "'nope': no such model"),
        (["--perceptual-weight", 1, "--perceptual-model", "emoji-upscaler"], "not the image_encoder"),
        (["--pretrained-vae", "nope"], "'nope': no such model"),
        (["--pretrained-vae", "emoji-upscaler"], "holds unet, not the vae"),
    ],
)
def test_bad_options(place, run_program, options, fault):
    words = [
        "vae",
        "--train-data-dir",
        place / "images",
        "--output-dir",
        place / "bad",
        "--max-train-steps",
        5,
    ]
    code, _, errors = run_program(main, *words, *options)
    assert code == 2
    assert fault in errors.splitlines()[-1]
    assert "starting the backend" not in errors and not (place / "bad").exists()


def test_a_preset_gives_the_autoencoder_and_the_features(place, run_program):
    words = ["vae", "--train-data-dir", place / "images", "--output-dir", place / "preset", "--decoder-only"]
    words += ["--pretrained-vae", "emoji", "--perceptual-weight", 0.1, "--perceptual-model", "emoji"]
    words += ["--max-train-steps", 1, "--train-batch-size", 1, "--evaluation-steps", 0, "--no-jit-compile"]
    code, _, errors = run_program(main, *words)
    assert code == 0, errors
    code, _, errors = run_program(
        keras_sd, "export", place / "preset/checkpoint-1", place / "out", "--weights", "raw"
    )
    assert code == 0, errors
    name = "encoder.conv_in.weight"
    own = load_file(presets.find("emoji") / "vae/diffusion_pytorch_model.safetensors")[name]
    written = load_file(place / "out/vae/diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(written[name], own)


def test_arguments_are_checked(tmp_path):
    settings = Settings(tmp_path / "run", max_train_steps=1)
    with pytest.raises(UserError, match="image_encoder"):
        train_autoencoder(
            settings, AutoencoderKL(tiny.VAE), [], [], losses=AutoencoderLosses(perceptual_weight=1)
        )
    with pytest.raises(UserError, match="discriminator_width 12: not a multiple of 8"):
        AutoencoderLosses(discriminator_width=12)
    with pytest.raises(UserError, match="adversarial_weight -1"):
        AutoencoderLosses(adversarial_weight=-1)
