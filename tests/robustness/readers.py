"""What the campaign reads: for each reader its good files, and what is done with them.

A reader is a function of a folder that has the files, one of them damaged. This module is imported by the
process that makes the files, and by the workers that read them, whose imports are inside of the functions.
"""

import hashlib
import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

READERS = {}
"""Name -> `Reader`."""


class Reader(NamedTuple):
    """How files are made and read.

    Attributes:
        make: gives the good files, contents by name.
        read: reads those of a folder; told the name of the damaged one, it may leave out others.
        loads_keras: whether that loads Keras.
        others: gives contents that any file may get.
        seal: makes a digest of a damaged file right again, or None.
        share: of the inputs, for what takes long.
    """

    make: Callable
    read: Callable
    loads_keras: bool
    others: Callable
    seal: Callable | None
    share: float


_EMOJI = Path(__file__).parents[2] / "keras_sd" / "bundled" / "emoji"
_PARTS = ("unet", "vae", "text_encoder", "image_encoder")


def reader(make, loads_keras=False, others=tuple, seal=None, share=1.0):
    """Registers a function as the `read` of a `Reader`."""

    def register(read):
        READERS[read.__name__] = Reader(make, read, loads_keras, others, seal, share)
        return read

    return register


def _emoji(*names):
    return {name: (_EMOJI / name).read_bytes() for name in names}


def _json(value):
    return json.dumps(value, ensure_ascii=False).encode()


def _lines(*values):
    return b"\n".join(map(_json, values)) + b"\n"


def _safetensors(tensors, metadata=None):
    from safetensors.numpy import save

    return save(tensors, metadata)


def _config_files():
    files = _emoji(*(f"{part}/config.json" for part in _PARTS), "scheduler/scheduler_config.json")
    # What files of other people have beside the fields.
    scheduler = json.loads(files["scheduler/scheduler_config.json"])
    more = {
        "trained_betas": None,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        "clip_sample_range": 1.0,
    }
    for name in (
        "DDIM",
        "DDPM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
    ):
        values = scheduler | more | {"_class_name": f"{name}Scheduler"}
        files[f"scheduler/{name}.json"] = _json(values)
    clip = {
        "model_type": "clip",
        "projection_dim": 128,
        "text_config": json.loads(files["text_encoder/config.json"]),
        "text_config_dict": None,
        "vision_config": json.loads(files["image_encoder/config.json"]),
    }
    return files | {"clip.json": _json(clip)}


@reader(_config_files)
def configs(folder, file):
    from keras_sd import config

    classes = (config.UNetConfig, config.VAEConfig, config.TextEncoderConfig, config.ImageEncoderConfig)
    by_part = dict(zip(_PARTS, ([config_class] for config_class in classes), strict=True))
    by_part |= {"scheduler": [config.SchedulerConfig], "clip.json": classes[2:]}
    for name in [file] if file else _config_files():
        for config_class in by_part[name.partition("/")[0]]:
            config_class.load(folder / name)


def _tokenizer_files():
    from keras_sd.models.tokenizer import Tokenizer

    texts = ["red heart", "blue heart", "a grinning face", "flag of Japan"]
    tokenizer = Tokenizer.train(texts, 540, 12).add_tokens(["<cat>", "<cat>_1"])
    folder = Path(_temporary())
    tokenizer.save(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    config = json.loads(files["tokenizer_config.json"])
    vocabulary = json.loads(files["vocab.json"])
    added = [{"id": token_id, "content": token} for token, token_id in tokenizer.added_tokens.items()]
    one_file = {
        "added_tokens": added,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [" ".join(pair) for pair in tokenizer.merges],
            "end_of_word_suffix": "</w>",
        },
    }
    newer = config | {
        "model_max_length": 10**30,
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
        "added_tokens_decoder": {
            str(one["id"]): {"content": one["content"], "special": False} for one in added
        },
    }
    older = {f"older/{name}": content for name, content in files.items()}
    return older | {"newer/tokenizer.json": _json(one_file), "newer/tokenizer_config.json": _json(newer)}


@reader(_tokenizer_files)
def tokenizers(folder, file):
    from keras_sd.models.tokenizer import Tokenizer

    for name in [file.partition("/")[0]] if file else ("older", "newer"):
        tokenizer = Tokenizer.load(folder / name)
        tokenizer(["a red heart", "<cat> of Japan" * 9])
        tokenizer.decode(tokenizer.encode("red <cat>")[0])


