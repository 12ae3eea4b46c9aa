"""Single files in latent-diffusion's names: read, written, and what diffusers makes of them."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.readers import read_checkpoint
from keras_sd.weights.rules import torch_state
from keras_sd.weights.single_file import read_single_file, write_single_file
from tests import tiny
from tests.models import published
from tests.reference import group_of, run_reference

PRECISIONS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# The smallest models from whose tensors the published kinds are recognised.
SD1_UNET = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
)
SD2_UNET = UNetConfig(
    sample_size=96,
    block_out_channels=(64, 128, 128),
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
    attention_head_dim=(1, 2, 2),
    upcast_attention=True,
    use_linear_projection=True,
)
INPAINTING_UNET = UNetConfig(**{**SD1_UNET.__dict__, "in_channels": 9})
UPSCALER_UNET = UNetConfig(
    sample_size=128,
    in_channels=7,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=96,
    use_linear_projection=True,
    only_cross_attention=(True, True, False),
    num_class_embeds=10,
)


def vae_config(levels=2, **values):
    return VAEConfig(
        block_out_channels=(32, 64, 64)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        force_upcast=True,
        **values,
    )


def text_config(hidden_act="quick_gelu"):
    return TextEncoderConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=8,
        hidden_act=hidden_act,
        projection_dim=64,
        bos_token_id=38,
        eos_token_id=39,
    )


EPSILON = SchedulerConfig.from_dict(published.SD1_SCHEDULER)
V = SchedulerConfig.from_dict(published.SD2_SCHEDULER)
X4_BETAS = {"beta_start": 0.0001, "beta_end": 0.02}
X4 = SchedulerConfig(**X4_BETAS, prediction_type="v_prediction")
UPSCALER_NOISE = SchedulerConfig.from_dict(published.UPSCALER_LOW_RES_SCHEDULER)
MODELS = {
    "sd1": (SD1_UNET, vae_config(), text_config(), EPSILON),
    "sd2": (SD2_UNET, vae_config(sample_size=768), text_config("gelu"), V),
    "inpainting": (INPAINTING_UNET, vae_config(), text_config(), EPSILON),
    "x4": (UPSCALER_UNET, vae_config(3, sample_size=256, scaling_factor=0.08333), text_config("gelu"), X4),
}


def random_tensors(model, config, seed, dtype):
    """Random weights under the names and shapes that the model publishes."""
    with tiny.without_initial_values():
        built = model(config)
    state = torch_state(built)
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(array.shape).astype(dtype) for name, array in state.items()}


def checkpoint(kind, dtype=np.float32):
    unet, vae, text, scheduler = MODELS[kind]
    models = {"unet": (UNet, unet), "vae": (AutoencoderKL, vae), "text_encoder": (TextEncoder, text)}
    parts = {
        name: Part(config.to_dict(), random_tensors(model, config, seed, dtype), name)
        for seed, (name, (model, config)) in enumerate(models.items())
    }
    return Checkpoint(parts, scheduler.noise_schedule())


@pytest.fixture(scope="module")
def checkpoints():
    return {kind: checkpoint(kind) for kind in MODELS}


def assert_same_tensors(given, expected):
    assert sorted(given) == sorted(expected)
    for name, array in expected.items():
        assert given[name].dtype == array.dtype and given[name].shape == array.shape, name
        assert given[name].tobytes() == array.tobytes(), name


def write(path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_single_file(path, model)
    return path


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_round_trips_are_bit_for_bit(checkpoints, tmp_path, kind, dtype):
    model = checkpoints[kind]
    parts = {
        name: Part(
            part.config, {n: a.astype(PRECISIONS[dtype]) for n, a in part.tensors.items()}, part.source
        )
        for name, part in model.parts.items()
    }
    model = model._replace(parts=parts)
    path = write(tmp_path / "model.safetensors", model)
    read = read_single_file(path)
    assert sorted(read.parts) == sorted(model.parts)
    for name, part in model.parts.items():
        assert read.parts[name].config == part.config, name
        assert read.parts[name].source == path
        assert_same_tensors(read.parts[name].tensors, part.tensors)
    assert read.scheduler == model.scheduler and read.tokenizer is None
    low_res = read.low_res_scheduler
    assert (low_res is not None) == (kind == "x4")
    assert low_res is None or SchedulerConfig.from_dict(low_res) == UPSCALER_NOISE


def test_written_in_another_precision(checkpoints, tmp_path):
    model = checkpoints["sd1"]
    write_single_file(tmp_path / "half.safetensors", model, "float16")
    half = read_single_file(tmp_path / "half.safetensors").parts["unet"].tensors
    assert_same_tensors(half, {n: a.astype("float16") for n, a in model.parts["unet"].tensors.items()})
    with pytest.raises(UserError, match="end in .safetensors"):
        write_single_file(tmp_path / "half.ckpt", model)
    with pytest.raises(UserError, match="no text encoder, UNet or VAE to write"):
        write_single_file(tmp_path / "none.safetensors", Checkpoint({}))


def test_what_a_file_cannot_tell_is_named(checkpoints, tmp_path):
    model = checkpoints["sd1"]
    unet = model.parts["unet"]
    changed = {**unet.config, "attention_head_dim": 4, "norm_num_groups": 16}
    model = model._replace(
        parts={**model.parts, "unet": unet._replace(config=changed)}, scheduler=V.noise_schedule()
    )
    with pytest.warns(UserWarning) as told:
        write_single_file(tmp_path / "model.safetensors", model)
    line = str(told[0].message)
    for words in (
        "attention_head_dim 4 (read as 8)",
        "norm_num_groups 16 (read as 32)",
        "prediction_type v_pred",
    ):
        assert words in line


def test_the_sampler_that_a_file_cannot_hold_is_named(checkpoints, tmp_path):
    euler = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    model = checkpoints["sd1"]._replace(scheduler=SchedulerConfig().to_dict() | euler)
    with pytest.warns(UserWarning, match="the sampler EulerDiscreteScheduler and its options .read as DDIM."):
        write_single_file(tmp_path / "model.safetensors", model)


# --- what diffusers reads ----------------------------------------------------------------------------------

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCRIPT = """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    def parts_of(path, local):  # of what has a pipeline class of its own
        yield "unet", UNet2DConditionModel.from_single_file(path, subfolder="unet", **local)
        yield "vae", AutoencoderKL.from_single_file(path, subfolder="vae", **local)
        options = {"subfolder": "text_encoder", "torch_dtype": torch.float32, **local}
        yield "text_encoder", create_diffusers_clip_model_from_ldm(CLIPTextModel, load_file(path), **options)

    for kind in ("sd1", "sd2", "inpainting", "x4"):
        path = str(folder / f"{kind}.safetensors")
        local = {"config": str(folder / kind), "local_files_only": True}
        if kind in ("sd1", "sd2"):
            parts = StableDiffusionPipeline.from_single_file(path, **local).components.items()
        else:
            parts = parts_of(path, local)
        for name, model in parts:
            if isinstance(model, torch.nn.Module):
                store_weights(model, f"{kind}.{name}")

    class Callback:
        best = None

    tensors = load_file(folder / "sd2.safetensors")
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")
    }
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    state = {**tensors, **averages, **extra, "betas": torch.ones(3)}
    torch.save(
        {"state_dict": state, "global_step": 875000, "callbacks": {Callback: Callback()}, "epoch": 1},
        folder / "lightning.ckpt",
    )
    torch.save(tensors, folder / "plain.ckpt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}}, folder / "cat.pt")
"""


@pytest.fixture(scope="module")
def reference(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for kind, model in checkpoints.items():
        write(folder / f"{kind}.safetensors", model)
        for name, part in model.parts.items():
            (folder / kind / name).mkdir(parents=True)
            (folder / kind / name / "config.json").write_text(json.dumps(part.config))
        (folder / kind / "scheduler").mkdir()
        (folder / kind / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler))
        (folder / kind / "model_index.json").write_text(json.dumps(MODEL_INDEX))
        tiny.tokenizer().save(folder / kind / "tokenizer")
    outputs = run_reference(SCRIPT, {}, folder)
    return folder, outputs


def without_prefix(tensors):
    return {name.removeprefix("text_model."): array for name, array in tensors.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_reads_what_is_written(checkpoints, reference, kind):
    for name, part in checkpoints[kind].parts.items():
        expected = group_of(reference[1], f"{kind}.{name}")
        expected = {key: array for key, array in expected.items() if not key.endswith("position_ids")}
        assert_same_tensors(without_prefix(part.tensors), without_prefix(expected))


# --- checkpoints of training -------------------------------------------------------------------------------


def test_averaged_and_raw_weights_of_a_ckpt(checkpoints, reference):
    folder, expected = reference[0], checkpoints["sd2"].parts
    averaged = read_single_file(folder / "lightning.ckpt")
    raw = read_single_file(folder / "lightning.ckpt", weights="raw")
    plain = read_single_file(folder / "plain.ckpt")
    unet = expected["unet"].tensors
    assert_same_tensors(averaged.parts["unet"].tensors, {name: array + 1 for name, array in unet.items()})
    for read in (raw, plain):
        assert_same_tensors(read.parts["unet"].tensors, unet)
    for name in ("vae", "text_encoder"):
        assert_same_tensors(averaged.parts[name].tensors, expected[name].tensors)
    with pytest.raises(UserError, match="use ema or raw"):
        read_checkpoint(folder / "plain.ckpt", weights="best")


def test_what_sd2_predicts(reference):
    def told(name, **options):
        read = read_single_file(reference[0] / name, **options)
        sizes = (read.parts["unet"].config["sample_size"], read.parts["vae"].config["sample_size"])
        return read.scheduler["prediction_type"], *sizes

    assert told("plain.ckpt") == ("v_prediction", 96, 768)
    assert told("lightning.ckpt") == ("epsilon", 64, 512)  # its step is that of the 512-pixel base model
    assert told("lightning.ckpt", prediction_type="v_prediction") == ("v_prediction", 96, 768)
    assert told("sd2.safetensors", prediction_type="epsilon") == ("epsilon", 64, 512)
    assert told("sd1.safetensors", prediction_type="v_prediction") == ("v_prediction", 64, 512)
    with pytest.raises(UserError, match="use epsilon, v_prediction or sample"):
        told("sd1.safetensors", prediction_type="velocity")


def test_the_last_block_of_open_clip_is_left_out(tmp_path):
    config = TextEncoderConfig(**{**text_config("gelu").__dict__, "num_hidden_layers": 24})
    tensors = random_tensors(TextEncoder, config, 0, np.float32)
    path = write(
        tmp_path / "text.safetensors", Checkpoint({"text_encoder": Part(config.to_dict(), tensors, "")})
    )
    stored = load_file(path)
    stored["cond_stage_model.model.text_projection"] = np.ones((64, 48), "float32")
    stored["cond_stage_model.model.logit_scale"] = np.ones((), "float32")
    stored["cond_stage_model.model.attn_mask"] = np.ones((8, 8), "float32")
    save_file(stored, path)
    read = read_single_file(path).parts["text_encoder"]
    assert read.config["num_hidden_layers"] == 23 and read.config["projection_dim"] == 48
    assert_same_tensors(read.tensors, {name: a for name, a in tensors.items() if ".layers.23." not in name})


# --- files of one part -------------------------------------------------------------------------------------


def part_of(path, tensors):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    read = read_single_file(path)
    ((name, part),) = read.parts.items()
    return name, part, read.scheduler


def stored_below(path, *prefixes):
    return {
        name.removeprefix(prefix): array
        for name, array in load_file(path).items()
        for prefix in prefixes
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_files_of_one_part(checkpoints, reference, tmp_path, kind):
    expected, whole = checkpoints[kind].parts, reference[0] / f"{kind}.safetensors"
    path = tmp_path / "part.safetensors"
    ldm = {
        "unet": stored_below(whole, "model.diffusion_model."),
        "vae": {**stored_below(whole, "first_stage_model."), "loss.logvar": np.zeros((), "float32")},
        "text_encoder": stored_below(whole, "cond_stage_model.transformer.", "cond_stage_model.model."),
    }
    for tensors in (ldm, {name: part.tensors for name, part in expected.items()}):
        for name, part in expected.items():
            found, read, scheduler = part_of(path, tensors[name])
            assert found == name and (scheduler is not None) == (name == "unet")
            assert_same_tensors(read.tensors, part.tensors)
    flat = without_prefix(expected["text_encoder"].tensors)  # as transformers 5 writes them
    assert_same_tensors(part_of(path, flat)[1].tensors, expected["text_encoder"].tensors)
    old = {
        name.replace("to_q", "query").replace("to_out.0", "proj_attn"): array
        for name, array in expected["vae"].tensors.items()
    }
    assert_same_tensors(part_of(path, old)[1].tensors, expected["vae"].tensors)


def test_the_autoencoder_of_the_upscaler(checkpoints, tmp_path):
    part = checkpoints["x4"].parts["vae"]
    assert part_of(tmp_path / "vae.safetensors", part.tensors)[1].config == part.config


# --- bad input ---------------------------------------------------------------------------------------------


def fault_of(path):
    with pytest.raises(UserError) as raised:
        read_single_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "is Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "is Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("lora_unet_down_blocks_0.lora_down.weight", "seems to be a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora.down.weight", "seems to be a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "seems to be a LoRA"),
        ("emb_params", "seems to be a textual inversion embedding"),
        ("<cat-toy>", "seems to be a textual inversion embedding"),
        ("control_model.input_blocks.0.0.weight", "seems to be a ControlNet"),
        ("visual.conv1.weight", "seems to be a CLIP with its image tower"),
        ("something.weight", "holds none of the parts of a Stable Diffusion model; give"),
    ],
)
def test_other_models_are_named(tmp_path, name, words):
    save_file({name: np.zeros((2, 2), "float32")}, tmp_path / "model.safetensors")
    assert words in fault_of(tmp_path / "model.safetensors")


def test_files_that_are_not_what_their_suffix_says(reference, tmp_path):
    contents = {
        "torch.safetensors": (
            (reference[0] / "plain.ckpt").read_bytes(),
            "a torch file; rename it to end in .ckpt",
        ),
        "safe.ckpt": ((reference[0] / "sd1.safetensors").read_bytes(), "rename it to end in .safetensors"),
        "page.safetensors": (b"\n<!DOCTYPE html><html></html>", "as its suffix says, but a web page"),
        "keras.ckpt": (b"\x89HDF\r\n\x1a\n" + bytes(100), "but an HDF5 file"),
        "pointer.ckpt": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "pickle.pt": (b"\x80\x04N.", "a plain pickle"),
        "unknown.model": (b"\x1f\x8b" + bytes(100), "a gzip archive"),
        "text.ckpt": (b"hello, this is text", "neither a zip nor a pickle of torch.save"),
        "text.safetensors": (b"hello, this is text", "no safetensors file"),
        "empty.safetensors": (b"", "safetensors"),
        "half.safetensors": ((reference[0] / "sd1.safetensors").read_bytes()[:100_000], "truncated"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert words in fault_of(tmp_path / name)
    assert "no such file" in fault_of(tmp_path / "missing.safetensors")
    assert "no such file" in fault_of(tmp_path)
    assert "no dictionary of weights" in fault_of(reference[0] / "list.pt")
    assert "no tensors by name, it seems to be a textual inversion" in fault_of(reference[0] / "cat.pt")


def test_a_shape_that_cannot_be_told(reference, tmp_path):
    stored = load_file(reference[0] / "sd1.safetensors")
    for name in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"):
        save_file({key: a for key, a in stored.items() if key != name}, tmp_path / "model.safetensors")
        assert "conv_in.weight is missing or has too few axes" in fault_of(tmp_path / "model.safetensors")
        save_file({**stored, name: np.zeros(3, "float32")}, tmp_path / "model.safetensors")
        assert "conv_in.weight is missing or has" in fault_of(tmp_path / "model.safetensors")
