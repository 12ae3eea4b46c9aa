"""One step of every training method against diffusers, transformers and PEFT with the same weights and noise.

The reference reads the files that our models are written to; both sides give the loss and its gradients by
the parameters' published names.
"""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sd.config import UNetConfig
from keras_sd.diffusion.prediction import add_noise
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.training import adapter_settings, lora
from keras_sd.training.autoencoder_losses import AutoencoderLosses
from keras_sd.training.autoencoder_objective import AutoencoderObjective
from keras_sd.training.consistency import ConsistencyObjective
from keras_sd.training.diffusion_settings import DiffusionSettings
from keras_sd.training.objectives import DiffusionObjective, PriorPreservationObjective
from keras_sd.training.optimizers import AdamW
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.rules import load_weights, torch_state
from tests import tiny
from tests.reference import group_of, run_reference
from tests.training.reference_steps import SCRIPT

UPSCALER_UNET = UNetConfig(
    sample_size=4,
    in_channels=7,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    use_linear_projection=True,
    only_cross_attention=(True, False),
    num_class_embeds=351,
    norm_num_groups=4,
)
UNETS = {
    "sd1": tiny.SD1_UNET,
    "inpainting": dataclasses.replace(tiny.SD1_UNET, in_channels=9),
    "upscaler": UPSCALER_UNET,
    "pixels": tiny.PIXEL_UNET,
}
TOKENS = tiny.tokenizer()

VELOCITY = {"prediction_type": "v_prediction"}
# `trains` names the parts that learn: all weights, or those of LoRA or tokens. What is not named is off.
CASES = {
    "noise": {"trains": ["unet"]},
    "noise, min-SNR": {"trains": ["unet"], "snr_gamma": 5.0},
    "velocity, min-SNR": {"trains": ["unet"], "scheduler": VELOCITY, "snr_gamma": 5.0},
    "noise, debiased": {"trains": ["unet"], "debiased_estimation": True},
    "velocity, debiased": {"trains": ["unet"], "scheduler": VELOCITY, "debiased_estimation": True},
    "velocity, zero terminal SNR": {
        "trains": ["unet"],
        "scheduler": VELOCITY | {"rescale_betas_zero_snr": True},
    },
    "noise offset, input perturbation": {"trains": ["unet"], "noise_offset": 0.1, "input_perturbation": 0.2},
    "LoRA on attention": {"trains": ["unet", "text_encoder"], "lora": "attention"},
    "LoRA on all layers": {"trains": ["unet", "text_encoder"], "lora": "all"},
    "DoRA, rank-stabilized, on all layers": {
        "trains": ["unet", "text_encoder"],
        "lora": "all",
        "options": {"use_dora": True, "use_rslora": True},
    },
    "LoKr on all layers": {
        "trains": ["unet", "text_encoder"],
        "lora": "all",
        "adapter": "lokr",
        "rank": 1,
        "alpha": 2,
    },
    "latent consistency": {
        "trains": ["unet"],
        "lora": "attention",
        "num_ddim_timesteps": 50,
        "guidance_scale": 3.0,
    },
    "latent consistency, velocity, zero terminal SNR, pseudo-Huber": {
        "trains": ["unet"],
        "lora": "all",
        "scheduler": VELOCITY | {"rescale_betas_zero_snr": True},
        "num_ddim_timesteps": 10,
        "guidance_scale": 3.0,
        "huber_c": 0.1,
    },
    "DreamBooth": {"trains": ["unet", "text_encoder"], "prior_loss_weight": 0.7},
    "textual inversion": {"trains": ["text_encoder"], "new_tokens": 2},
    "super-resolution": {"trains": ["unet"], "unet": "upscaler", "scheduler": VELOCITY},
    "inpainting": {"trains": ["unet"], "unet": "inpainting"},
    "masked loss": {"trains": ["unet"], "is_masked": True},
    "pixels": {
        "trains": ["unet"],
        "unet": "pixels",
        "scheduler": VELOCITY | {"beta_schedule": "squaredcos_cap_v2"},
    },
    "autoencoder": {"trains": ["vae"], "kl_weight": 0.3},
}
LOW_RES_SCHEDULER = {"beta_start": 0.0001, "beta_end": 0.02}
LORA = {"r": 4, "lora_alpha": 8}
LORA_TARGETS = {
    "attention": {"unet": adapter_settings.UNET_ATTENTION, "text_encoder": adapter_settings.TEXT_ATTENTION},
    "all": {"unet": adapter_settings.UNET_ALL, "text_encoder": adapter_settings.TEXT_ALL},
}
ADAMW = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0