def _images():
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (20, 24, 4), "uint8")
    information = PngInfo()
    information.add_text(
        "parameters", "a cat\nNegative prompt: dog\nSteps: 3, Sampler: DDIM, Seed: 1, Size: 24x20"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, mode, options in (
        ("a.png", "RGBA", {"pnginfo": information, "exif": exif}),
        ("b.jpg", "RGB", {"exif": exif}),
        ("c.webp", "RGB", {"exif": exif}),
        ("d.bmp", "RGB", {}),
        ("e.png", "P", {}),
        ("f.png", "I;16", {}),
        ("g.jpg", "CMYK", {"progressive": True}),
        ("h.png", "LA", {}),
    ):
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(generator.integers(0, 65_536, (20, 24), "uint16"))
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name[2:], name[2:].upper()), **options)
        files[name] = buffer.getvalue()
    return files


def _bombs():
    """Images whose few bytes stand for many pixels."""
    from PIL import Image

    contents = []
    for mode, size in (
        ("1", (20_000, 20_000)),
        ("L", (9_000, 9_000)),
        ("1", (60_000, 1)),
        ("1", (1, 60_000)),
    ):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(64)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    contents.append(buffer.getvalue())
    return [*contents, b"GIF89a", b"II*\0", b"\0\0\0\x18ftypheic", b"<svg/>"]


@reader(_images, others=_bombs)
def images(folder, file):
    from keras_sd.data.images import check_image, read_image, read_mask, read_picture
    from keras_sd.errors import UserError
    from keras_sd.images import read_parameters

    faults = []
    for path in [folder / file] if file else sorted(folder.iterdir()):
        for read in (
            check_image,
            read_parameters,
            lambda path: read_image(path, 16),
            read_picture,
            read_mask,
        ):
            try:
                read(path)
            except UserError as error:
                faults.append(error)
    if faults:
        raise faults[0]


@reader(lambda: {"a.txt": b"a (red:1.2) [cat] BREAK \\(x\\) <lora:a:1>\nand (dog:0.5)\nand 'more' of it"})
def prompts(folder, file):
    from keras_sd.images import parse_parameters
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.prompts import parse_prompt

    global _clip
    if not (folder / "a.txt").is_file():
        return
    text = (folder / "a.txt").read_bytes().decode("utf-8", "replace")
    _clip = _clip or Tokenizer.clip()
    for part in (text, *text.split("\n")):
        parse_prompt(part)
        parse_parameters(part)
        _clip.encode(part)


_clip = None


@reader(
    lambda: {
        "artists.txt": "Anna Ancher\nBo Bartlett\nÉmile Bernard\n".encode(),
        "flavors.txt": b"sharp\nred\n",
    }
)
def vocabularies(folder, file):
    from keras_sd.captions.vocabulary import Vocabulary

    Vocabulary.read(artists=folder / "artists.txt", flavors=folder / "flavors.txt").digest()


def _captioned():
    images = {name: _images()["b.jpg"] for name in ("a.jpg", "b.jpg", "c.jpg")}
    entries = [{"file_name": name, "text": f"a caption of {name}"} for name in images]
    settings = {"mode": "caption", "captioner": "a/b"}
    written = {"metadata": {"a.jpg": "0123456789abcdef", "b.jpg": None}, "txt": {"a.jpg": "0123456789abcdef"}}
    return images | {
        "metadata.jsonl": _lines(*entries[:2]),
        "a.txt": b"a text\n",
        ".captions/settings.json": _json(settings),
        ".captions/written.json": _json(written | {"begun": {"metadata": {}, "txt": {"b.jpg": "01"}}}),
        ".captions/captions-0-of-2.jsonl": _lines(*entries[:2]),
        ".captions/captions-1-of-2.jsonl": _lines({"file_name": "c.jpg", "fault": "c.jpg: damaged"}),
        "introductions.jsonl": _lines(*entries),
    }


@reader(_captioned)
def captions(folder, file):
    from keras_sd.captions.dataset import CaptionedFolder
    from keras_sd.captions.settings import CaptionSettings, CleaningSettings

    settings = CaptionSettings(mode="caption", captioner="a/b")
    captioned = CaptionedFolder(folder, settings)
    captioned.begin()
    captioned.missing()
    with captioned.journal(0, 2) as journal:
        journal.append([{"file_name": "c.jpg", "text": "said"}])
    captioned.write()
    CleaningSettings(introductions=str(folder / "introductions.jsonl")).prepare()("a.jpg", "a whisky")
    CaptionedFolder(folder, settings, overwrite=True)


def _metadata_files():
    image = _images()["b.jpg"]
    entries = [{"file_name": name, "text": f"a {name}", "more": [1]} for name in ("a.jpg", "b.jpg")]
    return {
        "jsonl/a.jpg": image,
        "jsonl/b.jpg": image,
        "jsonl/metadata.jsonl": _lines(*entries),
        "text/c.jpg": image,
        "text/c.txt": "a caption\né\n".encode(),
    }


