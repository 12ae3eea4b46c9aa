"""LoRA files against diffusers' and PEFT's own, in every dialect; and LoRAs at work in a pipeline."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.weights.lora import LowRank, read_lora, write_lora
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference

# PEFT makes two LoRAs of a tiny pipeline, diffusers writes them and draws latents with them; then it loads
# what we have written.
SCRIPT = """
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]

def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def latents(pipe):
    noise = inputs["noise"].permute(0, 3, 1, 2)
    result = pipe("red heart", negative_prompt="", latents=noise, num_inference_steps=4, guidance_scale=3.0,
                  output_type="latent").images
    return result.permute(0, 2, 3, 1)

outputs = {"base": latents(pipeline())}
for index, (name, rank, alpha, targets) in enumerate((
    ("first", 4, 8, ["to_q", "to_k", "to_v", "to_out.0"]),
    ("second", 2, 2, ["to_q", "conv1", "proj_in", "ff.net.2"]),
)):
    pipe = pipeline()
    torch.manual_seed(index)
    options = dict(r=rank, lora_alpha=alpha, init_lora_weights=False)
    pipe.unet.add_adapter(LoraConfig(target_modules=targets, **options))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT, **options))
    for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]:
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    outputs[name] = latents(pipe)
    StableDiffusionPipeline.save_lora_weights(
        folder / name,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        unet_lora_adapter_metadata={"r": rank, "lora_alpha": alpha, "target_modules": targets},
        text_encoder_lora_adapter_metadata={"r": rank, "lora_alpha": alpha, "target_modules": TEXT},
    )
pipe = pipeline()
# Added up by hand: a second adapter makes transformers 5.23 draw those of its text encoder's first one anew.
for name, weight in (("first", 2 * 0.7), ("second", -0.5)):
    tensors = load_file(folder / name / "pytorch_lora_weights.safetensors")
    for key in tensors:
        if ".down." in key or "lora_A" in key:
            other = tensors[key.replace(".down.", ".up.").replace("lora_A", "lora_B")]
            layer = key.split(".lora")[0].partition(".")[2]
            module = (pipe.unet if key.startswith("unet") else pipe.text_encoder).get_submodule(layer)
            module.weight += weight * (other.flatten(1) @ tensors[key].flatten(1)).view_as(module.weight)
outputs["both"] = latents(pipe)
for dialect in ("peft", "kohya"):
    pipe = pipeline()
    pipe.load_lora_weights(folder / f"ours_{dialect}.safetensors")
    outputs[f"ours_{dialect}"] = latents(pipe)
