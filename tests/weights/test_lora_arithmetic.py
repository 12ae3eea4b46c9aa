"""Sums, lower ranks and differences of LoRAs against whole matrices."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.files.writing import write_json
from keras_sd.weights.lora_arithmetic import (
    LoraFile,
    Truncation,
    common_metadata,
    extract_lora,
    extracted,
    read_plain_lora,
    reduced,
    relative_error,
    summed,
)
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_kohya

GENERATOR = np.random.default_rng(0)
LINEAR, CONVOLUTION = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_resnets_0_conv1"


def normal(*shape):
    return GENERATOR.standard_normal(shape, dtype="float32")


def updates(rank=3, alpha=2.0):
    return {
        LINEAR: LowRank(normal(rank, 10), normal(8, rank), alpha),
        CONVOLUTION: LowRank(normal(rank, 6, 3, 3), normal(8, rank, 1, 1), alpha),
    }


def test_a_sum_is_the_sum_of_the_products():
    one, other = updates(), updates(5, 4.0)
    both = summed([(LoraFile(one, {}), 0.5), (LoraFile(other, {}), -2.0)])
    for name, update in both.items():
        wanted = 0.5 * one[name].scaled_product - 2 * other[name].scaled_product
        np.testing.assert_allclose(update.scaled_product, wanted, rtol=1e-5, atol=1e-5)
        assert len(update.down) == 8 and update.up.ndim == update.down.ndim


def test_files_of_different_dialects_add_up(tmp_path):
    layer = "down_blocks.0.attentions.0.proj_in"
    down, up = normal(2, 8), normal(8, 2)
    save_file(
        {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    write_json(tmp_path / "adapter_config.json", {"r": 2, "lora_alpha": 2, "alpha_pattern": {"proj_in": 6}})
    joined = LowRank(down[..., None, None], up[..., None, None], 4.0)  # a 1x1 convolution
    write_kohya(tmp_path / "kohya.safetensors", {f"lora_unet_{layer.replace('.', '_')}": joined})
    files = [read_plain_lora(path) for path in (tmp_path, tmp_path / "kohya.safetensors")]
    (update,) = summed([(file, 1.0) for file in files]).values()
    np.testing.assert_allclose(update.scaled_product, (3 + 2) * up @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [LINEAR, CONVOLUTION])
def test_a_lower_rank_is_the_closest_one(name):
    update = updates(6)[name]
    whole = update.scaled_product.reshape(8, -1)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    result = reduced(update, Truncation(2))
    closest = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(result.scaled_product.reshape(8, -1), closest, rtol=1e-4, atol=1e-4)
    assert result.down.shape == (2, *update.down.shape[1:]) and result.up.ndim == update.up.ndim
    error, length = relative_error(result, update)
    np.testing.assert_allclose([error, length], [(values[2:] ** 2).sum(), (values**2).sum()], rtol=1e-4)
    ratio = values[0] / values[3] * 1.001
    assert len(reduced(update, Truncation(sv_ratio=ratio)).down) == 4
    assert len(reduced(update, Truncation(2, ratio)).down) == 2
    np.testing.assert_allclose(
        reduced(update, Truncation(100)).scaled_product, update.scaled_product, rtol=1e-4, atol=1e-4
    )


def test_an_update_is_extracted_from_two_models():
    update = updates()
    names = {LINEAR: "mid_block.attentions.0.proj_in.weight", CONVOLUTION: "mid_block.resnets.0.conv1.weight"}
    base = {names[name]: normal(*one.shape) for name, one in update.items()}
    base |= {"conv_in.weight": normal(4, 4, 3, 3), "mid_block.resnets.0.conv1.bias": normal(8)}
    base["mid_block.resnets.0.conv2.weight"] = normal(8, 8, 3, 3)
    tuned = {name: array.copy() for name, array in base.items()}
    for name, one in update.items():
        tuned[names[name]] += one.scaled_product
    tuned["conv_in.weight"][0] += 1
    parts = {"unet": base}, {"unet": tuned}
    found, left_out = extract_lora(*parts, Truncation(3), Truncation(3))
    assert left_out == ["unet.conv_in.weight"] and found.keys() == update.keys()
    for name, one in update.items():
        np.testing.assert_allclose(found[name].scaled_product, one.scaled_product, rtol=1e-4, atol=1e-4)
    ranks = [len(one.down) for one in extract_lora(*parts, Truncation(2), Truncation(1))[0].values()]
    assert ranks == [2, 1]
    tuned["mid_block.resnets.0.conv1.weight"][0] = np.nan
    with pytest.raises(UserError, match="conv1.weight: holds NaN or infinity; use undamaged files"):
        extract_lora(*parts, Truncation(3), Truncation(3))
    tuned["other.weight"] = normal(2, 2)
    with pytest.raises(UserError, match="other.weight: is not in both models alike"):
        extract_lora(*parts, Truncation(3), Truncation(3))
    assert extracted(np.zeros((3, 4), "float32"), Truncation(1)) is None


def test_a_tensor_that_the_tuned_model_lacks_is_told():
    base = {"unet": {"mid_block.a.weight": normal(2, 2), "mid_block.b.weight": normal(2, 2)}}
    tuned = {"unet": {"mid_block.a.weight": normal(2, 2)}}
    with pytest.raises(UserError, match="mid_block.b.weight: is not in both models alike"):
        extract_lora(base, tuned, Truncation(1), Truncation(1))


def test_files_that_cannot_be_computed_with_are_told(tmp_path):
    path = tmp_path / "a.safetensors"
    pair = {f"{LINEAR}.lora_down.weight": normal(2, 8), f"{LINEAR}.lora_up.weight": normal(8, 2)}
    for more, fault in (
        ({f"{LINEAR}.dora_scale": normal(8, 1)}, "has dora_scale, and only LoRA and LoCon"),
        ({f"{LINEAR}.alpha": np.float32([np.nan])}, "alpha that is not a finite number"),
        ({"elsewhere.lora_A.weight": normal(2, 8)}, "elsewhere is no layer of Stable Diffusion"),
    ):
        save_file(pair | more, path)
        with pytest.raises(UserError, match=fault):
            read_plain_lora(path)
    other = {LINEAR: LowRank(normal(2, 9), normal(8, 2), 1.0)}
    with pytest.raises(UserError, match="another size in another file"):
        summed([(LoraFile(updates(), {}), 1.0), (LoraFile(other, {}), 1.0)])
    old = {"lora_unet_input_blocks_1_1_proj_in": updates()[LINEAR]}
    with pytest.raises(UserError, match="latent-diffusion's names"):
        summed([(LoraFile(updates(), {}), 1.0), (LoraFile(old, {}), 1.0)])


def test_headers_keep_what_all_sources_say(tmp_path):
    one = {
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "a",
        "ss_network_dim": "3",
        "sshs_model_hash": "1",
    }
    two = {"ss_base_model_version": "sd_v1", "ss_output_name": "b"}
    files = [LoraFile(updates(), one), LoraFile(updates(), two)]
    metadata = common_metadata(files, summed([(file, 1.0) for file in files]))
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_network_dim"] == "6"
    assert "ss_output_name" not in metadata and "sshs_model_hash" not in metadata
    write_kohya(tmp_path / "a.safetensors", updates(), "float16", metadata)
    assert {array.dtype.name for array in load_file(tmp_path / "a.safetensors").values()} == {"float16"}
