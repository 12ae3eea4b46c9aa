"""Updates of every kind, written by LyCORIS and PEFT, merged into kernels as these libraries merge them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.weights.lora import read_lora
from keras_sd.weights.lora_updates import Decomposed, Hadamard, Kronecker, change_of
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference

# name -> options of LyCORIS' `create_network`, as kohya's --network_args gives them.
LYCORIS = {
    "locon": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2},
    "tucker": {"algo": "locon", "conv_dim": 3, "use_tucker": True},
    "rank_stabilized": {"algo": "locon", "rs_lora": True},
    "dora": {"algo": "locon", "conv_dim": 2, "dora_wd": True},
    "dora_by_input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha", "conv_dim": 2},
    "loha_tucker": {"algo": "loha", "conv_dim": 2, "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr_both": {"algo": "lokr", "decompose_both": True, "factor": 8},
    "lokr_tucker": {"algo": "lokr", "use_tucker": True, "factor": 2, "dora_wd": True},
    "lokr_full": {"algo": "lokr", "full_matrix": True, "factor": 4},
}
PEFT = {
    "peft_dora": {"use_dora": True, "use_rslora": True},
    "peft_patterns": {"use_dora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 5}},
}
WEIGHT = 0.7

SCRIPT = r"""
    import json
    from diffusers import StableDiffusionPipeline
    from lycoris.kohya import create_network
    from lycoris.logging import logger
    from peft import LoraConfig, get_peft_model

    logger.setLevel("ERROR")
    cases = json.loads((folder / "cases.json").read_text())
    # LyCORIS' own preset names the layers of the timestep twice, which it then refuses.
    (folder / "preset.toml").write_text(
        'enable_conv = true\nunet_target_name = []\n'
        'unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]\n'
        'text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]\ntext_encoder_target_name = []\n')

    def pipeline():
        return StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)

    def randomize_all(parameters):
        for parameter in parameters:
            parameter.data += 0.3 * torch.randn_like(parameter)

    for name, options in cases["lycoris"].items():
        pipe = pipeline()
        network = create_network(1.0, 2, 1.0, pipe.vae, pipe.text_encoder, pipe.unet,
                                 preset=str(folder / "preset.toml"), **options)
        network.apply_to(pipe.text_encoder, pipe.unet, True, True)
        randomize_all(network.parameters())
        network.save_weights(folder / f"{name}.safetensors", torch.float32, {})
        names = {module: name for part in ("unet", "text_encoder") for name, module in (
            (f"{part}.{path}", module) for path, module in getattr(pipe, part).named_modules())}
        for lora in network.loras:
            layer, base = names[lora.org_module[0]], lora.org_module[0].weight
            layer = layer.replace("text_encoder.encoder", "text_encoder.text_model.encoder")  # transformers 5
            # The update as the forward pass of training has it: the merge of LyCORIS 4.1 scales LoKr twice.
            scaled = lora.get_weight(lora.shape) if hasattr(lora, "get_weight") else lora.get_diff_weight()[0]
            new = base + scaled.reshape(base.shape)
            outputs[f"{name}/{layer}"] = (lora.apply_weight_decompose(new) if lora.wd else new) - base
    for name, options in cases["peft"].items():
        for weight in (1.0, cases["weight"]):
            torch.manual_seed(3)
            unet = pipeline().unet
            model = get_peft_model(unet, LoraConfig(
                r=4, lora_alpha=6, init_lora_weights=False,
                target_modules=["to_q", "to_k", "proj_in", "conv1", "ff.net.2"], **options))
            before = {key: value.clone() for key, value in unet.state_dict().items()
                      if "base_layer.weight" in key}
            randomize_all(parameter for parameter in model.parameters() if parameter.requires_grad)
            model.save_pretrained(folder / name)
            for module in unet.modules():
                if hasattr(module, "scaling"):
                    module.scale_layer(weight)
            model.merge_adapter()
            for key, value in before.items():
                layer = key.removesuffix(".base_layer.weight")
                outputs[f"{name}/{weight}/unet.{layer}"] = unet.state_dict()[key] - value
