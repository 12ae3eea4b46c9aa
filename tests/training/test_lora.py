"""Low-rank updates: where they go, what they change, what is trained."""

import numpy as np
import pytest

from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.training.adapter_settings import UNET_ALL, UNET_ATTENTION
from keras_sd.training.lora import add_lora, lora_tensors, without_updates
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.weights.rules import torch_state
from tests import tiny


@pytest.fixture
def inputs():
    generator = np.random.default_rng(0)
    latents, context = generator.standard_normal((2, 4, 4, 4)), generator.standard_normal((2, 12, 16))
    return [latents.astype("float32"), np.array([3, 700]), context.astype("float32")]


@pytest.mark.parametrize("config", [tiny.SD1_UNET, tiny.SD2_UNET], ids=["convolutions", "linear"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_update_is_what_the_merged_kernels_give(config, everywhere, inputs):
    unet = tiny.randomize(UNet(config))
    before = np.asarray(unet(inputs))
    add_lora(unet, 3, 6.0, everywhere=everywhere)
    np.testing.assert_array_equal(unet(inputs), before)  # it begins at zero

    for index, variable in enumerate(unet.trainable_variables):
        variable.assign(0.1 * np.random.default_rng(index).standard_normal(variable.shape).astype("float32"))
    updated = np.asarray(unet(inputs))
    assert np.abs(updated - before).max() > 0.01
    with without_updates(unet):
        np.testing.assert_array_equal(unet(inputs), before)
    np.testing.assert_array_equal(unet(inputs), updated)

    state = torch_state(unet)
    merged = UNet(config)
    for name, variable, _ in parameter_paths(merged):
        kernel = state[name]
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            down, up = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
            kernel = kernel + 6.0 / 3 * np.einsum("or,r...->o...", up.reshape(*up.shape[:2]), down)
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(kernel.ndim, (0,))
        variable.assign(kernel.transpose(axes))
    np.testing.assert_allclose(merged(inputs), updated, rtol=1e-3, atol=1e-4)


def test_attention_alone_or_all_layers_are_updated():
    for everywhere, ends in ((False, UNET_ATTENTION), (True, UNET_ALL)):
        unet = UNet(tiny.SD1_UNET)
        kernels = [name for name in torch_state(unet) if name.endswith(".weight") and "norm" not in name]
        add_lora(unet, 2, 2, everywhere=everywhere)
        updated = {name.split(".lora_")[0] for name in lora_tensors(unet)}
        wanted = {
            name.removesuffix(".weight")
            for name in kernels
            if name.removesuffix(".weight").endswith(tuple(f".{end}" for end in ends))
        }
        assert updated == wanted
        assert len(unet.trainable_variables) == 2 * len(updated)


def test_only_the_updates_of_both_models_are_trained():
    words = tiny.tokenizer()
    unet, text_encoder = UNet(tiny.SD1_UNET), TextEncoder(tiny.text_encoder_config(words))
    add_lora(unet, 2, 2)
    add_lora(text_encoder, 2, 2)
    pipeline = tiny.pipeline(jit_compile=False)
    objective = DiffusionObjective(unet, NoiseSchedule(pipeline.scheduler_config), text_encoder=text_encoder)
    names = {id(parameter.variable): parameter.name for parameter in parameter_paths(objective)}
    trained = [names[id(variable)] for variable in objective.trainable_variables]
    assert trained and all(".lora_" in name for name in trained)
    assert any(name.startswith("text_encoder.") for name in trained)


def test_rank_and_model_are_checked():
    with pytest.raises(UserError, match="rank 0"):
        add_lora(UNet(tiny.SD1_UNET), 0, 1)
    with pytest.raises(UserError, match="no attention"):
        add_lora(UNet(tiny.PIXEL_UNET), 2, 2)