def draw(name):
    """All that is random in the step of a case, channels last."""
    case, generator = CASES[name], np.random.default_rng(list(CASES).index(name))
    examples = (3, 2) if "prior_loss_weight" in case else (3,)

    def normal(*shape):
        return generator.standard_normal((*examples, *shape)).astype("float32")

    def whole(limit, *shape, dtype="int32"):
        return generator.integers(limit, size=(*examples, *shape), dtype=dtype)

    if "vae" in case["trains"]:
        return {"samples": whole(256, 16, 24, 3, dtype="uint8"), "noise": normal(4, 6, 4)}
    if case.get("unet") == "pixels":
        pictures = whole(256, 8, 12, 3, dtype="uint8")
        return {"samples": pictures, "noise": normal(8, 12, 3), "timesteps": whole(1000)}
    drawn = {"samples": normal(4, 6, 4), "noise": normal(4, 6, 4), "timesteps": whole(1000)}
    # Pure noise where the schedule ends in it, and a nearly clean sample, which min-SNR holds back.
    drawn["timesteps"].flat[:2] = 999, 5
    drawn["token_ids"] = whole(TOKENS.vocab_size, TOKENS.max_length)
    if "num_ddim_timesteps" in case:
        # Noise alone, a step that ends at timestep 0, and one between.
        drawn |= {"timesteps": np.array([999, 19, 459], "int32"), "negative_ids": drawn["token_ids"][::-1]}
    if "new_tokens" in case:
        drawn["token_ids"][:, 3:5] = TOKENS.vocab_size + np.arange(case["new_tokens"])
    if "noise_offset" in case:
        drawn |= {"offset_noise": normal(1, 1, 4), "perturbation": normal(4, 6, 4)}
    if case.get("unet") == "inpainting":
        drawn |= {"hidden": whole(2, 4, 6, 1).astype("float32"), "masked_latents": normal(4, 6, 4)}
    if "is_masked" in case:
        drawn["mask"] = generator.random((*examples, 4, 6, 1), "float32")
    if case.get("unet") == "upscaler":
        drawn |= {"low_resolution": normal(4, 6, 3), "low_resolution_noise": normal(4, 6, 3)}
        drawn["noise_levels"] = whole(UPSCALER_UNET.num_class_embeds)
    return drawn


def make_part(name):
    """One of our models with random weights: a UNet of `UNETS`, the text encoder or the autoencoder."""
    if name == "vae":
        return tiny.randomize(AutoencoderKL(tiny.VAE), 3, 0.2)
    if name == "text_encoder":
        return tiny.randomize(TextEncoder(tiny.text_encoder_config(TOKENS)), 1, 0.5)
    return tiny.randomize(UNet(UNETS[name]), 2, 0.2)


def make_models(case):
    """Our models of a case, only what it trains trainable."""
    if "vae" in case["trains"]:
        return {"vae": make_part("vae")}
    models = {"unet": make_part(case.get("unet", "sd1")), "text_encoder": make_part("text_encoder")}
    if "new_tokens" in case:
        models["text_encoder"] = with_new_tokens(models["text_encoder"], case["new_tokens"])
    generator = np.random.default_rng(4)
    for part, model in models.items():
        if part not in case["trains"]:
            lora.freeze(model)
        elif "lora" in case:
            rank, alpha = case.get("rank", LORA["r"]), case.get("alpha", LORA["lora_alpha"])
            options = case.get("options", {}) | {"adapter": case.get("adapter", "lora")}
            lora.add_lora(model, rank, alpha, everywhere=case["lora"] == "all", **options)
            for variable in model.trainable_variables:
                variable.assign(0.2 * generator.standard_normal(variable.shape))
    return models


