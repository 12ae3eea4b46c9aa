"""KerasCV's files against KerasCV's own models, which share this process: they are Keras too."""

import inspect
import re

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format
from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, image_encoder, text_encoder

from keras_sd.config import TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.errors import UserError
from keras_sd.files.mapping import origin_of
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights import loading, rules
from keras_sd.weights.keras_cv_h5 import read_keras_cv
from tests.tiny import randomize

TOLERANCE = 1e-4
SIDE, TOKENS = 32, 7

# KerasCV's constructors have one size each. Their smaller twins have the same layers in the same order.
TEXT_1 = {"768": "128", "CLIPEncoderLayer(128, 12": "CLIPEncoderLayer(128, 2", "range(12)": "range(2)"}
TEXT_2 = {"range(23)": "range(1)"}
UNET_1 = {"320": "32", "640": "64", "1280": "128", "768": "16", "40": "4", "80": "8", "160": "16"}
UNET_2 = {"320": "64", "640": "128", "1280": "256", "1024": "16"} | {
    f"SpatialTransformer({heads}": f"SpatialTransformer({heads // 5}" for heads in (5, 10, 20)
}
VAE = {"512": "64", "256": "64", "128": "32"}


def smaller(model_class, changes):
    """A model class of KerasCV in a copy of its module in which numbers are replaced."""
    source = inspect.getsource(inspect.getmodule(model_class))
    # For two examples, as the tests have: while their number is open, each Dense is a dozen operations.
    source = re.sub(r"\bInput\(\s*\(", "Input(batch_size=2, shape=(", source)
    for before, after in changes.items():
        source, count = re.subn(rf"(?<!\w){re.escape(before)}(?!\w)", after, source)
        assert count
    namespace = {"__name__": "smaller"}
    exec(source, namespace)
    return namespace[model_class.__name__]


def write_h5(path, model):
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return path


def open_part(model_class, config_class, part):
    model = model_class(config_class.from_dict(part.config))
    rules.load_weights(model, part.tensors, source=part.source)
    return model


