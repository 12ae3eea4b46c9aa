"""LoRA files against diffusers' and PEFT's own, in every dialect; and LoRAs at work in a pipeline."""

import concurrent.futures
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.files.writing import write_json
from keras_sd.weights.lora import read_lora
from keras_sd.weights.lora_files import PEFT_FILE, lora_file
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference

# PEFT makes two LoRAs of a tiny pipeline, diffusers writes them and draws latents with them; then it loads
# what we have written.
SCRIPT = """
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

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
# PEFT's own folder, and diffusers' file with all of PEFT's config in its header.
for name, options in (
    ("plain", dict(r=4, lora_alpha=16)),
    ("rank_stabilized", dict(r=4, lora_alpha=6, use_rslora=True)),
    ("patterns", dict(
        r=4, lora_alpha=8, rank_pattern={"to_k": 2, "attn2.to_v": 3},
        alpha_pattern={"attn1.to_q": 20, r"down_blocks\\.0\\..*to_k": 5, "^mid_block.*proj_in": 1},
    )),
):
    pipe = pipeline()
    torch.manual_seed(7)
    targets = ["to_q", "to_k", "to_v", "proj_in"]
    model = get_peft_model(pipe.unet, LoraConfig(target_modules=targets, init_lora_weights=False, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    outputs[f"{name}_folder"] = latents(pipe)
    model.save_pretrained(folder / f"{name}_folder")
    config = {key: list(value) if isinstance(value, set) else value
              for key, value in model.peft_config["default"].to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        folder / f"{name}_file", unet_lora_adapter_metadata=config,
        unet_lora_layers={key.removeprefix("base_model.model."): value
                          for key, value in get_peft_model_state_dict(model).items()},
    )
    pipe = pipeline()
    pipe.load_lora_weights(folder / f"{name}_file")
    outputs[f"{name}_file"] = latents(pipe)
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
    return pipeline.denoise(noise, context[None], negative[None], num_inference_steps=4, guidance_scale=3.0)


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("name", ["first", "second"])
def test_latents_with_a_lora_of_diffusers(pipeline, folder, reference, noise, name):
    assert close(latents(pipeline, noise), reference["base"])
    pipeline.load_lora(folder / name, name)
    assert close(latents(pipeline, noise), reference[name])
    assert not close(reference["base"], reference[name])
    pipeline.unload_lora()


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("name", ["plain", "rank_stabilized", "patterns"])
def test_strength_is_what_pefts_config_says(pipeline, folder, reference, noise, name, kind):
    pipeline.load_lora(folder / f"{name}_{kind}")
    assert close(latents(pipeline, noise), reference[f"{name}_{kind}"])
    pipeline.unload_lora()


def peft_folder(folder, tmp_path, **changes):
    """A copy of a folder that PEFT wrote, its config changed."""
    config = json.loads((folder / "plain_folder" / "adapter_config.json").read_text())
    write_json(tmp_path / "adapter_config.json", config | changes)
    shutil.copy(folder / "plain_folder" / "adapter_model.safetensors", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"use_dora": True}, "lacks a magnitude of DoRA, against use_dora of its config"),
        ({"use_dora": 1}, "use_dora 1"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 8}, "says rank 8 for .* whose update has 4"),
        ({"r": "4"}, "r '4': input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan is not a usable number"),
        ({"lora_alpha": 10**90}, "lora_alpha 1000.* is not a usable number"),
        ({"alpha_pattern": {"to_q": 1.5, "to_k": "x"}}, "alpha_pattern.to_k 'x'"),
        ({"alpha_pattern": [1]}, "alpha_pattern: not a JSON dictionary"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complex a pattern"),
        ({"rank_pattern": {"(": 4}}, "too complex a pattern"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
        ({"alpha_pattern": {".?" * 60 + "!": 3}}, "too complex a pattern"),
        ({"alpha_pattern": {r"\(?" * 60 + "!": 3}}, "too complex a pattern"),
        ({"rank_pattern": {"(.|.)" * 50 + "!": 3}}, "too complex a pattern"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(
    pipeline, folder, reference, tmp_path, changes, line
):
    with pytest.raises(UserError, match=line) as caught:
        pipeline.load_lora(peft_folder(folder, tmp_path, **changes))
    assert "\n" not in str(caught.value) and not pipeline.adapters.names


def test_weights_of_peft_without_their_config_are_told_of(pipeline, folder, reference, tmp_path):
    shutil.copy(folder / "plain_folder" / "adapter_model.safetensors", tmp_path / "ink.safetensors")
    with pytest.warns(UserWarning, match="adapter_config.json"):
        pipeline.load_lora(tmp_path / "ink.safetensors")
    pipeline.unload_lora()


@pytest.mark.parametrize(
    "names", [("a/model.safetensors", "b/model.safetensors"), ("ink-v1.5", "ink-v1"), ("c.safetensors",) * 2]
)
def test_loras_of_one_stem_all_act(pipeline, folder, noise, tmp_path, names):
    lora = random_lora(pipeline)
    for name in names:
        path = tmp_path / name
        write_lora(path if path.suffix == ".safetensors" else path / PEFT_FILE, lora)
    pipeline.load_lora(tmp_path / names[0], weight=0.75)
    wanted = latents(pipeline, noise)
    pipeline.unload_lora()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        called = [pipeline.load_lora(tmp_path / name, weight=0.375) for name in names]
    assert called == list(pipeline.adapters.names) and len(set(called)) == 2
    usual = [Path(name).name.removesuffix(".safetensors") for name in names]
    assert called[0] == usual[0] and (called[1] == usual[1]) == (usual[0] != usual[1])
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(told) == (usual[0] == usual[1])
    assert all(f"prompts call this one {called[1]!r}" in line for line in told)
    np.testing.assert_allclose(latents(pipeline, noise), wanted, atol=1e-5)
    with pytest.raises(UserError, match="loaded already; give another name"):
        pipeline.load_lora(tmp_path / names[0], called[1])
    pipeline.unload_lora()


def test_a_scale_is_multiplied_in_float32(pipeline, tmp_path):
    generator = np.random.default_rng(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = generator.standard_normal((128, 8)), 1e-4 * generator.standard_normal((8, 128))
    half = LowRank(down.astype("float16"), up.astype("float16"), 0.25)
    for dialect in ("peft", "kohya"):
        path = tmp_path / f"{dialect}.safetensors"
        write_lora(path, {"unet": {layer: half}}, dialect)
        assert load_file(path).popitem()[1].dtype == np.float16 or dialect == "kohya"
        product = read_lora(path, models(pipeline))["unet"][layer].scaled_product
        assert np.abs(product - half.scaled_product).max() < 2e-3 * half.scaled_product.std()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_weights_and_alphas_that_are_no_numbers_are_refused(pipeline, folder, tmp_path, weight):
    with pytest.raises(UserError, match="is not a finite number"):
        pipeline.load_lora(folder / "ours_kohya.safetensors", weight=weight)
    assert not pipeline.adapters.names
    if isinstance(weight, float):
        tensors = load_file(folder / "ours_kohya.safetensors")
        name = next(name for name in tensors if name.endswith("alpha"))
        save_file(tensors | {name: np.float32([weight])}, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match="alpha that is not a finite number"):
            pipeline.load_lora(tmp_path / "bad.safetensors")


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
    options = {"num_inference_steps": 2, "progress": False}
    plain = pipeline.text_to_image("red heart", **options)
    pipeline.load_lora(folder / "ours_peft.safetensors", "ours", 0.8)
    wanted = pipeline.text_to_image("red heart", **options)
    pipeline.unload_lora()
    pipeline.lora_folder = folder
    tagged = pipeline.text_to_image("red heart<lora:ours_peft:0.8>", **options)
    np.testing.assert_array_equal(tagged, wanted)
    assert (tagged != plain).any()
    np.testing.assert_array_equal(pipeline.text_to_image("red heart", **options), plain)
    # Threads take turns: one's LoRA is not seen by the other.
    prompts = ["red heart<lora:ours_peft:0.8>", "red heart"] * 3
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        images = threads.map(lambda prompt: pipeline.text_to_image(prompt, **options), prompts)
        for made, expected in zip(images, [wanted, plain] * 3, strict=True):
            np.testing.assert_array_equal(made, expected)
    with pytest.raises(UserError, match="prompt: <lora:unheard> is not in .*, which has .*ours_peft"):
        pipeline.text_to_image("red heart <lora:unheard:1>", **options)
    with pytest.raises(UserError, match="no number"):
        pipeline.text_to_image("red heart <lora:ours_peft:much>", **options)
    with pytest.raises(UserError, match="different LoRAs"):
        pipeline.text_to_image(["a <lora:ours_peft:1>", "b"], **options)
    pipeline.lora_folder = None
    with pytest.warns(UserWarning, match="unheard.* is left out, as no LoRA of that name is loaded"):
        pipeline.text_to_image("red heart <lora:unheard:1>", **options)
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
        "is not a tensor of a LoRA": {"conv_in.weight": tensors[down]},
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


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def halves(form, rank=2, value=1.0):
    """The tensors of an update of `LAYER`; `form` has {} where A or B stands."""
    down, up = np.full((rank, 8), value, "float32"), np.full((8, rank), value, "float32")
    return {form.format("A"): down, form.format("B"): up}


def updated(pipeline):
    return torch_state(pipeline.unet)[f"{LAYER}.weight"]


@pytest.mark.parametrize(
    "other", ["unet.{}.lora_{{}}.second.weight", "base_model.model.{}.lora_{{}}.weight", "kohya"]
)
def test_a_second_update_of_a_layer_is_refused(pipeline, tmp_path, other):
    first = halves(f"unet.{LAYER}.lora_{{}}.weight")
    if other == "kohya":
        kohya = f"lora_unet_{LAYER.replace('.', '_')}.lora_"
        second = dict(zip((f"{kohya}down.weight", f"{kohya}up.weight"), first.values(), strict=True))
    else:
        second = halves(other.format(LAYER))
    save_file(first | second, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is a second (down|up) for unet.down_blocks"):
        pipeline.load_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("rank", "config", "strength"),
    [(2, {"r": 2}, 4), (8, {}, 1), (8, {"lora_alpha": 16}, 2), (2, {"r": 2, "lora_alpha": None}, 4)],
)
def test_what_a_config_leaves_out_is_as_in_peft(pipeline, tmp_path, rank, config, strength):
    before = updated(pipeline)
    save_file(
        halves(f"base_model.model.{LAYER}.lora_{{}}.weight", rank), tmp_path / "adapter_model.safetensors"
    )
    write_json(tmp_path / "adapter_config.json", config)
    pipeline.load_lora(tmp_path)
    np.testing.assert_allclose(updated(pipeline) - before, strength * rank, rtol=1e-5)
    pipeline.unload_lora()


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nowhere"])
def test_a_config_that_is_no_file_is_refused(pipeline, tmp_path, kind):
    save_file(halves(f"base_model.model.{LAYER}.lora_{{}}.weight"), tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    make = {"folder": config.mkdir, "pipe": lambda: os.mkfifo(config)}
    make.get(kind, lambda: config.symlink_to(config if kind == "loop" else tmp_path / "none"))()
    with pytest.raises(UserError, match="adapter_config.json: (cannot be read|not found)"):
        pipeline.load_lora(tmp_path)


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"unet": {"r": 2, "lora_alpha": 8}}, 4),
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4),
        ({"alpha_pattern": {"to_q": 6}, "rank_pattern": {"to_q": 2}}, 3),
        ({"transformer.r": 2, "transformer.lora_alpha": 8}, "'transformer.r' does not belong to unet"),
        ({"unet": 5}, "'unet' does not belong to unet"),
    ],
)
def test_a_headers_config_is_honoured_or_refused_by_name(pipeline, tmp_path, config, strength):
    path, before = tmp_path / "a.safetensors", updated(pipeline)
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(halves(f"unet.{LAYER}.lora_{{}}.weight"), path, metadata)
    if isinstance(strength, str):
        with pytest.raises(UserError, match=strength):
            pipeline.load_lora(path)
        return
    pipeline.load_lora(path)
    np.testing.assert_allclose(updated(pipeline) - before, strength * 2, rtol=1e-5)
    pipeline.unload_lora()


def test_an_empty_or_an_overflowing_update_changes_nothing(pipeline, tmp_path):
    before, form, path = updated(pipeline), f"unet.{LAYER}.lora_{{}}.weight", tmp_path / "a.safetensors"
    save_file(halves(form, 0), path)
    with pytest.raises(UserError, match="a half that is empty"):
        pipeline.load_lora(path)
    save_file(halves(form, value=1e30), path)
    with pytest.raises(UserError, match="LoRA 'a': makes unet.down_blocks.* infinite in float32"):
        pipeline.load_lora(path)
    save_file(halves(form), path)
    for weight in (1e39, 1e308):
        with pytest.raises(UserError, match="infinite in float32; use a smaller weight"):
            pipeline.load_lora(path, weight=weight)
    assert not pipeline.adapters.names and not pipeline.adapters.files
    np.testing.assert_array_equal(updated(pipeline), before)
    pipeline.load_lora(path)
    with_it = updated(pipeline)
    with pytest.raises(UserError, match="infinite in float32"):
        pipeline.set_lora_weights({"a": 1e39})
    assert pipeline.adapters.weights == {"a": 1.0}
    np.testing.assert_array_equal(updated(pipeline), with_it)
    pipeline.unload_lora()
    np.testing.assert_array_equal(updated(pipeline), before)


def test_arguments_of_another_type_or_length_are_told_in_one_line(pipeline, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(halves(f"unet.{LAYER}.lora_{{}}.weight"), path)
    for options in (
        *({"path": value} for value in ("a" * 300, "x\0", None, 5, [])),
        *({"name": value} for value in (5, "", [], "a:b")),
        *({"weight": value} for value in (10**400, 10**9000, np.array([0, 1]), 1j)),
    ):
        with pytest.raises(UserError) as caught:
            pipeline.load_lora(**{"path": path} | options)
        assert "\n" not in str(caught.value)
    for call in (pipeline.set_lora_weights, pipeline.unload_lora):
        with pytest.raises(UserError):
            call([5])
    pipeline.lora_folder = tmp_path
    assert not pipeline.find_lora("A" * 300) and not pipeline.find_lora("x\0") and pipeline.find_lora("a")
    (tmp_path / "peft").mkdir()
    save_file(
        halves(f"unet.{LAYER}.lora_{{}}.weight"), tmp_path / "peft" / "pytorch_lora_weights.safetensors"
    )
    assert pipeline.find_lora("peft") and not pipeline.find_lora(".")
    pipeline.lora_folder = tmp_path / "peft" / "inner"
    assert not pipeline.find_lora("..")
    pipeline.lora_folder = None
    pipeline.unload_lora()


def test_folders_near_a_lora_are_told(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    save_file({"a": np.zeros(1)}, run / "model" / "pytorch_lora_weights.safetensors")
    (run / "checkpoint-4").mkdir()
    (tmp_path / "loras").mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "loras" / "ink.safetensors")
    (tmp_path / "empty").mkdir()
    for folder, remedy in (
        (run, f"give {run / 'model'}"),
        (run / "checkpoint-4", f"give {run / 'model'}"),
        (tmp_path / "loras", f"give one of {tmp_path / 'loras' / 'ink.safetensors'}"),
        (tmp_path / "empty", "give a file, or a folder with pytorch_lora_weights.safetensors"),
    ):
        with pytest.raises(UserError) as error:
            lora_file(folder)
        assert str(error.value) == f"{folder}: is no folder of a LoRA; {remedy}"
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="empty: is a whole model, no LoRA; give it as the model"):
        lora_file(tmp_path / "empty")