"""


def random_lora(pipeline, alpha=3.0):
    """Updates of every kind of layer: attention, feed-forward, convolutions, the text encoder."""
    generator = np.random.default_rng(0)
    ends = ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "q_proj", "fc1")
    lora = {}
    for part in ("unet", "text_encoder"):
        for name, kernel in torch_state(getattr(pipeline, part)).items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer.endswith(ends):
                down = 0.2 * generator.standard_normal((2, *kernel.shape[1:]))
                up = 0.2 * generator.standard_normal((len(kernel), 2, *(1,) * (kernel.ndim - 2)))
                update = LowRank(down.astype("float32"), up.astype("float32"), alpha)
                lora.setdefault(part, {})[layer] = update
    return lora


def models(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(jit_compile=False)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(5).standard_normal((1, 4, 4, 4), dtype="float32")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    pipeline.save(folder / "model")
    lora = random_lora(pipeline)
    write_lora(folder / "ours_peft.safetensors", lora, "peft")
    # diffusers 0.42 loses a text encoder's q_proj of kohya's files.
    write_lora(folder / "ours_kohya.safetensors", {"unet": lora["unet"]}, "kohya")
    return folder


@pytest.fixture(scope="module")
def reference(folder, noise):
    return run_reference(SCRIPT, {"noise": noise}, folder)


def latents(pipeline, noise):
    context, negative = pipeline.encode_text(["red heart", ""])
    return pipeline.denoise(noise, context[None], negative[None], num_steps=4, guidance_scale=3.0)


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("name", ["first", "second"])
def test_latents_with_a_lora_of_diffusers(pipeline, folder, reference, noise, name):
    assert close(latents(pipeline, noise), reference["base"])
    pipeline.load_lora(folder / name, name)
    assert close(latents(pipeline, noise), reference[name])
    assert not close(reference["base"], reference[name])
    pipeline.unload_lora()


def test_several_with_weights_add_up(pipeline, folder, reference, noise):
    pipeline.load_lora(folder / "first", weight=0.7)
    pipeline.load_lora(folder / "second", weight=-0.5)
    assert close(latents(pipeline, noise), reference["both"])
    pipeline.set_lora_weights({"first": 1.0})
    assert close(latents(pipeline, noise), reference["first"])
    pipeline.unload_lora()


@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_diffusers_draws_the_same_with_what_we_write(pipeline, folder, reference, noise, dialect):
    pipeline.load_lora(folder / f"ours_{dialect}.safetensors")
    assert close(latents(pipeline, noise), reference[f"ours_{dialect}"])
    pipeline.unload_lora()


def test_unloading_gives_the_weights_back_bit_for_bit(pipeline, folder):
    before = {part: torch_state(model) for part, model in models(pipeline).items()}
    pipeline.load_lora(folder / "ours_kohya.safetensors", "one", 0.3)
    pipeline.load_lora(folder / "ours_peft.safetensors", "two", 0.9)
    touched = torch_state(pipeline.unet)
    assert any((touched[name] != array).any() for name, array in before["unet"].items())
    pipeline.unload_lora("two")
    pipeline.unload_lora("one")
    for part, model in models(pipeline).items():
        for name, array in torch_state(model).items():
            np.testing.assert_array_equal(array, before[part][name])


def test_kohya_keeps_alpha_and_every_bit(pipeline, tmp_path):
    lora = random_lora(pipeline)
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    again = read_lora(tmp_path / "a.safetensors", models(pipeline))
    assert {part: set(layers) for part, layers in again.items()} == {p: set(ls) for p, ls in lora.items()}
    for part, layers in lora.items():
        for layer, update in layers.items():
            for mine, theirs in zip(update, again[part][layer], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_other_spellings_are_read(pipeline, tmp_path):
    """Latent-diffusion's names joined, the processors of early diffusers, PEFT's own prefix and adapter."""
    update = LowRank(np.ones((2, 8), "float32"), np.ones((8, 2), "float32"), 2.0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    spelt = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_{}.weight": ("down", "up"),
        f"unet.{layer}.processor.to_out_lora.{{}}.weight": ("down", "up"),
        f"base_model.model.{layer}.to_out.0.lora_{{}}.default.weight": ("A", "B"),
        f"unet.{layer}.to_out.0.lora.{{}}.weight": ("down", "up"),
    }
    for index, (key, halves) in enumerate(spelt.items()):
        path = tmp_path / f"{index}.safetensors"
        save_file({key.format(half): array for half, array in zip(halves, update, strict=False)}, path)
        assert list(read_lora(path, models(pipeline))["unet"]) == [f"{layer}.to_out.0"]


def test_tags_of_prompts_hold_for_their_call(pipeline, folder):
    options = {"num_steps": 2, "progress": False}
    plain = pipeline.text_to_image("red heart", **options)
    pipeline.load_lora(folder / "ours_peft.safetensors", "ours", 0.8)
    wanted = pipeline.text_to_image("red heart", **options)
    pipeline.unload_lora()
    pipeline.lora_folder = folder
    tagged = pipeline.text_to_image("red heart<lora:ours_peft:0.8>", **options)
    np.testing.assert_array_equal(tagged, wanted)
    assert (tagged != plain).any()
    np.testing.assert_array_equal(pipeline.text_to_image("red heart", **options), plain)
    with pytest.warns(UserWarning, match="unheard"):
        pipeline.text_to_image("red heart <lora:unheard:1>", **options)
    with pytest.raises(UserError, match="no number"):
        pipeline.text_to_image("red heart <lora:ours_peft:much>", **options)
    with pytest.raises(UserError, match="different LoRAs"):
        pipeline.text_to_image(["a <lora:ours_peft:1>", "b"], **options)
    pipeline.lora_folder = None
    pipeline.unload_lora()


def test_bad_files_are_told_in_one_line(pipeline, folder, tmp_path):
    tensors = load_file(folder / "ours_peft.safetensors")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    down, up = name.format("A"), name.format("B")
    faults = {
        "is for a layer of": tensors | {down: np.ones((2, 9), "float32")},
        "lacks its up half": {key: array for key, array in tensors.items() if key != up},
        "do not fit together": tensors | {down: np.ones((3, 8), "float32")},
        "NaN": tensors | {up: np.full_like(tensors[up], np.nan)},
        "no layer unet.elsewhere": tensors | {"unet.elsewhere.lora_A.weight": tensors[down]},
        "no tensor of a LoRA": {"conv_in.weight": tensors[down]},
    }
    for fault, changed in faults.items():
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=fault) as caught:
            pipeline.load_lora(tmp_path / "bad.safetensors")
        assert "\n" not in str(caught.value)
    assert pipeline.adapters.names == ()
    with pytest.raises(UserError, match="dialect"):
        write_lora(tmp_path / "x.safetensors", {}, "loha")
    with pytest.raises(UserError, match="not loaded"):
        pipeline.set_lora_weights({"nothing": 1.0})
