"""The autoencoder of every published config, made small, against diffusers with the same weights."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd import backend
from keras_sd.config import VAEConfig
from keras_sd.models.precision import dtype_policy
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.rules import load_weights
from tests.models import published
from tests.reference import group_of, run_reference

SMALL = {"layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {
    "SD 1": {**published.SD1_VAE, **SMALL, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 2},
    "upscaler": {**published.UPSCALER_VAE, **SMALL, "block_out_channels": [8, 8, 16]},
    "plain": {
        **published.UPSCALER_VAE,
        **SMALL,
        "block_out_channels": [8, 8, 16],
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
SCRIPT = """
    import json
    from diffusers import AutoencoderKL

    for name, config in json.loads((folder / "configs.json").read_text()).items():
        model = randomize(AutoencoderKL.from_config(config), 0.2)
        store_weights(model, name + "/weights")
        posterior = model.encode(inputs["images"].permute(0, 3, 1, 2)).latent_dist
        outputs[name + "/mean"] = posterior.mean.permute(0, 2, 3, 1)
        outputs[name + "/log_variance"] = posterior.logvar.permute(0, 2, 3, 1)
        outputs[name + "/kl"] = posterior.kl()
        decoded = model.decode(inputs["latents"].permute(0, 3, 1, 2)).sample
        outputs[name + "/decoded"] = decoded.permute(0, 2, 3, 1)
"""


def arrays():
    generator = np.random.default_rng(0)
    return {
        "images": generator.uniform(-1, 1, (2, 24, 40, 3)).astype("float32"),
        "latents": generator.standard_normal((2, 3, 5, 4)).astype("float32"),
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "configs.json").write_text(json.dumps(CONFIGS))
    return run_reference(SCRIPT, arrays(), folder)


def loaded(reference, name, policy="float32", **changes):
    with dtype_policy(policy):
        model = AutoencoderKL(VAEConfig.from_dict(CONFIGS[name] | changes))
    load_weights(model, group_of(group_of(reference, name)))
    return model


def distance(actual, expected):
    """The largest difference over the standard deviation."""
    assert keras.backend.standardize_dtype(actual.dtype) == "float32" and actual.shape == expected.shape
    return np.abs(ops.convert_to_numpy(actual) - expected).max() / expected.std()


@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_and_decoding(reference, name):
    model, expected = loaded(reference, name), group_of(reference, name)
    posterior = model.encode(arrays()["images"])
    assert distance(posterior.mean, expected["mean"]) < 2e-5
    assert distance(posterior.log_variance, expected["log_variance"]) < 2e-5
    np.testing.assert_allclose(ops.convert_to_numpy(posterior.kl_divergence()), expected["kl"], rtol=1e-4)
    assert distance(model.decode(arrays()["latents"]), expected["decoded"]) < 2e-5


def test_compiled_by_xla(reference):
    model = loaded(reference, "upscaler")
    decode = backend.jit(model.decode, model.variables)
    assert distance(decode(arrays()["latents"]), reference["upscaler/decoded"]) < 2e-5


@pytest.mark.parametrize(("policy", "tolerance"), [("float16", 0.03), ("bfloat16", 0.3)])
def test_half_precision_is_near(reference, policy, tolerance):
    model, expected = loaded(reference, "SD 1", policy, force_upcast=False), group_of(reference, "SD 1")
    assert {variable.dtype for variable in model.weights} == {policy}
    for outputs, name in (
        (model.encode(arrays()["images"]).mean, "mean"),
        (model.decode(arrays()["latents"]), "decoded"),
    ):
        assert tolerance / 100 < distance(outputs, expected[name]) < tolerance


def test_float16_weights_are_computed_with_in_float32_where_activations_are_too_large(reference):
    upcast, expected = loaded(reference, "SD 1", "float16"), loaded(reference, "SD 1")
    half = loaded(reference, "SD 1", "float16", force_upcast=False)
    for model in (upcast, half, expected):
        for variable in model.decoder.conv_in.weights:
            variable.assign(variable * 1e4)
    assert {variable.dtype for variable in upcast.weights} == {"float16"}
    latents = 100 * arrays()["latents"]
    assert not np.isfinite(ops.convert_to_numpy(half.decode(latents))).all()
    assert distance(upcast.decode(latents), ops.convert_to_numpy(expected.decode(latents))) < 0.03


def test_bfloat16_has_the_range_of_float32(reference):
    assert loaded(reference, "SD 1", "bfloat16").compute_dtype == "bfloat16"
