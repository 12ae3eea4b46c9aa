"""KerasCV's Stable Diffusion by its own names, so that a tutorial written for it runs here.

Change the line `import keras_cv` to `import keras_sd.keras_cv as keras_cv`. New code is better off with
`keras_sd.StableDiffusion`, which has more tasks, samplers and sizes.
"""

import secrets
from types import SimpleNamespace

import keras

from keras_sd import pipeline
from keras_sd.arguments import image_seeds
from keras_sd.diffusion.denoiser import NoiseStreams
from keras_sd.errors import UserError


class LatentDecoder(keras.Model):
    """Scaled latents `(n, h, w, c)` to pictures in [-1, 1], as KerasCV's `decoder`."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def call(self, latents):
        return self.vae.decode(latents / self.vae.config.scaling_factor)


class LatentEncoder(keras.Model):
    """Pictures in [-1, 1] to scaled latents `(n, h, w, c)`, as KerasCV's `image_encoder`."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def call(self, images):
        return self.vae.encode(images).mode() * self.vae.config.scaling_factor


class StableDiffusion:
    """Stable Diffusion 1.5 with the methods of `keras_cv.models.StableDiffusion`.

    Args:
        img_height, img_width: of the pictures, in pixels, multiples of 8.
        jit_compile: whether XLA compiles.
        model: a `keras_sd.StableDiffusion`, or what names one (preset, hub id, path), to use in place of the
            published one.

    The global Keras dtype policy says in which precision a named model computes.

    Attributes:
        tokenizer, text_encoder, diffusion_model, decoder, image_encoder: the parts by KerasCV's names;
            `image_encoder` is the VAE's encoder.
    """

    preset = "sd-1.5"

    def __init__(self, img_height=512, img_width=512, jit_compile=True, model=None):
        if not isinstance(model, pipeline.StableDiffusion):
            dtype = keras.config.dtype_policy().name
            model = pipeline.StableDiffusion.from_preset(
                model or self.preset, dtype=dtype, jit_compile=jit_compile
            )
        self.model = model
        self._latent_shape = model.latent_shape(img_height, img_width)
        self.img_height, self.img_width = img_height, img_width
        self.tokenizer, self.text_encoder = model.tokenizer, model.text_encoder
        self.diffusion_model = model.unet
        self.decoder, self.image_encoder = LatentDecoder(model.vae), LatentEncoder(model.vae)

    def encode_text(self, prompt):
        """Encodes one prompt, float32 tensor `(1, tokens, width)`."""
        return keras.ops.convert_to_tensor(self.model.encode_text([prompt]))

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        seed=None,
    ):
        """Makes `batch_size` pictures of a prompt: uint8 `(batch_size, img_height, img_width, 3)`."""
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
        """Makes pictures of an encoded text.

        Args:
            encoded_text: `(tokens, width)`, or `(batch_size, tokens, width)`.
            negative_prompt: a text.
            diffusion_noise: `(h, w, c)` or `(batch_size, h, w, c)` to begin with, in place of a seed's.
            seed: a whole number; by default another one at each call.

        Returns:
            uint8 `(batch_size, img_height, img_width, 3)`.

        Raises:
            UserError: both a noise and a seed are given, or an array does not fit `batch_size`.
        """
        if diffusion_noise is not None and seed is not None:
            raise UserError("diffusion_noise and seed: both given; give one of them")
        context = _batch("encoded_text", encoded_text, batch_size, rank=3)
        negative = self.model.encode_text([negative_prompt or ""]).repeat(batch_size, axis=0)
        if diffusion_noise is None:
            seed = secrets.randbits(32) if seed is None else seed
            diffusion_noise = NoiseStreams(image_seeds(seed, batch_size)).draw(self._latent_shape)
        latents = self.model.denoise(
            _batch("diffusion_noise", diffusion_noise, batch_size, rank=4),
            context,
            negative,
            num_steps=num_steps,
            guidance_scale=unconditional_guidance_scale,
        )
        return self.model.decode(latents)


class StableDiffusionV2(StableDiffusion):
    """Stable Diffusion 2.1 at 512 pixels with the methods of `keras_cv.models.StableDiffusionV2`."""

    preset = "sd-2.1-base"


models = SimpleNamespace(StableDiffusion=StableDiffusion, StableDiffusionV2=StableDiffusionV2)


def _batch(title, values, batch_size, rank):
    """The tensor as a float32 array with one entry for each picture."""
    values = keras.ops.convert_to_numpy(values).astype("float32")
    if values.ndim == rank - 1:
        values = values[None]
    if len(values) == 1:
        values = values.repeat(batch_size, axis=0)
    if values.ndim != rank or len(values) != batch_size:
        raise UserError(
            f"{title}: of shape {values.shape} for batch_size {batch_size}; give one for each picture"
        )
    return values