@reader(_metadata_files)
def data_folders(folder, file):
    from keras_sd.data.folders import FolderSource

    for name in [file.partition("/")[0]] if file else ("jsonl", "text"):
        source = FolderSource(folder / name, 16)
        source.fingerprint()
        source[0]


def _run_folder():
    from keras_sd.training.checkpoints import Checkpoints

    folder = Path(_temporary())
    run = Checkpoints(folder, {"method": "lora", "seed": 3, "model": {"a": [1, 2]}})
    for step in (1, 2):
        run.save(
            step, {"weights": {"a": np.arange(6.0)}, "ema": {"b": np.ones(2, "float16")}}, {"epoch": step}
        )
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    return files


def _seal(folder, file):
    """Makes a manifest say what stands there, as if damage had been written."""
    from keras_sd.training.checkpoints import _manifest_text

    path = folder / file
    manifest = path.with_name("manifest.json")
    try:
        values = json.loads(manifest.read_bytes())
        values.pop("digest", None)
        if path != manifest:
            content = path.read_bytes()
            values["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(_manifest_text(values))
    except (OSError, ValueError, AttributeError, RecursionError):  # there is nothing to seal
        return


@reader(_run_folder, seal=_seal)
def checkpoints(folder, file):
    from keras_sd.errors import UserError
    from keras_sd.training.checkpoints import Checkpoints
    from keras_sd.training.run_folder import claim_output_dir, release_output_dir

    def run():
        return Checkpoints(folder, {"method": "lora", "seed": 3, "model": {"a": [1, 2]}})

    latest = run().latest()
    assert latest is not None, "one of two checkpoints is damaged, and none is found"
    run().load(run().resolve("latest"))
    claim_output_dir(folder, "latest")
    release_output_dir(folder)
    for step in (1, 2):
        try:
            run().load(run().resolve(f"checkpoint-{step}"))
        except UserError as error:
            fault = error
        else:
            fault = None
    run().save(3, {"weights": {"a": np.zeros(1)}}, {})
    if fault:
        raise fault


def _records():
    run = {
        "version": 1,
        "method": "lora",
        "directory": "/tmp",
        "options": {"pretrained_model_name_or_path": "emoji", "seed": 3, "learning_rate": 1e-4, "rank": 4},
    }
    return {
        "run.json": _json(run),
        "logs/record.json": _json({"evaluated": 4, "exported": 2}),
        "keras_sd.json": (_EMOJI / "keras_sd.json").read_bytes(),
        "checkpoint-4/manifest.json": b"{}",
    }


@reader(_records)
def run_records(folder, file):
    from keras_sd.defaults import ModelDefaults
    from keras_sd.export import read_run
    from keras_sd.training.run_folder import RunRecord

    RunRecord(folder, 3).last("evaluated")
    defaults = ModelDefaults.load(folder)
    defaults.training("text-to-image")
    defaults.guidance_scale + 1
    read_run(folder / "checkpoint-4")


@reader(
    lambda: {"a.safetensors": _safetensors({"a": np.ones((2, 3), "float32"), "b": np.ones(2, "float16")})}
)
def safetensors(folder, file):
    from keras_sd.weights.formats import read_metadata, read_safetensors

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
        "diffusers.safetensors": _safetensors({"<cat>": vectors}),
        "kohya.safetensors": _safetensors({"emb_params": vectors}),
        "web.pt": _archive(
            pickles.program(string_to_param=parameters, name=pickles.text("cat")), pickles.DATA
        ),
    }


@reader(_embeddings, others=_odd_pickles)
def embeddings(folder, file):
    from keras_sd.weights.embedding_files import read_embeddings

    for path in [folder / file] if file else sorted(folder.iterdir()):
        read_embeddings(path, 3)