def difference(ours, theirs):
    """The largest one, in standard deviations of the output."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return np.abs(ours - theirs).max() / theirs.std()


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def exact_gelu(inputs):
    return keras.ops.gelu(inputs, approximate=False)


def exact_geglu(layer, inputs):
    values, gate = keras.ops.split(layer.dense(inputs), 2, axis=-1)
    return values * exact_gelu(gate)


@pytest.mark.parametrize(
    ("model_class", "changes", "shape"),
    [
        (text_encoder.TextEncoder, TEXT_1, ("quick_gelu", 128, 2, 2)),
        (text_encoder.TextEncoderV2, TEXT_2, ("gelu", 1024, 1, 16)),
    ],
)
def test_text_encoder(tmp_path, model_class, changes, shape):
    theirs = smaller(model_class, changes)(TOKENS, vocab_size=50, download_weights=False)
    randomize(theirs, scale=0.05)
    part = read_keras_cv(write_h5(tmp_path / "kcv_encoder.h5", theirs)).parts["text_encoder"]
    names = ("hidden_act", "hidden_size", "num_hidden_layers", "num_attention_heads")
    assert tuple(part.config[name] for name in names) == shape
    for layer in theirs.layers:
        # KerasCV approximates the GELU of SD 2.
        if getattr(layer, "activation", None) is keras.ops.gelu:
            layer.activation = exact_gelu
    ids = np.random.default_rng(1).integers(0, 50, (2, TOKENS)).astype("int32")
    positions = np.tile(np.arange(TOKENS, dtype="int32"), (2, 1))
    ours = open_part(TextEncoder, TextEncoderConfig, part)
    assert difference(ours(ids), theirs([ids, positions])) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_class", "changes", "linear", "heads"),
    [
        (diffusion_model.DiffusionModel, UNET_1, False, 8),
        (diffusion_model.DiffusionModelV2, UNET_2, True, (1, 2, 4, 4)),
    ],
)
def test_diffusion_model(tmp_path, model_class, changes, linear, heads):
    small_class = smaller(model_class, changes)
    theirs = small_class(8 * 16, 8 * 16, TOKENS, download_weights=False)
    randomize(theirs, scale=0.1)
    checkpoint = read_keras_cv(write_h5(tmp_path / "kcv_diffusion_model.h5", theirs))
    part = checkpoint.parts["unet"]
    assert part.config["use_linear_projection"] == linear and part.config["attention_head_dim"] == heads
    assert checkpoint.scheduler["prediction_type"] == "epsilon"
    latents, context, timesteps = (
        normal(2, 16, 16, 4),
        normal(2, TOKENS, 16),
        np.array([7.0, 801.0], "float32"),
    )
    inputs = [latents, _timestep_features(timesteps, theirs.input_shape[1][1]), context]
    ours = open_part(UNet, UNetConfig, part)([latents, timesteps, context])
    # KerasCV approximates the GELU of Stable Diffusion.
    assert difference(ours, theirs(inputs)) <= 3e-3
    inspect.unwrap(small_class.__init__).__globals__["GEGLU"].call = exact_geglu
    assert difference(ours, theirs(inputs)) <= TOLERANCE


def _timestep_features(timesteps, width):
    """What KerasCV's pipeline hands to its model."""
    angles = timesteps[:, None] * np.exp(-np.log(10000) * np.arange(width // 2) / (width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")


@pytest.fixture(scope="module")
def halves():
    """KerasCV's decoder and VAE encoder. Weights are large, as its normalisation has a larger epsilon."""
    decode = smaller(decoder.Decoder, VAE)(SIDE, SIDE, download_weights=False)
    encode = smaller(image_encoder.ImageEncoder, VAE)(download_weights=False)
    return randomize(decode, 1, 0.3), randomize(encode, 2, 0.3)


@pytest.fixture
def files(tmp_path, halves):
    decode, encode = halves
    return write_h5(tmp_path / "kcv_decoder.h5", decode), write_h5(tmp_path / "vae_encoder.h5", encode)


def test_vae(files, halves):
    decode, encode = halves
    checkpoint = read_keras_cv(files[0].parent)
    assert checkpoint.parts.keys() == {"vae"} and checkpoint.scheduler is None
    part = checkpoint.parts["vae"]
    assert part.config["block_out_channels"] == (32, 64, 64, 64)
    assert all(array.ndim == 2 for name, array in part.tensors.items() if ".to_" in name and "weight" in name)
    ours = open_part(AutoencoderKL, VAEConfig, part)
    scale = ours.config.scaling_factor
    latents, pictures = normal(2, SIDE // 8, SIDE // 8, 4), normal(2, SIDE, SIDE, 3)
    assert difference(ours.decode(latents / scale), decode(latents)) <= TOLERANCE
    assert difference(ours.encode(pictures).mode() * scale, encode(pictures)) <= TOLERANCE
    alone = loading.open_parts(read_keras_cv(files[0]))["vae"]
    assert difference(alone.decode(latents / scale), decode(latents)) <= TOLERANCE


def test_tensors_are_mapped_and_not_read(files):
    for array in read_keras_cv(files).parts["vae"].tensors.values():
        assert origin_of(array) is not None


def test_names_in_several_attributes_and_files_of_whole_models(files):
    expected = read_keras_cv(files).parts["vae"].tensors
    with h5py.File(files[0], "a") as file:
        names = file.attrs.pop("layer_names")
        # Keras 2 wrote bytes of a fixed length.
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:5].astype("S"), names[5:].astype("S")
    with h5py.File(files[1], "a") as file:
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = file.attrs.pop("layer_names")
        for name in list(file):
            if name != "model_weights":
                file.move(name, f"model_weights/{name}")
    tensors = read_keras_cv(files).parts["vae"].tensors
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)


def first_dataset(file):
    """Group and name of the first weight."""
    layer = next(file[name] for name in file.attrs["layer_names"] if len(file[name].attrs["weight_names"]))
    path = layer.attrs["weight_names"][0]
    return layer[path].parent, path.rpartition("/")[2]


def soft_link(file):
    group, name = first_dataset(file)
    group.move(name, "elsewhere")
    group[name] = h5py.SoftLink(f"{group.name}/elsewhere")


def external_link(file):
    group, name = first_dataset(file)
    del group[name]
    group[name] = h5py.ExternalLink("vae_encoder.h5", "/")


def linked_group(file):
    name = file.attrs["layer_names"][-1]
    del file[name]
    file[name] = h5py.ExternalLink("vae_encoder.h5", name)


def linked_model(file):
    file["model_weights"] = h5py.ExternalLink("vae_encoder.h5", "/")


def external_storage(file):
    group, name = first_dataset(file)
    shape = group[name].shape
    del group[name]
    outside = str(file.filename).replace("kcv_decoder", "vae_encoder")
    group.create_dataset(name, shape, "f4", external=[(outside, 0, 4 * int(np.prod(shape)))])


def virtual_dataset(file):
    group, name = first_dataset(file)
    layout = h5py.VirtualLayout(group[name].shape, "f4")
    layout[...] = h5py.VirtualSource("vae_encoder.h5", "weights", group[name].shape)
    del group[name]
    group.create_virtual_dataset(name, layout)


def compressed(file):
    group, name = first_dataset(file)
    del group[name]
    group.create_dataset(name, (1000, 1000), "f4", compression="gzip")


def never_written(file):
    group, name = first_dataset(file)
    del group[name]
    group.create_dataset(name, (2**20, 2**20), "f4")


def whole_numbers(file):
    group, name = first_dataset(file)
    shape = group[name].shape
    del group[name]
    group[name] = np.zeros(shape, "int32")


def missing_weight(file):
    group, name = first_dataset(file)
    del group[name]


def weight_without_name(file):
    layer = file[file.attrs["layer_names"][-1]]
    layer.attrs["weight_names"] = layer.attrs["weight_names"][:1]


def missing_layer(file):
    file.attrs["layer_names"] = file.attrs["layer_names"][:-1]


def no_names(file):
    del file.attrs["layer_names"]


def name_of_a_number(file):
    file.attrs["layer_names"] = 7


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (soft_link, "is a link"),
        (external_link, "is a link"),
        (linked_group, "is a link"),
        (linked_model, "is a link"),
        (external_storage, "is not contiguous"),
        (virtual_dataset, "is not contiguous"),
        (compressed, "is not contiguous"),
        (never_written, "is not contiguous"),
        (whole_numbers, "of type int32"),
        (missing_weight, "is missing"),
        (weight_without_name, "1 weights for decoder.conv_out, KerasCV has 2"),
        (missing_layer, "layers with weights, KerasCV's decoder has"),
        (no_names, "no model of KerasCV"),
        (name_of_a_number, "no weights as Keras 2 writes them"),
    ],
)
def test_damaged_files_are_refused_in_one_line(files, damage, fault):
    with h5py.File(files[0], "a") as file:
        damage(file)
    with pytest.raises(UserError, match=fault) as error:
        read_keras_cv(files)
    assert str(files[0]) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_h5_are_refused(files, tmp_path):
    whole = files[0].read_bytes()
    for name, content in {"empty": b"", "text": b"no H5 " * 99, "cut": whole[: len(whole) // 2]}.items():
        path = tmp_path / f"{name}.h5"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.h5: no weights as Keras 2 writes them") as error:
            read_keras_cv(path)
        assert "\n" not in str(error.value)


def test_sets_of_files_that_make_no_model_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="encoder.h5: half of the VAE; give its decoder"):
        read_keras_cv(files[1])
    with pytest.raises(UserError, match="a VAE encoder, as is"):
        read_keras_cv([files[1], files[1]])
    with pytest.raises(UserError, match="missing.h5: no such file"):
        read_keras_cv(tmp_path / "missing.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no .h5 files"):
        read_keras_cv(tmp_path / "empty")


def test_misshapen_weights_are_refused_with_the_file(files):
    with h5py.File(files[0], "a") as file:
        layer = file[file.attrs["layer_names"][-1]]
        path = layer.attrs["weight_names"][1]
        del layer[path]
        layer[path] = np.zeros(5, "float32")
    part = read_keras_cv(files).parts["vae"]
    with pytest.raises(UserError, match="kcv_decoder.h5.*decoder.conv_out.bias"):
        open_part(AutoencoderKL, VAEConfig, part)
