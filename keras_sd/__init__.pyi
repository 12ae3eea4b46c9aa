"""The public names, for type checkers and editors; `__init__.py` imports them when they are used."""

from keras_sd.captions import CaptionSettings as CaptionSettings
from keras_sd.captions import CleaningSettings as CleaningSettings
from keras_sd.captions import caption_folder as caption_folder
from keras_sd.config import ImageEncoderConfig as ImageEncoderConfig
from keras_sd.config import TextEncoderConfig as TextEncoderConfig
from keras_sd.config import UNetConfig as UNetConfig
from keras_sd.config import VAEConfig as VAEConfig
from keras_sd.data.emoji.source import load_emoji as load_emoji
from keras_sd.data.folders import FolderSource as FolderSource
from keras_sd.data.sources import EmojiSource as EmojiSource
from keras_sd.data.sources import batches as batches
from keras_sd.data.sources import evenly as evenly
from keras_sd.data.sources import load_source as load_source
from keras_sd.diffusion.denoiser import Denoiser as Denoiser
from keras_sd.diffusion.denoiser import NoiseStreams as NoiseStreams
from keras_sd.diffusion.guidance import guided_prediction as guided_prediction
from keras_sd.diffusion.prediction import add_noise as add_noise
from keras_sd.diffusion.prediction import to_sample_and_noise as to_sample_and_noise
from keras_sd.diffusion.samplers import SAMPLERS as SAMPLERS
from keras_sd.diffusion.samplers import Method as Method
from keras_sd.diffusion.samplers import Sampler as Sampler
from keras_sd.diffusion.scheduler_config import SchedulerConfig as SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule as NoiseSchedule
from keras_sd.errors import UserError as UserError
from keras_sd.files.image_files import image_grid as image_grid
from keras_sd.files.image_files import read_parameters as read_parameters
from keras_sd.files.image_files import save_gif as save_gif
from keras_sd.files.image_files import save_png as save_png
from keras_sd.metrics.clip_score import clip_score as clip_score
from keras_sd.metrics.features import ClipFeatures as ClipFeatures
from keras_sd.metrics.features import InceptionFeatures as InceptionFeatures
from keras_sd.metrics.features import extract as extract
from keras_sd.metrics.kid import KernelInceptionDistance as KernelInceptionDistance
from keras_sd.metrics.kid import kernel_inception_distance as kernel_inception_distance
from keras_sd.metrics.kid import paired_kernel_inception_distance as paired_kernel_inception_distance
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio as peak_signal_to_noise_ratio
from keras_sd.models.image_encoder import ImageEncoder as ImageEncoder
from keras_sd.models.pixels import images_from_unit as images_from_unit
from keras_sd.models.pixels import images_to_unit as images_to_unit
from keras_sd.models.pixels import resized as resized
from keras_sd.models.text_encoder import TextEncoder as TextEncoder
from keras_sd.models.tokenizer import Tokenizer as Tokenizer
from keras_sd.models.unet import UNet as UNet
from keras_sd.models.vae import AutoencoderKL as AutoencoderKL
from keras_sd.pipeline.stable_diffusion import StableDiffusion as StableDiffusion
from keras_sd.pipeline.upscaler import Upscaler as Upscaler
from keras_sd.training.callbacks import EMACallback as EMACallback
from keras_sd.training.encodings import EncodedSource as EncodedSource
from keras_sd.training.lora import add_lora as add_lora
from keras_sd.training.lora import save_lora as save_lora
from keras_sd.training.losses import DiffusionObjective as DiffusionObjective
from keras_sd.training.optimizer import AdamW as AdamW
from keras_sd.training.pixel_ddim import sample_images as sample_images
from keras_sd.training.settings import Settings as Settings
from keras_sd.training.text_to_image import train_text_to_image as train_text_to_image
from keras_sd.training.trainer import Trainer as Trainer
from keras_sd.weights.formats import read_safetensors as read_safetensors
from keras_sd.weights.loading import load_part as load_part
from keras_sd.weights.readers import read_checkpoint as read_checkpoint

__version__: str
__all__ = [
    "__version__",
    "AdamW",
    "AutoencoderKL",
    "CaptionSettings",
    "CleaningSettings",
    "ClipFeatures",
    "Denoiser",
    "DiffusionObjective",
    "EMACallback",
    "EmojiSource",
    "EncodedSource",
    "FolderSource",
    "ImageEncoder",
    "ImageEncoderConfig",
    "InceptionFeatures",
    "KernelInceptionDistance",
    "Method",
    "NoiseSchedule",
    "NoiseStreams",
    "SAMPLERS",
    "Sampler",
    "SchedulerConfig",
    "Settings",
    "StableDiffusion",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "Trainer",
    "UNet",
    "UNetConfig",
    "Upscaler",
    "UserError",
    "VAEConfig",
    "add_lora",
    "add_noise",
    "batches",
    "caption_folder",
    "clip_score",
    "evenly",
    "extract",
    "guided_prediction",
    "image_grid",
    "images_from_unit",
    "images_to_unit",
    "kernel_inception_distance",
    "load_emoji",
    "load_part",
    "load_source",
    "paired_kernel_inception_distance",
    "peak_signal_to_noise_ratio",
    "read_checkpoint",
    "read_parameters",
    "read_safetensors",
    "resized",
    "sample_images",
    "save_gif",
    "save_lora",
    "save_png",
    "to_sample_and_noise",
    "train_text_to_image",
]