def _single_files():
    from tests.weights import pickles

    names = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    vae = {name: np.ones((4, 4, 3, 3), "float32") for name in names}
    vae["encoder.down_blocks.0.resnets.0.conv1.weight"] = np.ones((4, 4, 3, 3), "float32")
    program = pickles.program(state_dict=b"}(" + pickles.text("a.weight") + pickles.tensor() + b"u")
    return {
        "vae.safetensors": _safetensors(vae),
        "ldm.safetensors": _safetensors(
            {f"model.diffusion_model.{name}": array for name, array in vae.items()}
        ),
        "model.ckpt": _archive(program, pickles.DATA),
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
    files = _emoji("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
    shards = {
        f"diffusion_pytorch_model-0000{index}-of-00002.safetensors": f"{'ab'[index - 1]}" for index in (1, 2)
    }
    for file, name in shards.items():
        files[f"unet/{file}"] = _safetensors({f"{name}.weight": np.ones(3, "float32")})
    weight_map = {f"{name}.weight": file for file, name in shards.items()}
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    return files | {"unet/diffusion_pytorch_model.safetensors.index.json": _json(index)}


@reader(_shards)
def sharded_folders(folder, file):
    from keras_sd.weights.readers import read_checkpoint, read_part

    read_part(folder, "unet")
    for array in read_checkpoint(folder).parts["unet"].tensors.values():
        array.sum()


def _keras_cv():
    import h5py

    from keras_sd.weights import keras_cv

    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        layers = []
        for index, (_, parameters) in enumerate(keras_cv._text_encoder_layers(3)):
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
    from keras_sd.weights.keras_cv import read_keras_cv

    read_keras_cv(folder)


def _open_clip():
    towers = {
        "text_cfg": {"heads": 8, "width": 64},
        "vision_cfg": {"width": 64, "head_width": 64, "layers": 1},
    }
    tensors = {"text_projection": np.ones((4, 4), "float32"), "visual.proj": np.ones((4, 4), "float32")}
    return {
        "open_clip_config.json": _json({"model_cfg": {"embed_dim": 64, **towers}}),
        "open_clip_model.safetensors": _safetensors(tensors),
    }


@reader(_open_clip)
def open_clip_files(folder, file):
    from keras_sd.weights.open_clip import read_open_clip

    read_open_clip(folder / "open_clip_model.safetensors")


def _temporary():
    return tempfile.mkdtemp(prefix="keras_sd_robustness_")


# With Keras.


def _tiny_model():
    from tests import tiny

    folder = Path(_temporary())
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET, vae=tiny.VAE).save(folder / "model")
    files = {
        str(path.relative_to(folder / "model")): path.read_bytes()
        for path in (folder / "model").rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return files


@reader(_tiny_model, loads_keras=True)
def model_folders(folder, file):
    from keras_sd.config import SchedulerConfig
    from keras_sd.defaults import ModelDefaults
    from keras_sd.loading import _contents
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.weights import readers, rules

    ModelDefaults.load(folder)
    checkpoint = readers.read_checkpoint(folder)
    for name, part in checkpoint.parts.items():
        rules.check_tensors(*_contents(name, part), part.source)
    SchedulerConfig.from_dict(checkpoint.scheduler)
    if checkpoint.tokenizer is not None:
        Tokenizer.load(checkpoint.tokenizer)


@reader(_tiny_model, loads_keras=True, share=0.2)
def opened_models(folder, file):
    from keras_sd.pipeline import StableDiffusion

    StableDiffusion.load(folder)


def _loras():
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = np.ones((2, 8), "float32"), np.ones((8, 2), "float32")
    peft = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    kohya_name = f"lora_unet_{layer.replace('.', '_')}"
    kohya = {f"{kohya_name}.lora_down.weight": down, f"{kohya_name}.lora_up.weight": up}
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "use_rslora": False, "target_modules": ["to_q"]}
    config |= {"alpha_pattern": {"to_q": 3}, "rank_pattern": {}}
    written = {f"unet.{name}": value for name, value in config.items()}
    return {
        "kohya.safetensors": _safetensors({**kohya, f"{kohya_name}.alpha": np.array(1.0, "float32")}),
        "diffusers.safetensors": _safetensors(peft, {"lora_adapter_metadata": json.dumps(written)}),
        "peft/adapter_config.json": _json(config),
        "peft/adapter_model.safetensors": _safetensors(
            {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
        ),
    }


@reader(_loras, loads_keras=True)
def loras(folder, file):
    from keras_sd.models.unet import UNet
    from keras_sd.weights.lora import read_lora
    from tests import tiny

    global _unet
    _unet = _unet or UNet(tiny.ONE_BLOCK_UNET)
    for name in ("kohya.safetensors", "diffusers.safetensors", "peft/adapter_model.safetensors"):
        read_lora(folder / name, {"unet": _unet})


_unet = None


@reader(
    lambda: {
        "logs/metrics.jsonl": _lines(*({"step": step, "time": 1.5, "loss": 0.1} for step in range(1, 6)))
    },
    True,
)
def metrics_logs(folder, file):
    from keras_sd.training.logs import MetricsLog

    MetricsLog(folder, initial_step=3).flush()
    for path in (folder / "logs").glob("events.*"):
        path.unlink()
