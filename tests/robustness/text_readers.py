"""Configs, tokenizers, texts, captions, and what a training run writes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from tests.robustness.image_readers import image_files
from tests.robustness.reader import (
    EMOJI,
    PARTS,
    emoji,
    json_bytes,
    json_lines,
    reader,
    temporary,
)


def _config_files():
    files = emoji(*(f"{part}/config.json" for part in PARTS), "scheduler/scheduler_config.json")
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
        files[f"scheduler/{name}.json"] = json_bytes(values)
    clip = {
        "model_type": "clip",
        "projection_dim": 128,
        "text_config": json.loads(files["text_encoder/config.json"]),
        "text_config_dict": None,
        "vision_config": json.loads(files["image_encoder/config.json"]),
    }
    return files | {"clip.json": json_bytes(clip)}


@reader(_config_files)
def configs(folder, file):
    from keras_sd import config
    from keras_sd.diffusion.scheduler_config import SchedulerConfig

    classes = (config.UNetConfig, config.VAEConfig, config.TextEncoderConfig, config.ImageEncoderConfig)
    by_part = dict(zip(PARTS, ([config_class] for config_class in classes), strict=True))
    by_part |= {"scheduler": [SchedulerConfig], "clip.json": classes[2:]}
    for name in [file] if file else _config_files():
        for config_class in by_part[name.partition("/")[0]]:
            config_class.load(folder / name)


def _scheduler_files():
    from keras_sd.diffusion.samplers import METHODS
    from keras_sd.diffusion.scheduler_options import complete

    return {f"{name}.json": json_bytes({"_class_name": name, **complete(name, {})}) for name in METHODS}


@reader(_scheduler_files)
def samplers(folder, file):
    """What a scheduler's file makes of sampling, as far as it goes without a network."""
    from keras_sd.diffusion.samplers import find_sampler
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.diffusion.schedules import NoiseSchedule

    for name in [file] if file else _scheduler_files():
        config = SchedulerConfig.load(folder / name)
        tables = find_sampler(None, config).tables(NoiseSchedule(config), 7)
        find_sampler("ddim").tables(NoiseSchedule(config), 3)
        assert len(tables.rows) >= 7


def _tokenizer_files():
    from keras_sd.models.tokenizer import Tokenizer

    texts = ["red heart", "blue heart", "a grinning face", "flag of Japan"]
    tokenizer = Tokenizer.train(texts, 540, 12).add_tokens(["<cat>", "<cat>_1"])
    folder = Path(temporary())
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
    return older | {
        "newer/tokenizer.json": json_bytes(one_file),
        "newer/tokenizer_config.json": json_bytes(newer),
    }


@reader(_tokenizer_files)
def tokenizers(folder, file):
    from keras_sd.models.tokenizer import Tokenizer

    for name in [file.partition("/")[0]] if file else ("older", "newer"):
        tokenizer = Tokenizer.load(folder / name)
        tokenizer(["a red heart", "<cat> of Japan" * 9])
        tokenizer.decode(tokenizer.encode("red <cat>")[0])


@reader(lambda: {"a.txt": b"a (red:1.2) [cat] BREAK \\(x\\) <lora:a:1>\nand (dog:0.5)\nand 'more' of it"})
def prompts(folder, file):
    from keras_sd.files.image_files import parse_parameters
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.pipeline.prompts import parse_prompt

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
    images = {name: image_files()["b.jpg"] for name in ("a.jpg", "b.jpg", "c.jpg")}
    entries = [{"file_name": name, "text": f"a caption of {name}"} for name in images]
    settings = {"mode": "caption", "captioner": "a/b"}
    written = {"metadata": {"a.jpg": "0123456789abcdef", "b.jpg": None}, "txt": {"a.jpg": "0123456789abcdef"}}
    return images | {
        "metadata.jsonl": json_lines(*entries[:2]),
        "a.txt": b"a text\n",
        ".captions/settings.json": json_bytes(settings),
        ".captions/written.json": json_bytes(written | {"begun": {"metadata": {}, "txt": {"b.jpg": "01"}}}),
        ".captions/captions-0-of-2.jsonl": json_lines(*entries[:2]),
        ".captions/captions-1-of-2.jsonl": json_lines({"file_name": "c.jpg", "fault": "c.jpg: damaged"}),
        "introductions.jsonl": json_lines(*entries),
    }


@reader(_captioned)
def captions(folder, file):
    from keras_sd.captions.caption_settings import CaptionSettings, CleaningSettings
    from keras_sd.captions.dataset import CaptionedFolder

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
    image = image_files()["b.jpg"]
    entries = [{"file_name": name, "text": f"a {name}", "more": [1]} for name in ("a.jpg", "b.jpg")]
    return {
        "jsonl/a.jpg": image,
        "jsonl/b.jpg": image,
        "jsonl/metadata.jsonl": json_lines(*entries),
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

    folder = Path(temporary())
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
    if file is None or file.endswith("manifest.json"):
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
        "run.json": json_bytes(run),
        "logs/record.json": json_bytes({"evaluated": 4, "exported": 2}),
        "keras_sd.json": (EMOJI / "keras_sd.json").read_bytes(),
        "checkpoint-4/manifest.json": b"{}",
    }


@reader(_records)
def run_records(folder, file):
    from keras_sd.cli.export import read_run
    from keras_sd.pipeline.defaults import ModelDefaults
    from keras_sd.training.run_folder import RunRecord

    RunRecord(folder, 3).last("evaluated")
    defaults = ModelDefaults.load(folder)
    defaults.training("text-to-image")
    defaults.sampling["guidance_scale"] + 1
    read_run(folder / "checkpoint-4")
