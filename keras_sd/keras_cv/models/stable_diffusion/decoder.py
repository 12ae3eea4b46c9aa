"""The VAE's decoder as a Keras model with KerasCV's interface."""

import keras

from keras_sd.keras_cv.models.stable_diffusion.parts import make_part


class Decoder(keras.Model):
    """Scaled latents `(n, h, w, c)` to images in about [-1, 1].

    Args:
        img_height, img_width: as in KerasCV; the model accepts any size.
        name: of the model.
        download_weights: whether to load the published weights; otherwise they are random.
        model: the name of a model (preset, hub id, folder) with the VAE; by default SD 1.5.
        part: a `keras_sd.models.vae.AutoencoderKL` whose weights are shared.
    """

    def __init__(
        self, img_height=512, img_width=512, name=None, download_weights=True, model=None, part=None
    ):
        super().__init__(name=name)
        self.img_height, self.img_width = img_height, img_width
        self.vae = make_part("vae", model, ("sd-1.5", {}), download_weights) if part is None else part

    def call(self, latents):
        return self.vae.decode(latents / self.vae.config.scaling_factor)
