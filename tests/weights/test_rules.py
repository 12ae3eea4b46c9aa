"""The weight map against the models of diffusers and transformers: names, shapes and results."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.rules import load_weights, open_model, torch_state
from tests import tiny
from tests.reference import group_of, run_reference

UNETS = {"sd1": tiny.SD1_UNET, "sd2": tiny.SD2_UNET, "pixel": tiny.PIXEL_UNET}
TEXT_CONFIG = tiny.text_encoder_config(tiny.tokenizer())
CONFIGS = {**UNETS, "vae": tiny.VAE, "text": TEXT_CONFIG, "image": tiny.IMAGE_ENCODER}
CLASSES = {"vae": AutoencoderKL, "text": TextEncoder, "image": ImageEncoder}
PRECISIONS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

SCRIPT = """
    import json
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    configs = json.loads((folder / "configs.json").read_text())
    for name in ("sd1", "sd2", "pixel"):
        values = configs[name]
        if name == "pixel":
            del values["cross_attention_dim"]
        unet = randomize(UNet2DConditionModel.from_config(values))
        store_weights(unet, name + "/weights")
        latents, context = inputs[name + "/latents"].permute(0, 3, 1, 2), inputs["context"]
        sample = unet(latents, inputs["timesteps"], None if name == "pixel" else context).sample
        outputs[name + "/prediction"] = sample.permute(0, 2, 3, 1)

    vae = randomize(AutoencoderKL.from_config(configs["vae"]))
    store_weights(vae, "vae/weights")
    posterior = vae.encode(inputs["images"].permute(0, 3, 1, 2)).latent_dist
    outputs["vae/mean"] = posterior.mean.permute(0, 2, 3, 1)
    outputs["vae/log_variance"] = posterior.logvar.permute(0, 2, 3, 1)
    outputs["vae/decoded"] = vae.decode(inputs["sd1/latents"].permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)

    store_weights(CLIPTextModel(CLIPTextConfig(**configs["text"])), "text/weights")
    store_weights(CLIPVisionModelWithProjection(CLIPVisionConfig(**configs["image"])), "image/weights")