"""


def models(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(jit_compile=False)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    pipeline.save(folder / "model")
    cases = {"lycoris": LYCORIS, "peft": PEFT, "weight": WEIGHT}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return run_reference(SCRIPT, {}, folder)


def kernels(pipeline):
    return {
        f"{part}.{name.removesuffix('.weight')}": array
        for part, model in models(pipeline).items()
        for name, array in torch_state(model).items()
    }


def merged(pipeline, path, **options):
    """What a LoRA adds to each kernel that it changes."""
    before = kernels(pipeline)
    pipeline.load_lora(path, **options)
    changes = {name: array - before[name] for name, array in kernels(pipeline).items()}
    pipeline.unload_lora()
    for name, array in kernels(pipeline).items():
        np.testing.assert_array_equal(array, before[name])
    return {name: array for name, array in changes.items() if array.any()}


def assert_same_changes(ours, theirs):
    theirs = {name: array for name, array in theirs.items() if array.any()}
    assert ours.keys() == theirs.keys() and ours
    for name, array in theirs.items():
        assert np.abs(ours[name] - array).max() < 1e-6 * max(1, np.abs(array).max()), name


def group(reference, name):
    return {
        key.removeprefix(f"{name}/"): array for key, array in reference.items() if key.startswith(f"{name}/")
    }


@pytest.mark.parametrize("name", LYCORIS)
def test_kernels_are_those_of_lycoris(pipeline, folder, reference, name):
    theirs = group(reference, name)
    path = folder / f"{name}.safetensors"
    assert_same_changes(merged(pipeline, path), theirs)
    # A weight goes that part of the way, as in A1111 and ComfyUI.
    parts = {layer: np.float32(WEIGHT) * array for layer, array in theirs.items()}
    assert_same_changes(merged(pipeline, path, weight=WEIGHT), parts)


@pytest.mark.parametrize("name", PEFT)
def test_kernels_are_those_of_peft(pipeline, folder, reference, name):
    for weight in (1.0, WEIGHT):
        theirs = group(reference, f"{name}/{weight}")
        assert_same_changes(merged(pipeline, folder / name, weight=weight), theirs)


@pytest.mark.parametrize("name", ["dora", "dora_by_input", "loha_tucker", "lokr_both", "lokr_tucker"])
def test_a_file_is_written_again_with_the_same_updates(pipeline, folder, reference, name, tmp_path):
    lora = read_lora(folder / f"{name}.safetensors", models(pipeline))
    write_lora(tmp_path / "again.safetensors", lora, "kohya")
    assert_same_changes(merged(pipeline, tmp_path / "again.safetensors"), group(reference, name))


def test_the_dialect_of_peft_has_dora_but_no_lokr(pipeline, folder, reference, tmp_path):
    lora = read_lora(folder / "dora.safetensors", models(pipeline))
    write_lora(tmp_path / "peft.safetensors", lora)
    assert_same_changes(merged(pipeline, tmp_path / "peft.safetensors"), group(reference, "dora"))
    for name in ("lokr", "loha"):
        lora = read_lora(folder / f"{name}.safetensors", models(pipeline))
        with pytest.raises(UserError, match="diffusers reads no LoKr and no LoHa; use the dialect kohya"):
            write_lora(tmp_path / "peft.safetensors", lora)


def test_several_of_different_kinds_add_up(pipeline, folder, reference):
    before = kernels(pipeline)
    pipeline.load_lora(folder / "lokr.safetensors", weight=0.5)
    pipeline.load_lora(folder / "dora.safetensors")
    layer = "unet.down_blocks.0.resnets.0.conv1"
    theirs = 0.5 * reference[f"lokr/{layer}"] + reference[f"dora/{layer}"]
    np.testing.assert_allclose(kernels(pipeline)[layer] - before[layer], theirs, atol=1e-6)
    pipeline.unload_lora()


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def array(*shape):
    return np.ones(shape, "float32")


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        (
            {"lokr_w1": array(2, 2), "lokr_w2": array(4, 3)},
            r"is for a layer of \(8, 6\), the model's is \(8, 8\)",
        ),
        ({"lokr_w1": array(2, 2), "lokr_w2_a": array(4, 2)}, "lacks its lokr_w2_b half"),
        ({"lokr_w1": array(2, 2), "lokr_w2_a": array(4, 2), "lokr_w2_b": array(3, 4)}, "do not fit together"),
        ({"lokr_w1": array(2, 2), "lora_down.weight": array(2, 8)}, "tensors of lokr and of lora"),
        (
            {"hada_w1_a": array(8, 2), "hada_w1_b": array(2, 8), "hada_w2_a": array(8, 2)},
            "lacks its hada_w2_b",
        ),
        ({"dora_scale": array(8, 1)}, "lacks its down half"),
        ({"oft_blocks": array(2, 4, 4)}, "oft_blocks is not a tensor of a LoRA"),
        (
            {"lora_down.weight": array(2, 8), "lora_up.weight": array(8, 2), "dora_scale": array(7, 1)},
            r"magnitude of DoRA \(7, 1\) that does not fit",
        ),
        ({"lokr_w1": array(2, 2), "lokr_w2": np.full((4, 4), np.nan, "float32")}, "holds NaN"),
    ],
)
def test_bad_files_are_told_in_one_line(pipeline, tmp_path, tensors, line):
    save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=line) as caught:
        pipeline.load_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value) and not pipeline.adapters.names


def test_a_kernel_of_zeros_stays_finite():
    update = Decomposed(Kronecker((array(2, 2),), (array(2, 2) * 0,), 1.0), array(4))
    assert not change_of(update, np.zeros((4, 4), "float32")).any()
    pair = array(4, 1), array(1, 4)
    np.testing.assert_array_equal(change_of(Hadamard(pair, pair, 3.0), array(4, 4), 2), 6 * array(4, 4))


def test_kohyas_file_of_dora_has_lycoris_shapes(pipeline, folder, reference, tmp_path):
    for name in ("dora", "dora_by_input"):
        lora = read_lora(folder / f"{name}.safetensors", models(pipeline))
        write_lora(tmp_path / "again.safetensors", lora, "kohya")
        files = tmp_path / "again.safetensors", folder / f"{name}.safetensors"
        again, original = (
            {key: value.shape for key, value in load_file(file).items() if key.startswith("lora_unet_")}
            for file in files
        )
        assert again == original
