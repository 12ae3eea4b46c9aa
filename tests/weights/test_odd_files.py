"""Files as people have them: other prefixes, tensors that no model uses, parts that are missing."""

import dataclasses
import json
import os
import struct
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd import presets
from keras_sd.config import UNetConfig
from keras_sd.errors import UserError
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.weights import loading
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.readers import read_checkpoint, read_part
from keras_sd.weights.rules import torch_state
from keras_sd.weights.single_file import read_single_file, write_single_file
from keras_sd.weights.textual_inversion import read_embeddings
from tests import tiny
from tests.reference import run_reference
from tests.weights import test_single_file as whole

CLIP = "cond_stage_model.transformer."


def write_with_types(path, tensors, odd):
    """A safetensors file with tensors of types that NumPy lacks: name -> (type, shape, bytes)."""
    entries = {
        name: ({"float32": "F32", "int8": "I8"}[array.dtype.name], array.shape, array.tobytes())
        for name, array in tensors.items()
    } | odd
    header, content = {}, b""
    for name, (kind, shape, data) in entries.items():
        place = [len(content), len(content) + len(data)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": place}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A whole SD 1 as a file, and its `Checkpoint`."""
    checkpoint = whole.checkpoint("sd1")
    return whole.write(tmp_path_factory.mktemp("sd1") / "sd1.safetensors", checkpoint), checkpoint


def unet_of(**values):
    config = UNetConfig(**{**whole.SD1_UNET.__dict__, **values})
    return Part(config.to_dict(), whole.random_tensors(UNet, config, 0, np.float32), "unet")


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("width, prediction, side", [(768, "epsilon", 64), (1024, "v_prediction", 96)])
def test_the_width_of_the_text_tells_sd1_from_sd2(tmp_path, width, prediction, side, is_linear):
    part = unet_of(cross_attention_dim=width, use_linear_projection=is_linear)
    save_file(part.tensors, tmp_path / "unet.safetensors")
    read = read_single_file(tmp_path / "unet.safetensors")
    config = read.parts["unet"].config
    assert (read.scheduler["prediction_type"], config["sample_size"]) == (prediction, side)
    assert config["upcast_attention"] is (width == 1024)
    assert config["attention_head_dim"] == ((1, 1) if width == 1024 else 8)
    assert config["use_linear_projection"] is is_linear


def test_a_unet_without_middle_is_read_from_a_file(tmp_path):
    """As distilled models have it (BK-SDM); the text's width is then told by another block."""
    part = unet_of(mid_block_type=None)
    assert not any(name.startswith("mid_block") for name in part.tensors)
    for path in (tmp_path / "unet.safetensors", tmp_path / "ldm.safetensors"):
        if path.name == "ldm.safetensors":
            write_single_file(path, Checkpoint({"unet": part}))
        else:
            save_file(part.tensors, path)
        read = read_single_file(path).parts["unet"]
        whole.assert_same_tensors(read.tensors, part.tensors)
        assert read.config == part.config
        assert loading.open_parts(Checkpoint({"unet": read}))["unet"].mid_block is None


def test_tensors_that_no_model_uses_do_not_matter(sd1, tmp_path):
    path, checkpoint = sd1
    more = {
        f"{CLIP}text_projection.weight": np.ones((12, 64), "float32"),
        f"{CLIP}logit_scale": np.ones((), "float32"),
        "cond_stage_model.logit_scale": np.ones((), "float32"),
        "quantized.weight": np.ones((2, 2), "int8"),
    }
    odd = {"scales.fp8": ("F8_E4M3", (2, 3), bytes(6)), "scales.fp4": ("F4", (2, 4), bytes(4))}
    write_with_types(tmp_path / "more.safetensors", load_file(path) | more, odd)
    read = read_single_file(tmp_path / "more.safetensors")
    for name, part in checkpoint.parts.items():
        whole.assert_same_tensors(read.parts[name].tensors, part.tensors)
        assert read.parts[name].config == part.config


@pytest.mark.parametrize("kind, size", [("F8_E5M2", 1), ("I8", 1), ("I64", 8)])
def test_a_tensor_that_is_used_must_be_of_a_type_of_weights(sd1, tmp_path, kind, size):
    tensors = load_file(sd1[0])
    array = tensors.pop("first_stage_model.decoder.conv_in.weight")
    odd = {"first_stage_model.decoder.conv_in.weight": (kind, array.shape, bytes(size * array.size))}
    write_with_types(tmp_path / "model.safetensors", tensors, odd)
    vae = read_single_file(tmp_path / "model.safetensors").parts["vae"]
    name = {"I64": "int64"}.get(kind, kind)
    with pytest.raises(UserError, match=f"decoder.conv_in.weight is of type {name}, .* convert the file"):
        loading.open_parts(Checkpoint({"vae": vae}))


def test_the_same_of_torchs_files(tmp_path):
    vae = whole.random_tensors(AutoencoderKL, whole.vae_config(), 0, np.float32)
    script = """
        state = {name.removeprefix("vae/"): tensor for name, tensor in inputs.items()}
        more = {"fp8": torch.zeros(2, 3).to(torch.float8_e4m3fn), "int8": torch.zeros(2, 2, dtype=torch.int8),
                "complex": torch.zeros(2, 2, dtype=torch.complex64)}
        torch.save({"state_dict": state | more}, folder / "unused.ckpt")
        name = "decoder.conv_in.weight"
        torch.save(state | {name: state[name].to(torch.float8_e4m3fn)}, folder / "used.pt")
    """
    run_reference(script, {f"vae/{name}": array for name, array in vae.items()}, tmp_path)
    whole.assert_same_tensors(read_single_file(tmp_path / "unused.ckpt").parts["vae"].tensors, vae)
    parts = {"vae": read_single_file(tmp_path / "used.pt").parts["vae"]}
    with pytest.raises(UserError, match="decoder.conv_in.weight is of type float8_e4m3fn"):
        loading.open_parts(Checkpoint(parts))


@pytest.mark.parametrize("outer", ["", "module.", "model."])
@pytest.mark.parametrize("names", ["diffusers", "latent-diffusion"])
def test_prefixes_in_the_wild(sd1, tmp_path, outer, names):
    """`vae.decoder.…` in a file of the VAE alone or of all parts, and what training wraps around a model."""
    path, checkpoint = sd1
    stored = load_file(path)
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": CLIP}
    everything = {}
    for name, part in checkpoint.parts.items():
        below = whole.stored_below(path, prefixes[name]) if names != "diffusers" else part.tensors
        everything |= {f"{outer}{name}.{key}": array for key, array in below.items()}
        for prefix in (outer, f"{outer}{name}."):
            found, read, _ = whole.part_of(
                tmp_path / "part.safetensors", {f"{prefix}{key}": array for key, array in below.items()}
            )
            assert found == name
            whole.assert_same_tensors(read.tensors, part.tensors)
    save_file(everything, tmp_path / "all.safetensors")
    if outer:
        save_file({outer + key: a for key, a in stored.items()}, tmp_path / "wrapped.safetensors")
    for file in tmp_path.glob("[aw]*.safetensors"):
        read = read_single_file(file)
        for name, part in checkpoint.parts.items():
            whole.assert_same_tensors(read.parts[name].tensors, part.tensors)


@pytest.fixture(scope="module")
def without_encoder():
    """A whole model whose VAE has a decoder alone."""
    model = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, jit_compile=False)
    decoder = {
        name: np.ascontiguousarray(array)
        for name, array in torch_state(model.vae).items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    parts = {"vae": Part(tiny.VAE.to_dict(), decoder, "vae")}
    vae = loading.open_parts(Checkpoint(parts))["vae"]
    parts = (model.tokenizer, model.text_encoder, model.unet, vae, model.scheduler_config)
    return model, StableDiffusion(*parts, jit_compile=False), decoder


def test_a_vae_without_encoder_draws_and_says_what_it_cannot_do(without_encoder, tmp_path):
    model, half, decoder = without_encoder
    draw = {"num_inference_steps": 2, "seed": 3}
    np.testing.assert_array_equal(
        half.text_to_image("red heart", **draw), model.text_to_image("red heart", **draw)
    )
    images = np.zeros((1, 16, 16, 3), "uint8")
    with pytest.raises(UserError, match="the VAE has a decoder only"):
        half.image_to_image(images, "red heart", **draw)
    half.save(tmp_path / "model")
    again = StableDiffusion.load(tmp_path / "model", jit_compile=False)
    whole.assert_same_tensors(torch_state(again.vae), decoder)
    np.testing.assert_array_equal(
        again.text_to_image("red heart", **draw), model.text_to_image("red heart", **draw)
    )


def test_a_vae_without_encoder_is_read_and_written_as_a_file(without_encoder, tmp_path):
    decoder = without_encoder[2]
    config = dataclasses.replace(tiny.VAE, sample_size=256, scaling_factor=0.08333, force_upcast=True)
    part = Part(config.to_dict(), decoder, "vae")
    with pytest.warns(UserWarning, match="vae norm_num_groups"):
        write_single_file(tmp_path / "ldm.safetensors", Checkpoint({"vae": part}))
    save_file(decoder, tmp_path / "diffusers.safetensors")
    for name in ("ldm", "diffusers"):
        read = read_single_file(tmp_path / f"{name}.safetensors").parts["vae"]
        whole.assert_same_tensors(read.tensors, decoder)
        assert read.config == config.to_dict() | {"norm_num_groups": 8}


def test_a_folder_of_a_vae_may_have_any_name(tmp_path):
    model = tiny.pipeline()
    other = tiny.randomize(AutoencoderKL(tiny.VAE), 7)
    write_part(tmp_path, "vae", tiny.VAE.to_dict(), torch_state(other))
    (tmp_path / "vae").rename(tmp_path / "sd-vae-ft-mse")
    model.save(tmp_path / "model")
    for place in (tmp_path / "sd-vae-ft-mse",):
        loaded = StableDiffusion.load(tmp_path / "model", vae=place)
        np.testing.assert_array_equal(loaded.vae.quant_conv.kernel, other.quant_conv.kernel)
    with pytest.raises(UserError, match="UNet2DConditionModel.* is not supported"):
        StableDiffusion.load(tmp_path / "model", vae=tmp_path / "model" / "unet")
    assert read_checkpoint(tmp_path / "sd-vae-ft-mse").parts.keys() == {"vae"}


def test_a_folder_without_its_table_of_contents(tmp_path):
    model = tiny.pipeline()
    model.save(tmp_path / "model")
    (tmp_path / "model" / "model_index.json").unlink()
    loaded = StableDiffusion.load(tmp_path / "model")
    assert loaded.scheduler_config == model.scheduler_config
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="no noise schedule; put the model's own scheduler/scheduler_config"):
        StableDiffusion.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + ".safetensors", "./" + "a" * 300])
