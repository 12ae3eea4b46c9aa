"""All formats by one way in, and the diffusers folder in the forms in the wild."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.errors import UserError
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.weights import diffusers_folder, readers
from keras_sd.weights.loading import load_clip, load_part
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference

PARTS = ("unet", "vae", "text_encoder")

# Every form that diffusers and transformers write, of the same weights.
REFERENCE = """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    source = folder / "model"
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, model_class in parts.items():
        model = model_class.from_pretrained(source / part)
        model.half().save_pretrained(folder / "fp16" / part, variant="fp16")
        model = model_class.from_pretrained(source / part)
        model.save_pretrained(folder / "shards" / part, max_shard_size="20KB")
        if part != "text_encoder":
            model.save_pretrained(folder / "bin" / part, safe_serialization=False)
        else:
            (folder / "bin" / part).mkdir(parents=True)
            model.config.save_pretrained(folder / "bin" / part)
            torch.save(model.state_dict(), folder / "bin" / part / "pytorch_model.bin")
    torch.save(model.state_dict(), folder / "text_encoder.ckpt")
"""


@pytest.fixture(scope="module")
def model():
    return tiny.pipeline(tiny.SchedulerConfig())


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    model.save(folder / "model")
    run_reference(REFERENCE, {"none": np.zeros(1)}, folder)
    for name in ("fp16", "shards", "bin"):
        for rest in ("scheduler", "tokenizer"):
            shutil.copytree(folder / "model" / rest, folder / name / rest)
        shutil.copy(folder / "model" / "model_index.json", folder / name)
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    """A function that copies one of the folders, to be damaged."""

    def copy(name):
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", ["shards", "bin", "fp16"])
def test_folders_of_all_forms_are_read(model, folders, name):
    if name == "shards":
        assert len(list((folders / name / "unet").glob("*-of-*.safetensors"))) > 2
    loaded = StableDiffusion.load(folders / name)
    for part in PARTS:
        saved, read = torch_state(getattr(model, part)), torch_state(getattr(loaded, part))
        for key, array in saved.items():
            expected = array.astype("float16").astype("float32") if name == "fp16" else array
            np.testing.assert_array_equal(read[key], expected)


def test_variants_are_taken_by_name(model, folders, copied):
    both = copied("model")
    for part in PARTS:
        for file in (folders / "fp16" / part).glob("*.fp16.*"):
            shutil.copy(file, both / part)
    assert readers.read_checkpoint(both).parts["unet"].tensors["conv_in.weight"].dtype == "float32"
    assert (
        readers.read_checkpoint(both, variant="fp16").parts["vae"].source.name.endswith(".fp16.safetensors")
    )
    # Of parts without the variant the plain weights are taken.
    next((both / "vae").glob("*.fp16.*")).unlink()
    parts = readers.read_checkpoint(both, variant="fp16").parts
    assert parts["unet"].source.name.endswith(".fp16.safetensors")
    assert parts["vae"].source.name == "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="no such file as its ema weights; use one of the variants fp16"):
        readers.read_checkpoint(both, variant="ema")


def test_single_parts_come_from_folders_and_files(model, folders, tmp_path):
    expected = torch_state(model.vae)
    for path in (folders / "model", folders / "model" / "vae"):
        np.testing.assert_array_equal(
            torch_state(load_part(path, "vae"))["quant_conv.weight"], expected["quant_conv.weight"]
        )
    text = load_part(folders / "text_encoder.ckpt", "text_encoder")
    name = "text_model.final_layer_norm.weight"
    np.testing.assert_array_equal(torch_state(text)[name], torch_state(model.text_encoder)[name])
    with pytest.raises(UserError, match="holds text_encoder, not the unet; give one that holds it"):
        load_part(folders / "text_encoder.ckpt", "unet")
    with pytest.raises(UserError, match="has no unet and no vae; give a whole model"):
        StableDiffusion.load(folders / "text_encoder.ckpt")
    clip = load_clip(folders / "model")
    assert clip["clip_head"].keys() == {"text_projection.weight", "logit_scale"}


def test_another_autoencoder_takes_the_place_of_the_models(model, folders, tmp_path):
    other = tiny.randomize(type(model.vae)(tiny.VAE), 7)
    diffusers_folder.write_part(tmp_path, "vae", tiny.VAE.to_dict(), torch_state(other))
    loaded = StableDiffusion.load(folders / "model", vae=tmp_path / "vae")
    np.testing.assert_array_equal(loaded.vae.quant_conv.kernel, other.quant_conv.kernel)
    np.testing.assert_array_equal(loaded.unet.conv_in.kernel, model.unet.conv_in.kernel)


def test_a_folder_in_place_is_replaced_as_a_whole(model, copied):
    folder = copied("model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    kernel = model.unet.conv_in.kernel
    large = np.array(kernel)
    large[0] = 1e6
    small = np.array(kernel)
    kernel.assign(large)
    try:
        with pytest.raises(UserError, match="no finite float16"):
            model.save(folder, "float16")
    finally:
        kernel.assign(small)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    model.save(folder, "float16")
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (folder / "..").resolve().glob("model/*")
    }
    assert (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == "float16"
    )
    assert not list(folder.glob("*partial*"))


def damaged_index(folder, change):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return folder


def escape(weight_map):
    weight_map["conv_in.weight"] = "../../secret.safetensors"


def lose(weight_map):
    weight_map["conv_lost.weight"] = weight_map["conv_in.weight"]


def misname(weight_map):
    weight_map["conv_in.weight"] = "diffusion_pytorch_model-00009-of-00009.safetensors"


@pytest.mark.parametrize(
    "change, line",
    [
        (escape, "names the file '../../secret.safetensors', which is not in its folder"),
        (lose, "1 tensors are not in the files it names, the first is conv_lost.weight"),
        (misname, "00009-of-00009.safetensors: no such file"),
        (
            lambda weight_map: weight_map.update({"conv_in.weight": 3}),
            "weight 3: input should be a valid string",
        ),
        (lambda weight_map: weight_map.pop("conv_in.weight"), "1 tensors missing.*conv_in.weight is missing"),
    ],
)
def test_damaged_indices_are_one_line(copied, change, line):
    with pytest.raises(UserError, match=line) as caught:
        StableDiffusion.load(damaged_index(copied("shards"), change))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_one_line(folders, copied, tmp_path):
    folder = copied("model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.h5").write_bytes(b"no HDF5")
    (tmp_path / "notes.txt").write_text("notes")
    shutil.copy(folders / "text_encoder.ckpt", tmp_path / "text_encoder.safetensors")
    for path, line in [
        (tmp_path / "none.ckpt", "no such file or folder; give a model"),
        (tmp_path / "empty", "no model_index.json there; give a folder in diffusers' layout"),
        (tmp_path / "fake.h5", "not an HDF5 file, as its suffix says"),
        (tmp_path / "notes.txt", "of no known kind; give a safetensors or a torch file"),
        (
            tmp_path / "text_encoder.safetensors",
            "not a safetensors file, as its suffix says, but a torch file",
        ),
    ]:
        with pytest.raises(UserError, match=line) as caught:
            readers.read_checkpoint(path)
        assert "\n" not in str(caught.value)
    # What training writes is told, with what to give in its place.
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    for name in ("run.json", "checkpoint-4/manifest.json", "checkpoint-4/config.json"):
        (run / name).write_text("{}")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").touch()
    for path, fault in (
        (run, "is the folder of a run; its model is written when the run ends"),
        (run / "checkpoint-4", "is a checkpoint of a run; make a model of it by `keras-sd export`"),
        (run / "lora", "is a LoRA; give the model, and this as its LoRA"),
    ):
        with pytest.raises(UserError) as caught:
            readers.read_checkpoint(path)
        assert str(caught.value) == f"{path}: {fault}"
    (run / "model").mkdir()
    with pytest.raises(UserError, match=f"is the folder of a run; give {run / 'model'}$"):
        readers.read_checkpoint(run)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet: no such file as its weights; give a folder"):
        readers.read_checkpoint(folder)


def hub_cache(home, source, name="someone--small"):
    """A folder as the cache of the Hugging Face hub keeps it: links to blobs."""
    repository = home / "hub" / f"models--{name}"
    commit = "0123456789012345678901234567890123456789"
    for path in source.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / f"{abs(hash(path)):x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link = repository / "snapshots" / commit / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("form", ["model", "fp16"])
def test_hub_ids_are_opened_from_the_cache_offline(folders, tmp_path, form):
    hub_cache(tmp_path, folders / form)
    code = """if True:
        import keras_sd
        model = keras_sd.StableDiffusion.from_preset("someone/small", dtype="float16")
        print(model.name, model.unet.conv_in.kernel.dtype, model.model_hash)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, dtype, model_hash = done.stdout.split()
    assert (name, dtype, len(model_hash)) == ("someone/small", "float16", 10)
