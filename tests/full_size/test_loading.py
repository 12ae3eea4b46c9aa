"""Time and memory of opening Stable Diffusion 1.5 from a folder on disk, against diffusers.

Each side opens the same folder in processes of its own, in turns, with the files in the page cache, and reads
every weight once, since both map the weights. Ours is also timed without its cache of converted weights, and
when it writes that cache. What is measured goes to `benchmarks/loading.json`.
"""

import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import published

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "loading.json"
LIBRARIES = ("diffusers", "transformers", "torch", "keras", "tensorflow", "jax")
ROUNDS = 5

MAKE = """
import json, sys

sys.modules["tensorflow"] = None
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

folder, configs = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).save_pretrained(folder + "/text_encoder")
AutoencoderKL.from_config(configs["vae"]).save_pretrained(folder + "/vae")
UNet2DConditionModel.from_config(configs["unet"]).save_pretrained(folder + "/unet")
DDIMScheduler.from_config(configs["scheduler"]).save_pretrained(folder + "/scheduler")
"""

MEASURED = """
import json, sys, time

def peak_gigabytes():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
"""

DIFFUSERS = (
    MEASURED
    + """
sys.modules["tensorflow"] = None
from diffusers import StableDiffusionPipeline

start = time.perf_counter()
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, local_files_only=True)
opened = time.perf_counter() - start
for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
    sum(float(tensor.sum()) for tensor in part.state_dict().values())
seconds = time.perf_counter() - start
print(json.dumps({"opened_seconds": opened, "seconds": seconds, "peak_gigabytes": peak_gigabytes()}))
"""
)

OURS = (
    MEASURED
    + """
import concurrent.futures, os
import keras
import numpy as np
from keras_sd import backend
from keras_sd.pipeline.stable_diffusion import StableDiffusion

backend.keep_programs()  # TensorFlow can be told only before it starts

keras.ops.zeros(3)  # the backend starts
start = time.perf_counter()
model = StableDiffusion.load(sys.argv[1])
opened = time.perf_counter() - start
# On JAX by NumPy, as JAX would compile a sum for each shape; TensorFlow would copy for NumPy.
is_jax = keras.backend.backend() == "jax"
read = (lambda one: np.sum(keras.ops.convert_to_numpy(one))) if is_jax else keras.ops.sum
with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for part in (model.unet, model.vae, model.text_encoder):
        sum(map(float, threads.map(read, part.variables)))
seconds = time.perf_counter() - start
print(json.dumps({"opened_seconds": opened, "seconds": seconds, "peak_gigabytes": peak_gigabytes()}))
"""
)

SIDES = {
    "diffusers": (DIFFUSERS, {}),
    "keras_sd on TensorFlow": (OURS, {"KERAS_BACKEND": "tensorflow"}),
    "keras_sd on JAX": (OURS, {"KERAS_BACKEND": "jax"}),
}


def run(script, *arguments, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.models.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("full_size") / "model"
    configs = {
        "text_encoder": published.SD1_TEXT_ENCODER,
        "unet": published.SD1_UNET,
        "vae": published.SD1_VAE,
        "scheduler": SchedulerConfig().to_dict(),
    }
    run(MAKE, folder, json.dumps(configs))
    Tokenizer.clip().save(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_memory_is_that_of_diffusers(folder, tmp_path):
    runs = {side: [] for side in SIDES}
    others = {}
    for side, (script, variables) in SIDES.items():
        if script is OURS:
            for name, place in (("without the cache", "off"), ("writing the cache", tmp_path / side)):
                variables["KERAS_SD_CACHE"] = str(place)
                others[f"{side}, {name}"] = json.loads(run(script, folder, **variables))
    sizes = {side: _bytes_in(tmp_path / side) for side in SIDES if (tmp_path / side).is_dir()}
    for _ in range(ROUNDS):
        for side, (script, variables) in SIDES.items():
            runs[side].append(json.loads(run(script, folder, **variables)))
    medians = {
        side: {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        for side, measured in runs.items()
    }
    record = {
        "command": "make test-full ARGS=tests/full_size/test_loading.py",
        "date": datetime.date.today().isoformat(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "model": "sd-1.5, float32, random weights, 4.0 GiB in the page cache",
        "rounds": ROUNDS,
        "medians": medians,
        "once": others,
        "cache_bytes": sizes,
        "runs": runs,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    reference = medians.pop("diffusers")
    for side, measured in medians.items():
        assert measured["peak_gigabytes"] <= 1.2 * reference["peak_gigabytes"], side
        assert measured["seconds"] <= 1.2 * reference["seconds"], side


def _bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