"""


def build(name):
    return CLASSES.get(name, UNet)(CONFIGS[name])


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    shapes = {"sd1/latents": (2, 4, 6, 4), "sd2/latents": (2, 8, 4, 4), "pixel/latents": (2, 8, 8, 3)}
    shapes |= {"images": (2, 16, 8, 3), "context": (2, 12, 16)}
    drawn = {name: generator.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return drawn | {"timesteps": np.array([3, 801])}


@pytest.fixture(scope="module")
def reference(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "configs.json").write_text(
        json.dumps({name: config.to_dict() for name, config in CONFIGS.items()})
    )
    return run_reference(SCRIPT, arrays, folder)


def assert_close(actual, expected):
    actual = keras.ops.convert_to_numpy(actual)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert np.abs(actual - expected).max() / expected.std() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_the_published_ones(name, reference):
    published = group_of(reference, f"{name}/weights")
    ours = {parameter: array.shape for parameter, array in torch_state(build(name)).items()}
    theirs = {parameter: array.shape for parameter, array in published.items()}
    if name == "text":  # transformers 5 leaves out the prefix that 4 needs, and reads both
        prefix = "text_model."
        theirs = {prefix + parameter.removeprefix(prefix): shape for parameter, shape in theirs.items()}
    assert ours == theirs


@pytest.mark.parametrize("name", UNETS)
def test_unet_predicts_what_diffusers_predicts(name, reference, arrays):
    unet = build(name)
    load_weights(unet, group_of(reference, f"{name}/weights"))
    context = [] if name == "pixel" else [arrays["context"]]
    prediction = unet([arrays[f"{name}/latents"], arrays["timesteps"], *context])
    assert_close(prediction, reference[f"{name}/prediction"])


def test_vae_encodes_and_decodes_as_diffusers_does(reference, arrays):
    vae = build("vae")
    load_weights(vae, group_of(reference, "vae/weights"))
    posterior = vae.encode(arrays["images"])
    assert_close(posterior.mean, reference["vae/mean"])
    assert_close(posterior.log_variance, reference["vae/log_variance"])
    assert_close(vae.decode(arrays["sd1/latents"]), reference["vae/decoded"])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_come_back_bit_for_bit(name, precision):
    model = tiny.randomize(build(name))
    tensors = {key: array.astype(PRECISIONS[precision]) for key, array in torch_state(model).items()}
    again = build(name)
    load_weights(again, tensors)
    back = torch_state(again)
    assert list(back) == list(tensors)
    for key, array in tensors.items():
        assert back[key].dtype == np.float32
        assert back[key].astype(array.dtype).tobytes() == array.tobytes()


def test_kernels_are_transposed_by_their_rank():
    unet = build("sd1")
    parameters = {parameter.name: parameter for parameter in parameter_paths(unet)}
    state = torch_state(tiny.randomize(unet))
    for name, axes in {"time_embedding.linear_1.weight": (1, 0), "conv_in.weight": (3, 2, 0, 1)}.items():
        kernel = keras.ops.convert_to_numpy(parameters[name].variable)
        np.testing.assert_array_equal(state[name], np.transpose(kernel, axes))
    assert parameters["conv_in.weight"].layer is unet.conv_in
    assert state["down_blocks.0.attentions.0.proj_in.weight"].shape == (8, 8, 1, 1)
    assert torch_state(build("sd2"))["down_blocks.1.attentions.0.proj_in.weight"].shape == (16, 16)
    assert len(parameters) == len(unet.weights)


def test_names_of_older_releases_are_read():
    assert canonical_name("text_model.final_layer_norm.bias") == "final_layer_norm.bias"
    assert canonical_name("text_model.embeddings.position_ids") is None
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = tiny.randomize(build("vae"))
    tensors = {}
    for name, array in torch_state(vae).items():
        if ".attentions." in name:
            for new_name, old_name in old.items():
                name = name.replace(new_name, old_name)
            if name.endswith("weight") and "group_norm" not in name:
                array = array[:, :, None, None]  # as a 1x1 convolution
        tensors["first_stage_model." + name] = array
    assert any(".query." in name for name in tensors)
    again = build("vae")
    load_weights(again, {**tensors, "model_ema.decay": np.zeros(())}, prefix="first_stage_model.")
    for first, second in zip(vae.weights, again.weights, strict=True):
        np.testing.assert_array_equal(first, second)

    text = tiny.randomize(build("text"))
    tensors = {name.removeprefix("text_model."): array for name, array in torch_state(text).items()}
    again = build("text")
    load_weights(again, {**tensors, "embeddings.position_ids": np.arange(8)[None]})
    np.testing.assert_array_equal(text.weights[0], again.weights[0])


def test_every_tensor_is_accounted_for():
    model = build("image")
    tensors = {name: array.copy() for name, array in torch_state(tiny.randomize(model)).items()}
    before = [keras.ops.convert_to_numpy(variable) for variable in model.weights]
    prefix = "vision_model.encoder.layers.0."
    for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.bias"):
        del tensors[prefix + name]
    tensors["visual_projection.weight"] = np.zeros((12, 17), "float32")
    tensors["vision_model.extra.weight"] = np.zeros((3, 4), "float32")
    tensors["vision_model.more.weight"] = np.zeros(5, "float32")
    tensors["vision_model.pre_layrnorm.bias"] += 1
    with pytest.raises(UserError) as caught:
        load_weights(model, tensors, source="file.safetensors")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("file.safetensors: ")
    assert "3 tensors missing, 1 misshapen, 2 left over" in message
    assert "encoder.layers.0.mlp.fc1.weight is missing, the model has (32, 16)" in message
    assert "visual_projection.weight is (12, 17), the model has (12, 16)" in message
    assert "extra.weight (3, 4) has no place" in message
    assert "more.weight" not in message and "; ..." in message  # five are named
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_refused(bad):
    model = build("image")
    tensors = {name: array.copy() for name, array in torch_state(model).items()}
    tensors["vision_model.embeddings.class_embedding"][3] = bad
    with pytest.raises(UserError, match="1 tensors hold NaN or infinity.*class_embedding"):
        load_weights(model, tensors)


def test_layers_out_of_reach_are_an_error_of_the_program():
    class Hidden(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self._secret = keras.layers.Dense(2)
            self._secret.build((None, 2))

    with pytest.raises(ValueError, match="2 weights, but 0 found"):
        parameter_paths(Hidden())


@pytest.fixture(scope="module")
def published():
    return torch_state(tiny.randomize(build("image")))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_is_born_from_its_tensors(published, dtype):
    model = open_model(ImageEncoder, tiny.IMAGE_ENCODER, published, dtype=dtype)
    for name, array in torch_state(model).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, published[name].astype(array.dtype))
    # Neither the precision nor the way of being born outlives the call.
    fresh = ImageEncoder(tiny.IMAGE_ENCODER).visual_projection.kernel
    assert fresh.dtype == "float32" and np.std(fresh) > 0


def test_part_of_a_model_is_taken_only_on_demand(published):
    partial = {name: array for name, array in published.items() if "layer_norm1" not in name}
    partial["other.weight"] = np.zeros(3, "float32")
    partial["visual_projection.weight"] = np.zeros((3, 3), "float32")
    line = "2 tensors missing, 1 misshapen, 1 left over for ImageEncoder"
    with pytest.raises(UserError, match=line):
        open_model(ImageEncoder, tiny.IMAGE_ENCODER, partial)
    with pytest.warns(UserWarning, match=f"{line}.*The rest is loaded"):
        model = open_model(ImageEncoder, tiny.IMAGE_ENCODER, partial, partial=True)
    loaded = torch_state(model)
    for name in ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.mlp.fc1.weight"):
        np.testing.assert_array_equal(loaded[name], published[name])
    assert (loaded["vision_model.encoder.layers.0.layer_norm1.weight"] == 1).all()  # its initial value
    assert np.std(loaded["visual_projection.weight"]) > 0


def test_after_a_refusal_models_are_made_as_before(published):
    bad = published | {"visual_projection.weight": np.full((12, 16), np.nan, "float32")}
    with pytest.raises(UserError, match="1 tensors hold NaN or infinity, the first is visual_projection"):
        open_model(ImageEncoder, tiny.IMAGE_ENCODER, bad)
    with pytest.raises(UserError, match="dtype 'int4': unknown"):
        open_model(ImageEncoder, tiny.IMAGE_ENCODER, published, dtype="int4")
    model = open_model(ImageEncoder, tiny.IMAGE_ENCODER, published)
    np.testing.assert_array_equal(
        torch_state(model)["visual_projection.weight"], published["visual_projection.weight"]
    )
    assert np.std(build("image").visual_projection.kernel) > 0


def test_large_finite_values_are_finite(published):
    large = published | {"visual_projection.weight": np.full((12, 16), 3e38, "float32")}
    model = open_model(ImageEncoder, tiny.IMAGE_ENCODER, large)  # their sum is not
    assert np.isfinite(model.visual_projection.kernel).all()