def with_new_tokens(text_encoder, count):
    """The text encoder with rows for more tokens, whose table alone is trainable."""
    tensors = torch_state(text_encoder)
    (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    rows = np.random.default_rng(4).standard_normal((count, text_encoder.config.hidden_size))
    tensors[name] = np.concatenate([tensors[name], 0.5 * rows.astype("float32")])
    config = dataclasses.replace(text_encoder.config, vocab_size=text_encoder.config.vocab_size + count)
    larger = TextEncoder(config)
    load_weights(larger, tensors)
    lora.freeze(larger)
    larger.embeddings.token_embedding.embeddings.trainable = True
    return larger


def make_objective(case, models):
    if "vae" in case["trains"]:
        return AutoencoderObjective(models["vae"], AutoencoderLosses(case["kl_weight"]))
    schedule = NoiseSchedule(SchedulerConfig(**case.get("scheduler", {})))
    if "num_ddim_timesteps" in case:
        names = ("num_ddim_timesteps", "guidance_scale", "huber_c")
        return ConsistencyObjective(models["unet"], schedule, **{name: case.get(name) for name in names})
    weighting = DiffusionSettings(case.get("snr_gamma"), case.get("debiased_estimation", False))
    arguments = (models["unet"], schedule, weighting, models["text_encoder"])
    if "prior_loss_weight" in case:
        return PriorPreservationObjective(*arguments, prior_loss_weight=case["prior_loss_weight"])
    return DiffusionObjective(*arguments)


def make_batch(case, models, drawn):
    """What was drawn, as the objective of the case takes it."""
    if "vae" in case["trains"]:
        return {"images": drawn["samples"], "noise": drawn["noise"]}
    batch = {name: drawn[name] for name in ("samples", "noise", "timesteps")}
    if "noise_offset" in case:
        batch["noise"] = drawn["noise"] + case["noise_offset"] * drawn["offset_noise"]
        batch["input_noise"] = batch["noise"] + case["input_perturbation"] * drawn["perturbation"]
    if "low_resolution" in drawn:
        schedule = NoiseSchedule(SchedulerConfig(**LOW_RES_SCHEDULER))
        rates = (
            table[drawn["noise_levels"]][:, None, None, None]
            for table in (schedule.signal_rates, schedule.noise_rates)
        )
        batch["channels"] = add_noise(drawn["low_resolution"], drawn["low_resolution_noise"], *rates)
        batch["class_labels"] = drawn["noise_levels"]
    if "hidden" in drawn:
        batch["channels"] = np.concatenate([drawn["hidden"], drawn["masked_latents"]], axis=-1)
    if "mask" in drawn:
        batch["mask"] = drawn["mask"]
    if "text_encoder" in case["trains"]:
        batch["token_ids"] = drawn["token_ids"]
    elif "token_ids" in drawn:
        batch["context"] = models["text_encoder"](drawn["token_ids"])
    if "negative_ids" in drawn:
        batch["negative"] = models["text_encoder"](drawn["negative_ids"])
    return batch


def loss_and_gradients(objective, batch, models):
    """The loss that `fit()` minimises, and its gradients by published name and in torch layout."""
    trained = objective.trainable_variables
    with tf.GradientTape() as tape:
        loss = objective.compute_loss(y_pred=objective(batch, training=True))
    # In the variables' places the gradients are named and turned as weights are.
    for variable, gradient in zip(trained, tape.gradient(loss, trained), strict=True):
        variable.assign(gradient)
    trained = {id(variable) for variable in trained}
    gradients = {}
    for part, model in models.items():
        tensors = torch_state(model)
        for name, variable, _ in parameter_paths(model):
            if id(variable) in trained:
                gradients[f"{part}.{canonical_name(name)}"] = tensors[name]
    return float(loss), gradients


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for name in (*UNETS, "text_encoder", "vae"):
        model = make_part(name)
        write_part(
            folder / name, "unet" if name in UNETS else name, model.config.to_dict(), torch_state(model)
        )
    arrays = adamw_arrays()
    for name, case in CASES.items():
        arrays |= {f"{name}/batch/{key}": array for key, array in draw(name).items()}
        if "lora" in case:
            for part, model in make_models(case).items():
                added = lora.lora_tensors(model)
                arrays |= {f"{name}/added/{part}.{canonical_name(key)}": added[key] for key in added}
        if "new_tokens" in case:
            table = make_models(case)["text_encoder"].embeddings.token_embedding.embeddings
            arrays[f"{name}/added/text_encoder.vectors"] = np.asarray(table)[-case["new_tokens"] :]
    settings = {
        "cases": CASES,
        "unets": list(UNETS),
        "scheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "low_res_scheduler": LOW_RES_SCHEDULER,
        "lora": LORA,
        "lora_targets": LORA_TARGETS,
        "adamw": ADAMW,
        "max_grad_norm": MAX_GRAD_NORM,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return run_reference(SCRIPT, {key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder)


def worst_difference(actual, expected):
    """The tensor that differs most, and its largest difference over its largest number."""
    largest = {name: np.abs(tensor).max() for name, tensor in expected.items()}
    # Softmax is blind to the biases of keys: their gradients are rounding noise.
    floor = 1e-3 * max(largest.values())
    names = list(expected)
    differences = [np.abs(actual[name] - expected[name]).max() / max(largest[name], floor) for name in names]
    worst = np.argmax(differences)  # NaN counts as the largest
    return names[worst], differences[worst]


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_one_step(reference, name):
    case, models = CASES[name], make_models(CASES[name])
    batch = make_batch(case, models, draw(name))
    loss, gradients = loss_and_gradients(make_objective(case, models), batch, models)
    expected = group_of(reference, f"{name}/gradients")
    assert loss == pytest.approx(float(reference[f"{name}/loss"]), rel=1e-4)
    assert shapes_of(gradients) == shapes_of(expected)
    worst, difference = worst_difference(gradients, expected)
    assert difference <= 1e-4, worst


def adamw_arrays():
    """Weights and three gradients, whose norms are cut off and not; half is so small that epsilon counts."""
    generator = np.random.default_rng(0)
    sizes = np.repeat([1.0, 1e-6], 20) * np.array([[0.05], [1.0], [0.5]])
    return {
        "adamw/weights": (0.1 * generator.standard_normal(40)).astype("float32"),
        "adamw/gradients": (sizes * generator.standard_normal((3, 40))).astype("float32"),
    }


def test_steps_of_adamw(reference):
    weights, gradients = adamw_arrays().values()
    variable = keras.Variable(weights)
    optimizer = AdamW(
        ADAMW["lr"],
        beta_1=ADAMW["betas"][0],
        beta_2=ADAMW["betas"][1],
        epsilon=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        global_clipnorm=MAX_GRAD_NORM,
    )
    optimizer.build([variable])
    for step, gradient in enumerate(gradients, start=1):
        optimizer.apply([keras.ops.convert_to_tensor(gradient)])
        expected = reference[f"adamw/weights/{step}"]
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=0, atol=1e-4 * ADAMW["lr"])
