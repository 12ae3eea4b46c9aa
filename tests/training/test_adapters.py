"""DoRA, LoCon and LoKr in layers: what they compute, where they go, and beginning from a file."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.unet import UNet
from keras_sd.training.adapter_settings import AdapterSettings, kronecker_factors
from keras_sd.training.lora import (
    add_lora,
    add_updates,
    assign_updates,
    lora_tensors,
    save_lora,
    trained_updates,
    without_updates,
)
from keras_sd.training.lora_metadata import training_metadata
from keras_sd.weights.lora_updates import change_of
from keras_sd.weights.rules import from_torch, torch_state
from tests import tiny

DORA = {"use_dora": True, "use_rslora": True, "conv_rank": 2, "conv_alpha": 3.0}
LOKR = {"adapter": "lokr", "lokr_factor": 2}


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    latents, context = generator.standard_normal((2, 4, 4, 4)), generator.standard_normal((2, 12, 16))
    return [latents.astype("float32"), np.array([3, 700]), context.astype("float32")]


def with_updates(rank, alpha, **options):
    """A UNet with random weights and random updates."""
    unet = tiny.randomize(UNet(tiny.SD1_UNET))
    add_lora(unet, rank, alpha, everywhere=True, **options)
    for index, variable in enumerate(unet.trainable_variables):
        values = 0.1 * np.random.default_rng(index).standard_normal(variable.shape)
        variable.assign(np.asarray(variable) + values.astype("float32"))
    return unet


@pytest.mark.parametrize(("rank", "options"), [(3, DORA), (1, LOKR), (100, LOKR | {"lokr_factor": None})])
def test_a_layer_computes_what_the_merged_kernel_gives(inputs, rank, options):
    unet = with_updates(rank, 6.0, **options)
    updated = np.asarray(unet(inputs))
    with without_updates(unet):
        before = np.asarray(unet(inputs))
    np.testing.assert_array_equal(unet(inputs), updated)
    assert np.abs(updated - before).max() > 0.01
    plain, updates, state = UNet(tiny.SD1_UNET), trained_updates(unet), torch_state(unet)
    names = " ".join(updates)
    assert ("downsamplers.0.conv" in names) == ("conv_rank" in options) and "conv_shortcut" in names
    for parameter in parameter_paths(plain):
        kernel = state[parameter.name]
        update = updates.get(parameter.name.removesuffix(".weight"))
        if update is not None:
            kernel = kernel + change_of(update, kernel)
        parameter.variable.assign(from_torch(parameter, kernel))
    np.testing.assert_allclose(plain(inputs), updated, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [DORA, LOKR])
def test_new_updates_have_no_effect(inputs, options):
    unet = tiny.randomize(UNet(tiny.SD1_UNET))
    before = np.asarray(unet(inputs))
    add_lora(unet, 2, 2, everywhere=True, **options)
    np.testing.assert_allclose(unet(inputs), before, atol=2e-6 * np.abs(before).max())


def test_blocks_have_ranks_and_alphas_of_their_own():
    blocks = {"mid_block": 0, "down_blocks.0": 3, "unet.down_blocks.0.attentions.0.proj_in": 5}
    unet = UNet(tiny.SD1_UNET)
    settings = AdapterSettings(rank=2, layers="all", rank_by_block=blocks, alpha_by_block={"up_blocks": 7.0})
    add_updates({"unet": unet}, settings)
    for name, update in trained_updates(unet).items():
        rank = 3 if name.startswith("down_blocks.0.") else 2
        rank = 5 if name == "down_blocks.0.attentions.0.proj_in" else rank
        assert len(update.down) == rank and not name.startswith("mid_block")
        assert update.alpha == pytest.approx(7.0 if name.startswith("up_blocks.") else rank)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rank_by_block": {"mid_blok": 2}}, "rank_by_block mid_blok: no layer .* use down_blocks, "),
        ({"rank_by_block": {"conv_in": 2}}, "rank_by_block conv_in: no layer"),
        ({"rank_by_block": {"mid_block": -1}}, "rank_by_block mid_block=-1: out of range"),
        ({"alpha_by_block": {"mid_block": 0}}, "alpha_by_block mid_block=0: out of range"),
        ({"conv_alpha": 2.0}, "conv_alpha: has no effect without `conv_rank`"),
        ({"lokr_factor": 2}, "lokr_factor: has no effect without `adapter='lokr'`"),
        ({"adapter": "lokr", "use_dora": True}, "use_dora: is not trained with `adapter='lokr'`"),
        ({"adapter": "oft"}, "adapter 'oft': unknown; use lora or lokr"),
        (
            {"adapter": "lokr", "lokr_factor": 7},
            "lokr_factor 7: does not divide 8, a width of unet.*; give one of 2, 4, 8, or leave",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, line):
    unet = UNet(tiny.SD1_UNET)
    with pytest.raises(UserError, match=line) as caught:
        add_lora(unet, 2, 2, **options)
    assert "\n" not in str(caught.value) and not lora_tensors(unet) and unet.trainable_variables


def test_factors_are_those_of_lycoris():
    assert [kronecker_factors(size, None) for size in (128, 250, 360, 127)] == [
        (8, 16), (10, 25), (18, 20), (1, 127),
    ]  # fmt: skip
    assert kronecker_factors(320, 64) == (5, 64)


@pytest.mark.parametrize(("rank", "options"), [(3, DORA), (1, LOKR)])
@pytest.mark.parametrize("file", ["lora_kohya.safetensors", "pytorch_lora_weights.safetensors"])
def test_training_begins_from_a_file(tmp_path, rank, options, file):
    trained = with_updates(rank, 6.0, **options)
    save_lora(tmp_path, {"unet": trained})
    if not (tmp_path / file).exists():
        assert options is LOKR and file.startswith("pytorch")
        return
    unet = tiny.randomize(UNet(tiny.SD1_UNET))
    add_lora(unet, rank, 6.0, everywhere=True, **options)
    assign_updates({"unet": unet}, tmp_path / file)
    state, updates = torch_state(unet), trained_updates(unet)
    for name, update in trained_updates(trained).items():
        kernel = state[f"{name}.weight"]
        np.testing.assert_allclose(change_of(updates[name], kernel), change_of(update, kernel), atol=1e-5)


def test_a_lora_has_the_name_of_its_run(tmp_path):
    sd = tiny.pipeline(unet=tiny.SD1_UNET)
    trained = with_updates(2, 2.0)
    for folder in ("cat/model", "dog/model", "bird"):
        save_lora(tmp_path / folder, {"unet": trained})
    assert [sd.load_lora(tmp_path / path) for path in ("cat/model", "bird")] == ["cat", "bird"]
    assert sd.load_lora(tmp_path / "dog" / "model" / "pytorch_lora_weights.safetensors") == "dog"
    with pytest.warns(UserWarning, match="another LoRA is called 'cat', so prompts call this one 'cat-2'"):
        sd.load_lora(tmp_path / "cat" / "model")


@pytest.mark.parametrize(
    ("rank", "options", "line"),
    [
        (4, {}, "has rank 2, and 4 is trained; give `rank=2`"),
        (2, {"use_dora": True}, "is LoRA, and DoRA is trained"),
        (2, {"adapter": "lokr"}, "is LoRA, and LoKr is trained"),
        (2, {"everywhere": True}, "lacks an update of unet.*, which gets one here"),
        (
            2,
            {"rank_by_block": {"down_blocks.0.attentions.0": 0}},
            "has an update of unet.*none here",
        ),
        (2, {"alpha": 3.0}, "has alpha 5, and 3 is trained; give `lora_alpha=5`"),
    ],
)
def test_a_file_of_other_updates_is_refused(tmp_path, rank, options, line):
    unet = UNet(tiny.SD1_UNET)
    add_lora(unet, 2, 5)
    save_lora(tmp_path, {"unet": unet})
    other = UNet(tiny.SD1_UNET)
    add_lora(other, rank, **({"alpha": 5} | options))
    before = lora_tensors(other)
    with pytest.raises(UserError, match=line) as caught:
        assign_updates({"unet": other}, tmp_path / "lora_kohya.safetensors")
    assert "\n" not in str(caught.value)
    for name, array in lora_tensors(other).items():
        np.testing.assert_array_equal(array, before[name])


def test_headers_are_kohyas_and_the_same_in_each_file(tmp_path):
    unet = UNet(tiny.SD1_UNET)
    settings = AdapterSettings(rank=2, conv_rank=1, rank_by_block={"mid_block": 1})
    add_updates({"unet": unet}, settings)

    class Source:
        def captions(self):
            return [("A cat, close",), ("a cat",), ()]

    options = {
        "output_dir": "runs/cat",
        "pretrained_model_name_or_path": "models/base.safetensors",
        "learning_rate": 0.1,
        "dataset_name": "owner/cats",
        "trigger_words": ("ohwx", "toy"),
    }
    metadata = training_metadata(settings, unet, "v_prediction", 32, options, [Source()], ("unet",))
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_lora(folder, {"unet": unet}, metadata)
    for name in ("lora_kohya.safetensors", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / "lora_kohya.safetensors", "np") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora" and header["ss_sd_model_name"] == "base.safetensors"
    assert json.loads(header["ss_tag_frequency"]) == {"cats": {"a cat": 2, "close": 1}}
    assert json.loads(header["ss_dataset_dirs"]) == {"cats": {"n_repeats": 1, "img_count": 3}}
    assert header["ss_resolution"] == "(32, 32)" and header["modelspec.prediction_type"] == "v"
    assert header["modelspec.trigger_phrase"] == "ohwx, toy" and header["ss_output_name"] == "cat"
    assert "ss_base_model_version" not in header  # of a width that no Stable Diffusion has