@pytest.mark.parametrize(
    "read",
    [
        read_checkpoint,
        lambda path: read_part(path, "vae"),
        lambda path: read_embeddings(path, 16),
        StableDiffusion.load,
        presets.find,
    ],
)
def test_a_name_that_is_too_long_is_one_line_in_python_too(read, name):
    with pytest.raises(UserError, match="File name too long; give a shorter name"):
        read(name)


def test_a_name_that_is_no_utf8(tmp_path):
    model = tiny.pipeline()
    for name in (b"model\xff", b"model\xff.safetensors"):
        path = tmp_path / os.fsdecode(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a single file cannot tell
            model.save(path)
        assert read_checkpoint(path).parts["unet"].tensors


@pytest.mark.parametrize("kind", ["F32", "F8_E4M3"])
@pytest.mark.parametrize("shape", [[0, 2**63], [0] + [2**62] * 3, [0] * 70])
def test_a_shape_that_no_array_has_is_one_line(tmp_path, kind, shape):
    write_with_types(tmp_path / "odd.safetensors", {}, {"decoder.conv_in.weight": (kind, shape, b"")})
    with pytest.raises(UserError, match="decoder.conv_in.weight has no shape of an array; fetch it again"):
        read_single_file(tmp_path / "odd.safetensors")
