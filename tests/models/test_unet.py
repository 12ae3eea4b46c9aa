"""The UNet of every published config, made small, against diffusers with the same weights."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.config import UNetConfig
from keras_sd.models.precision import dtype_policy
from keras_sd.models.unet import UNet
from keras_sd.weights.rules import load_weights
from tests.models import published
from tests.reference import group_of, run_reference

SMALL = {
    "block_out_channels": [8, 16, 16, 24],
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIGS = {
    "SD 1": {**published.SD1_UNET, **SMALL, "attention_head_dim": 4},
    "SD 1 inpainting": {**published.SD1_INPAINTING_UNET, **SMALL, "attention_head_dim": 4},
    "SD 2": {**published.SD2_UNET, **SMALL, "attention_head_dim": [1, 2, 4, 4]},
    "SD 1 without middle": {
        **published.SD1_UNET,
        **SMALL,
        "attention_head_dim": 4,
        "mid_block_type": None,
    },
    "upscaler": {**published.UPSCALER_UNET, **SMALL, "attention_head_dim": 4},
    "pixels": {
        **published.SD1_UNET,
        **SMALL,
        "down_block_types": ["DownBlock2D"] * 4,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D"] * 4,
        "in_channels": 3,
        "layers_per_block": 2,
    },
}
# Latents whose sides are odd at one level or another.
SIZES = {"16x8": (16, 8), "9x13": (9, 13), "10x6": (10, 6)}
SCRIPT = """
    import json
    from diffusers import UNet2DConditionModel

    for name, config in json.loads((folder / "configs.json").read_text()).items():
        model = randomize(UNet2DConditionModel.from_config(config), 0.2)
        store_weights(model, name + "/weights")
        labels = inputs["class_labels"] if config.get("num_class_embeds") else None
        for size in json.loads((folder / "sizes.json").read_text()):
            latents = inputs[size][..., : config["in_channels"]].permute(0, 3, 1, 2)
            sample = model(latents, inputs["timesteps"], inputs["context"], class_labels=labels).sample
            outputs[f"{name}/{size}"] = sample.permute(0, 2, 3, 1)
"""


def arrays():
    generator = np.random.default_rng(0)
    latents = {
        size: generator.standard_normal((2, *sides, 9)).astype("float32") for size, sides in SIZES.items()
    }
    return latents | {
        "timesteps": np.array([999, 7], "int32"),
        "context": generator.standard_normal((2, 5, 12)).astype("float32"),
        "class_labels": np.array([20, 350], "int32"),
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "configs.json").write_text(json.dumps(CONFIGS))
    (folder / "sizes.json").write_text(json.dumps(list(SIZES)))
    return run_reference(SCRIPT, arrays(), folder)


def loaded(reference, name, policy="float32"):
    with dtype_policy(policy):
        model = UNet(UNetConfig.from_dict(CONFIGS[name]))
    load_weights(model, group_of(group_of(reference, name)))
    return model


def inputs_of(name, size):
    values = arrays()
    latents = values[size][..., : CONFIGS[name]["in_channels"]]
    return [latents, values["timesteps"], values["context"]][: 2 if name == "pixels" else 3]


def labels_of(name):
    return arrays()["class_labels"] if CONFIGS[name].get("num_class_embeds") else None


def distance(actual, expected):
    """The largest difference over the standard deviation."""
    assert keras.backend.standardize_dtype(actual.dtype) == "float32" and actual.shape == expected.shape
    return np.abs(ops.convert_to_numpy(actual) - expected).max() / expected.std()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_config_at_every_size(reference, name):
    model = loaded(reference, name)
    count = len(model.weights)
    for size in SIZES:
        outputs = model(inputs_of(name, size), class_labels=labels_of(name))
        assert distance(outputs, reference[f"{name}/{size}"]) < 2e-5
    assert len(model.weights) == count


def test_compiled_by_xla_with_a_batch_of_unknown_size(reference):
    import tensorflow as tf

    model = loaded(reference, "SD 1")
    signature = [
        tf.TensorSpec((None, 9, 13, 4)),
        tf.TensorSpec((None,), "int32"),
        tf.TensorSpec((None, 5, 12)),
    ]
    compiled = tf.function(lambda *inputs: model(list(inputs)), input_signature=signature, jit_compile=True)
    assert distance(compiled(*inputs_of("SD 1", "9x13")), reference["SD 1/9x13"]) < 2e-5


@pytest.mark.parametrize(
    ("policy", "stored", "tolerance"),
    [
        ("float16", "float16", 0.02),
        ("bfloat16", "bfloat16", 0.15),
        ("mixed_bfloat16", "float32", 0.15),
    ],
)
def test_half_precision_is_near(reference, policy, stored, tolerance):
    model = loaded(reference, "SD 2", policy)
    assert {variable.dtype for variable in model.weights} == {stored}
    assert tolerance / 100 < distance(model(inputs_of("SD 2", "16x8")), reference["SD 2/16x8"]) < tolerance


def test_timesteps_are_not_rounded_to_half_precision(reference):
    model = loaded(reference, "SD 1", "bfloat16")
    latents, timesteps, context = inputs_of("SD 1", "16x8")
    whole = ops.convert_to_numpy(model([latents, timesteps, context]))
    real = ops.convert_to_numpy(model([latents, timesteps.astype("float32"), context]))
    np.testing.assert_array_equal(whole, real)
    # The nearest number to 999 in bfloat16.
    rounded = ops.convert_to_numpy(model([latents, np.array([1000, 7], "int32"), context]))
    assert np.abs(rounded[0] - whole[0]).max() > 0
