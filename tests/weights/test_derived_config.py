"""The published full-size models, recognised by names and shapes, under both kinds of names."""

import json
import re

import numpy as np
import pytest

from keras_sd.config import UNetConfig, VAEConfig
from keras_sd.weights import derived_config, ldm_names
from tests.models import published
from tests.reference import run_reference

# Out of the files of CompVis, Runway and StabilityAI.
PUBLISHED_NAMES = {
    "sd1": {
        "time_embed.0.weight": (1280, 320),
        "time_embed.2.bias": (1280,),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "input_blocks.1.0.out_layers.0.bias": (320,),
        "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "input_blocks.1.1.norm.weight": (320,),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.9.0.op.bias": (1280,),
        "input_blocks.11.0.out_layers.3.bias": (1280,),
        "middle_block.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "middle_block.1.transformer_blocks.0.norm3.weight": (1280,),
        "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "output_blocks.0.0.in_layers.2.weight": (1280, 2560, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0.weight": (1280, 1280),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.2.conv.bias": (640,),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    },
    "inpainting": {"input_blocks.0.0.weight": (320, 9, 3, 3)},
    "sd2": {
        "input_blocks.1.1.proj_in.weight": (320, 320),
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    },
    "x4": {
        "label_emb.weight": (1000, 1024),
        "input_blocks.0.0.weight": (256, 7, 3, 3),
        "input_blocks.10.0.skip_connection.bias": (1024,),
        "output_blocks.11.0.skip_connection.weight": (256, 512, 1, 1),
        "output_blocks.8.2.conv.weight": (512, 512, 3, 3),
    },
    "vae": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.block_1.norm1.weight": (512,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.norm_out.bias": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.mid.block_2.conv2.bias": (512,),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.conv_out.bias": (3,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    },
    "x4_vae": {"decoder.up.2.upsample.conv.weight": (512, 512, 3, 3)},
}

MODELS = {
    "sd1": published.SD1_UNET,
    "inpainting": published.SD1_INPAINTING_UNET,
    "sd2": published.SD2_UNET,
    "x4": published.UPSCALER_UNET,
    "vae": published.SD1_VAE,
    "x4_vae": published.UPSCALER_VAE,
    "clip": published.SD1_TEXT_ENCODER,
    "open_clip": published.SD2_TEXT_ENCODER,
}

SCRIPT = """
    import json
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes = {}
    for name, config in json.loads((folder / "published.json").read_text()).items():
        with torch.device("meta"):
            if "clip" in name:
                model = CLIPTextModel(CLIPTextConfig(**config))
            elif "vae" in name:
                model = AutoencoderKL.from_config(config)
            else:
                model = UNet2DConditionModel.from_config(config)
        shapes[name] = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Shapes of all tensors of the published models, by model and diffusers' name."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "published.json").write_text(json.dumps(MODELS))
    run_reference(SCRIPT, {}, folder)
    return json.loads((folder / "shapes.json").read_text())


def published_tensors(shapes, name):
    """Tensors that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes[name].items()}


@pytest.mark.parametrize("name", ["sd1", "inpainting", "sd2", "x4"])
def test_published_unets_are_recognised(shapes, name):
    config, tensors = MODELS[name], published_tensors(shapes, name)
    ldm = ldm_names.unet_to_ldm(tensors, config)
    check_names(name, ldm, tensors, ldm_names.unet_to_diffusers(ldm))
    derived = derived_config.unet_config(ldm_names.unet_to_diffusers(ldm), config["sample_size"])
    assert UNetConfig.from_dict(derived) == UNetConfig.from_dict(config)


@pytest.mark.parametrize("name", ["vae", "x4_vae"])
def test_published_autoencoders_are_recognised(shapes, name):
    config, tensors = MODELS[name], published_tensors(shapes, name)
    ldm = ldm_names.vae_to_ldm(tensors, config)
    check_names(name, ldm, tensors, ldm_names.vae_to_diffusers(ldm))
    scaling = config.get("scaling_factor", 0.18215)
    derived = derived_config.vae_config(ldm_names.vae_to_diffusers(ldm), config["sample_size"], scaling)
    assert VAEConfig.from_dict(derived) == VAEConfig.from_dict(config)


def check_names(name, ldm, tensors, back):
    assert len(ldm) == len(tensors)
    assert not [key for key in ldm if re.search(r"(down|up)_blocks|mid_block|resnets|attentions", key)]
    assert {key: ldm[key].shape for key in PUBLISHED_NAMES[name]} == PUBLISHED_NAMES[name]
    assert {key: array.shape for key, array in back.items()} == {key: a.shape for key, a in tensors.items()}


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_published_text_encoders_are_recognised(shapes, name):
    tensors = published_tensors(shapes, name)
    tensors = {f"text_model.{key.removeprefix('text_model.')}": array for key, array in tensors.items()}
    derived = derived_config.text_encoder_config(tensors, is_open_clip=name == "open_clip")
    # The published tokens are those of another vocabulary, and SD 2.x has no projection.
    told = derived.keys() - {"bos_token_id", "eos_token_id", "projection_dim"}
    assert {key: derived[key] for key in told} == {key: MODELS[name][key] for key in told}
    assert (derived["bos_token_id"], derived["eos_token_id"]) == (49406, 49407)
