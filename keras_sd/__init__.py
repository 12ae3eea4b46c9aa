"""Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA.

The names below are the public ones; each is imported when it is first used, so that `import keras_sd` waits
for no backend.
"""

import importlib

__version__ = "0.1.0"

# Where each public name is. `__init__.pyi` tells type checkers and editors the same.
_NAMES = {
    "captions": "CaptionSettings CleaningSettings caption_folder",
    "config": "ImageEncoderConfig TextEncoderConfig UNetConfig VAEConfig",
    "data.emoji.source": "load_emoji",
    "data.folders": "FolderSource",
    "data.sources": "EmojiSource batches evenly load_source",
    "diffusion.denoiser": "Denoiser NoiseStreams",
    "diffusion.guidance": "guided_prediction",
    "diffusion.prediction": "add_noise to_sample_and_noise",
    "diffusion.samplers": "SAMPLERS Method Sampler",
    "diffusion.scheduler_config": "SchedulerConfig",
    "diffusion.schedules": "NoiseSchedule",
    "errors": "UserError",
    "files.image_files": "image_grid read_parameters save_gif save_png",
    "metrics.clip_score": "clip_score",
    "metrics.features": "ClipFeatures InceptionFeatures extract",
    "metrics.kid": "KernelInceptionDistance kernel_inception_distance paired_kernel_inception_distance",
    "metrics.reconstruction": "peak_signal_to_noise_ratio",
    "models.image_encoder": "ImageEncoder",
    "models.pixels": "images_from_unit images_to_unit resized",
    "models.text_encoder": "TextEncoder",
    "models.tokenizer": "Tokenizer",
    "models.unet": "UNet",
    "models.vae": "AutoencoderKL",
    "pipeline.stable_diffusion": "StableDiffusion",
    "pipeline.upscaler": "Upscaler",
    "training.callbacks": "EMACallback",
    "training.encodings": "EncodedSource",
    "training.lora": "add_lora save_lora",
    "training.losses": "DiffusionObjective",
    "training.optimizer": "AdamW",
    "training.pixel_ddim": "sample_images",
    "training.settings": "Settings",
    "training.text_to_image": "train_text_to_image",
    "training.trainer": "Trainer",
    "weights.formats": "read_safetensors",
    "weights.loading": "load_part",
    "weights.readers": "read_checkpoint",
}
_MODULES = {name: f"keras_sd.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        from keras_sd.errors import UserError, missing_package

        instead = "set KERAS_BACKEND=jax where JAX is installed"
        raise UserError(missing_package("tensorflow", instead)) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
