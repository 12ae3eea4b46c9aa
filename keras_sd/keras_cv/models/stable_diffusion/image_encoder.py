"""The VAE's encoder as a Keras model with KerasCV's interface."""

import keras

from keras_sd.keras_cv.models.stable_diffusion.parts import make_part


class Moments(keras.layers.Layer):
    """Images in [-1, 1] to the mean and the log variance of their latents, concatenated."""

    def __init__(self, vae, **kwargs):
        super().__init__(**kwargs)
        self.vae = vae
        self.built = True

    def call(self, images):
        posterior = self.vae.encode(images)
        return keras.ops.concatenate([posterior.mean, posterior.log_variance], axis=-1)

    def compute_output_spec(self, images):
        channels = 2 * self.vae.config.latent_channels
        return keras.KerasTensor((images.shape[0], None, None, channels), dtype="float32")


class ScaledMean(keras.layers.Layer):
    """Moments to the mean, scaled as the UNet's latents are."""

    def __init__(self, channels, scale, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.scale = channels, scale
        self.built = True

    def call(self, moments):
        return moments[..., : self.channels] * self.scale


class ImageEncoder(keras.Model):
    """Images in [-1, 1], `(n, h, w, 3)`, to scaled latents `(n, h / 8, w / 8, c)`.

    The output of the second-to-last layer, `layers[-2].output`, holds the unscaled means and log variances,
    from which tutorials sample latents.

    Args:
        download_weights: whether to load the published weights; otherwise they are random.
        model: the name of a model (preset, hub id, folder) with the VAE; by default SD 1.5.
        part: a `keras_sd.models.vae.AutoencoderKL` whose weights are shared.
    """

    def __init__(self, download_weights=True, model=None, part=None):
        vae = make_part("vae", model, ("sd-1.5", {}), download_weights) if part is None else part
        images = keras.layers.Input((None, None, vae.config.in_channels))
        moments = Moments(vae)(images)
        scaled = ScaledMean(vae.config.latent_channels, vae.config.scaling_factor)(moments)
        super().__init__(images, scaled)
