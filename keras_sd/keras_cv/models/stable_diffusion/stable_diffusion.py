"""The models `StableDiffusion` and `StableDiffusionV2` of KerasCV."""

import secrets
from operator import attrgetter

import keras
import numpy as np

from keras_sd.arguments import image_seeds, whole_number
from keras_sd.diffusion.denoiser import NoiseStreams
from keras_sd.errors import UserError
from keras_sd.keras_cv.models.stable_diffusion.clip_tokenizer import SimpleTokenizer
from keras_sd.keras_cv.models.stable_diffusion.decoder import Decoder
from keras_sd.keras_cv.models.stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from keras_sd.keras_cv.models.stable_diffusion.image_encoder import ImageEncoder
from keras_sd.keras_cv.models.stable_diffusion.text_encoder import TextEncoder, TextEncoderV2
from keras_sd.models.pixels import images_from_unit
from keras_sd.pipeline.stable_diffusion import StableDiffusion as Model

MAX_PROMPT_LENGTH = 77


class StableDiffusion:
    """Stable Diffusion 1.5 with the methods of `keras_cv.models.StableDiffusion`.

    Args:
        img_height, img_width: of the images, in pixels, multiples of 8.
        jit_compile: whether XLA compiles.
        model: a `keras_sd.StableDiffusion`, or the name of one (preset, hub id, path), instead of the
            published model.

    A named model has the precision of Keras' global dtype policy.

    The parts share their weights with `model`, so training one changes the other. As in tutorials, parts can
    be replaced by assignment (`_text_encoder`, `_diffusion_model`, `_decoder`); the new part is then used.

    Use one object from one thread at a time, as its parts can be replaced.

    Attributes:
        model: the `keras_sd.StableDiffusion`.
        tokenizer: a `SimpleTokenizer`.
        text_encoder, diffusion_model, decoder, image_encoder: the parts by KerasCV's names; `image_encoder`
            is the VAE's encoder.
    """

    preset = "sd-1.5"
    _text_encoder_class, _diffusion_model_class = TextEncoder, DiffusionModel

    def __init__(self, img_height=512, img_width=512, jit_compile=True, model=None):
        if not isinstance(model, Model):
            dtype = keras.config.dtype_policy().name
            model = Model.from_preset(model or self.preset, dtype=dtype, jit_compile=jit_compile)
        self.model = model
        self._latent_shape = model.latent_shape(img_height, img_width)
        self.img_height, self.img_width, self.jit_compile = img_height, img_width, jit_compile
        size, length = (img_height, img_width), model.tokenizer.max_length
        self._tokenizer = SimpleTokenizer(tokenizer=model.tokenizer)
        self._text_encoder = self._text_encoder_class(length, part=model.text_encoder)
        self._diffusion_model = self._diffusion_model_class(*size, length, part=model.unet)
        self._decoder, self._image_encoder = Decoder(*size, part=model.vae), ImageEncoder(part=model.vae)
        self._own = {"text_encoder": self._text_encoder, "unet": model.unet, "decoder": self._decoder}

    tokenizer = property(attrgetter("_tokenizer"), doc="The `SimpleTokenizer`; tokens can be added to it.")
    text_encoder = property(attrgetter("_text_encoder"), doc="The `TextEncoder`, or its replacement.")
    diffusion_model = property(
        attrgetter("_diffusion_model"), doc="The `DiffusionModel`, or its replacement."
    )
    decoder = property(attrgetter("_decoder"), doc="The `Decoder`, or its replacement.")
    image_encoder = property(attrgetter("_image_encoder"), doc="The `ImageEncoder`.")

    def encode_text(self, prompt):
        """Encode one prompt, float32 tensor `(1, tokens, width)`.

        Raises:
            UserError: the prompt is too long. This can only happen with a changed text encoder or tokenizer.
        """
        if self._text_encoder is self._own["text_encoder"] and self._tokenizer.inner is self.model.tokenizer:
            return keras.ops.convert_to_tensor(self.model.encode_text([prompt]))
        ids, length = self._tokenizer.encode(prompt), self._tokenizer.inner.max_length
        if len(ids) > length:
            raise UserError(f"prompt {prompt[:60]!r}: {len(ids)} tokens where {length} fit; shorten it")
        ids += [self._tokenizer.inner.pad_token_id] * (length - len(ids))
        tokens, positions = np.array([ids], "int32"), np.arange(length, dtype="int32")[None]
        context = self._text_encoder.predict_on_batch({"tokens": tokens, "positions": positions})
        return keras.ops.convert_to_tensor(context, "float32")

    def _generating_model(self):
        """Return the `keras_sd.StableDiffusion` with the UNet of `diffusion_model`."""
        unet = getattr(self._diffusion_model, "unet", None)
        if unet is None:
            raise UserError(
                f"diffusion_model: a {type(self._diffusion_model).__name__}, not a DiffusionModel of this "
                "package; make it with keras_sd.keras_cv"
            )
        if unet is not self._own["unet"]:
            ours = self.model
            parts = (ours.tokenizer, ours.text_encoder, unet, ours.vae, ours.scheduler_config)
            self.model = Model(*parts, jit_compile=self.jit_compile)
            self._own["unet"] = unet
        return self.model

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        seed=None,
    ):
        """Make `batch_size` images of a prompt: uint8 `(batch_size, img_height, img_width, 3)`."""
        return self.generate_image(
            self.encode_text(prompt),
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            num_steps=num_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            seed=seed,
        )

    def generate_image(
        self,
        encoded_text,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
    ):
        """Make images of an encoded text.

        Args:
            encoded_text: `(tokens, width)`, or `(batch_size, tokens, width)`.
            negative_prompt: a text.
            diffusion_noise: initial noise `(h, w, c)` or `(batch_size, h, w, c)`, instead of a seed.
            seed: a whole number; by default a random one at each call.

        Returns:
            uint8 `(batch_size, img_height, img_width, 3)`.

        Raises:
            UserError: both noise and seed are given, or an array does not fit `batch_size`.
        """
        if diffusion_noise is not None and seed is not None:
            raise UserError("diffusion_noise and seed: both given; give one of them")
        batch_size = whole_number("batch_size", batch_size, 1)
        context = _batch("encoded_text", encoded_text, batch_size, rank=3)
        negative = _batch("negative_prompt", self.encode_text(negative_prompt or ""), batch_size, rank=3)
        if diffusion_noise is None:
            seed = secrets.randbits(32) if seed is None else seed
            diffusion_noise = NoiseStreams(image_seeds(seed, batch_size)).draw(self._latent_shape)
        latents = self._generating_model().denoise(
            _batch("diffusion_noise", diffusion_noise, batch_size, rank=4),
            context,
            negative,
            num_inference_steps=num_steps,
            guidance_scale=unconditional_guidance_scale,
            sampler="ddim",
        )
        if self._decoder is self._own["decoder"]:
            return self.model.decode(latents)
        return images_from_unit(keras.ops.convert_to_numpy(self._decoder.predict_on_batch(latents)))


class StableDiffusionV2(StableDiffusion):
    """Stable Diffusion 2.1 at 512 pixels with the methods of `keras_cv.models.StableDiffusionV2`."""

    preset = "sd-2.1-base"
    _text_encoder_class, _diffusion_model_class = TextEncoderV2, DiffusionModelV2


def _batch(title, values, batch_size, rank):
    """Return the tensor as a float32 array with one entry for each image."""
    values = keras.ops.convert_to_numpy(values).astype("float32")
    if values.ndim == rank - 1:
        values = values[None]
    if len(values) == 1:
        values = values.repeat(batch_size, axis=0)
    if values.ndim != rank or len(values) != batch_size:
        raise UserError(
            f"{title}: of shape {values.shape} for batch_size {batch_size}; give one for each image"
        )
    return values
