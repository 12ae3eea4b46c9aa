"""Files of weights, of every format, and of single parts."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np

from tests.robustness.reader import emoji, json_bytes, reader, safetensors_bytes, temporary


@reader(
    lambda: {
        "a.safetensors": safetensors_bytes({"a": np.ones((2, 3), "float32"), "b": np.ones(2, "float16")})
    }
)
def safetensors(folder, file):
    from keras_sd.weights.safetensors_files import read_metadata, read_safetensors

    path = folder / "a.safetensors"
    for array in read_safetensors(path).values():
        array.sum()
    read_metadata(path)


def _archive(content, data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", data)
    return buffer.getvalue()


def _pickles():
    from tests.weights import pickles

    return {"a.ckpt": _archive(pickles.program(a=pickles.tensor(), b=pickles.number(3)), pickles.DATA)}


def _odd_pickles():
    odd = (
        None,
        [],
        [1, 2],
        {},
        "x",
        3,
        2.5,
        b"x",
        (1,),
        {1: 2},
        {"a": None},
        {"a": {"b": []}},
        {None: 1},
        range(3),
    )
    loop = []
    loop.append(loop)
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    contents = [pickle.dumps(value, 2) for value in (*odd, loop)] + [deep, b"\x80\x02cos\nsystem\n(Vls\ntR."]
    from tests.weights import pickles

    contents.append(b"\x80\x02" + pickles.tensor() + b".")
    return [_archive(content, pickles.DATA) for content in contents] + contents[:4]


@reader(_pickles, others=_odd_pickles)
def torch_pickles(folder, file):
    from keras_sd.weights.torch_pickle import read_torch

    read_torch(folder / "a.ckpt")


def _embeddings():
    from tests.weights import pickles

    vectors = np.ones((2, 3), "float32")
    parameters = b"}(" + pickles.text("*") + pickles.tensor() + b"u"
    return {
        "diffusers.safetensors": safetensors_bytes({"<cat>": vectors}),
        "kohya.safetensors": safetensors_bytes({"emb_params": vectors}),
        "web.pt": _archive(
            pickles.program(string_to_param=parameters, name=pickles.text("cat")), pickles.DATA
        ),
    }


@reader(_embeddings, others=_odd_pickles)
def embeddings(folder, file):
    from keras_sd.weights.textual_inversion import read_embeddings

    for path in [folder / file] if file else sorted(folder.iterdir()):
        read_embeddings(path, 3)


def _parts():
    """The smallest whole model, as parts with all of their tensors."""
    from keras_sd import config
    from keras_sd.weights.checkpoint import Part
    from keras_sd.weights.expected_shapes import expected_shapes

    configs = {
        "text_encoder": config.TextEncoderConfig(
            vocab_size=49_408,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=77,
            projection_dim=2,
        ),
        "image_encoder": config.ImageEncoderConfig(
            image_size=16,
            patch_size=8,
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            projection_dim=2,
        ),
        "unet": config.UNetConfig(
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=2,
            norm_num_groups=8,
        ),
        "vae": config.VAEConfig(
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=8,
        ),
    }
    towers = {"text_encoder": "text_model.", "image_encoder": "vision_model."}
    parts = {}
    for part, values in configs.items():
        tensors = {}
        for name, shape in expected_shapes(values):
            prefix = "" if name.startswith("visual_projection") else towers.get(part, "")
            tensors[prefix + name] = np.full(shape, 0.1, "float16")
        parts[part] = Part(values.to_dict(), tensors, Path(part))
    return parts


def _single_files():
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.weights.checkpoint import Checkpoint
    from keras_sd.weights.single_file import write_single_file
    from tests.weights import pickles

    parts = _parts()
    del parts["image_encoder"]
    folder = Path(temporary())
    write_single_file(folder / "whole.safetensors", Checkpoint(parts, SchedulerConfig().to_dict()))
    whole = (folder / "whole.safetensors").read_bytes()
    shutil.rmtree(folder)
    program = pickles.program(state_dict=b"}(" + pickles.text("a.weight") + pickles.tensor() + b"u")
    return {
        "whole.safetensors": whole,
        "vae.safetensors": safetensors_bytes(parts["vae"].tensors),
        "other.ckpt": _archive(program, pickles.DATA),
    }


@reader(_single_files, others=_odd_pickles)
def single_files(folder, file):
    _read_each([folder / file] if file else folder.iterdir())


def _read_each(paths):
    """Opens each path as a checkpoint; raises one of the faults at the end."""
    from keras_sd.errors import UserError
    from keras_sd.weights.readers import read_checkpoint

    fault = None
    for path in sorted(paths):
        try:
            read_checkpoint(path)
        except UserError as error:
            fault = error
    if fault:
        raise fault


def _shards():
    files = emoji("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
    shards = {
        f"diffusion_pytorch_model-0000{index}-of-00002.safetensors": f"{'ab'[index - 1]}" for index in (1, 2)
    }
    for file, name in shards.items():
        files[f"unet/{file}"] = safetensors_bytes({f"{name}.weight": np.ones(3, "float32")})
    weight_map = {f"{name}.weight": file for file, name in shards.items()}
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    return files | {"unet/diffusion_pytorch_model.safetensors.index.json": json_bytes(index)}


@reader(_shards)
def sharded_folders(folder, file):
    from keras_sd.weights.readers import read_checkpoint, read_part

    read_part(folder, "unet")
    for array in read_checkpoint(folder).parts["unet"].tensors.values():
        array.sum()


def _keras_cv():
    import h5py

    from keras_sd.weights import keras_cv_h5

    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        layers = []
        for index, parameters in enumerate(keras_cv_h5._layers("text encoder", 3).values()):
            group, weights = file.create_group(f"layer_{index}"), []
            for number, parameter in enumerate(parameters):
                shape = (8, 8) if parameter.endswith("weight") and "norm" not in parameter else (8,)
                name = f"{number}:0"
                group[name] = generator.normal(size=shape).astype("float32")
                weights.append(name)
            group.attrs["weight_names"] = np.array(weights, "S")
            layers.append(f"layer_{index}")
        file.attrs["layer_names"] = np.array(layers, "S")
    return {"text_encoder.h5": buffer.getvalue()}


@reader(_keras_cv)
def keras_cv_files(folder, file):
    from keras_sd.weights.keras_cv_h5 import read_keras_cv

    read_keras_cv(folder)


def _open_clip():
    from keras_sd.weights.open_clip import open_clip_config, open_clip_tensors

    parts = _parts()
    text, image = parts["text_encoder"], parts["image_encoder"]
    image.tensors["text_projection.weight"] = np.ones((2, 2), "float16")
    image.tensors["logit_scale"] = np.array(2.5, "float16")
    config = open_clip_config(text.config, image.config)
    for tower in ("text_cfg", "vision_cfg"):
        config[tower]["norm_kwargs"] = {"eps": 1e-5}
    config["text_cfg"] |= {"pool_type": "eos", "eos_id": 2}
    return {
        "open_clip_config.json": json_bytes({"model_cfg": config}),
        "open_clip_model.safetensors": safetensors_bytes(open_clip_tensors(text, image)),
    }


@reader(_open_clip)
def open_clip_files(folder, file):
    from keras_sd.weights.open_clip import read_open_clip

    read_open_clip(folder / "open_clip_model.safetensors")
