"""What loads Keras: whole models, LoRAs, the log of a training run."""

import json
import shutil
from pathlib import Path

import numpy as np

from tests.robustness.reader import json_bytes, json_lines, reader, safetensors_bytes, temporary


def _tiny_model():
    from tests import tiny

    folder = Path(temporary())
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
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.models.tokenizer import Tokenizer
    from keras_sd.pipeline.defaults import ModelDefaults
    from keras_sd.weights import readers, rules
    from keras_sd.weights.loading import _contents

    ModelDefaults.load(folder)
    checkpoint = readers.read_checkpoint(folder)
    for name, part in checkpoint.parts.items():
        rules.check_tensors(*_contents(name, part), part.source)
    SchedulerConfig.from_dict(checkpoint.scheduler)
    if checkpoint.tokenizer is not None:
        Tokenizer.load(checkpoint.tokenizer)


@reader(_tiny_model, loads_keras=True, share=0.2)
def opened_models(folder, file):
    from keras_sd.pipeline.stable_diffusion import StableDiffusion

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
    lokr = {"lokr_w1": np.ones((2, 2), "float32"), "lokr_w2_a": up[:4], "lokr_w2_b": down[:, :4]}
    lokr |= {"dora_scale": np.ones((8, 1), "float32"), "alpha": np.array(1.0, "float32")}
    return {
        "lokr.safetensors": safetensors_bytes(
            {f"{kohya_name}.{role}": array for role, array in lokr.items()}
        ),
        "kohya.safetensors": safetensors_bytes({**kohya, f"{kohya_name}.alpha": np.array(1.0, "float32")}),
        "diffusers.safetensors": safetensors_bytes(peft, {"lora_adapter_metadata": json.dumps(written)}),
        "peft/adapter_config.json": json_bytes(config),
        "peft/adapter_model.safetensors": safetensors_bytes(
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
    for name in (
        "kohya.safetensors",
        "lokr.safetensors",
        "diffusers.safetensors",
        "peft/adapter_model.safetensors",
    ):
        read_lora(folder / name, {"unet": _unet})


_unet = None


@reader(
    lambda: {
        "logs/metrics.jsonl": json_lines(*({"step": step, "time": 1.5, "loss": 0.1} for step in range(1, 6)))
    },
    True,
)
def metrics_logs(folder, file):
    from keras_sd.training.logs import MetricsLog

    MetricsLog(folder, initial_step=3).flush()
    for path in (folder / "logs").glob("events.*"):
        path.unlink()
