"""The UNet as a Keras model with KerasCV's inputs."""

import keras

from keras_sd.keras_cv.models.stable_diffusion.parts import load_h5, make_part

_SD2 = (
    "sd-2.1-base",
    {
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
)


class DiffusionModel(keras.Model):
    """The UNet of Stable Diffusion 1.x, which predicts the noise in latents.

    Called on `[latent (n, h, w, c), timestep_embedding (n, 320), context (n, tokens, width)]`, or a
    dictionary of these; returns `(n, h, w, c)`. The embedding is the cosines and then the sines of the
    timestep at frequencies that fall from 1 to 1/10000, as KerasCV's tutorials compute it.

    Args:
        img_height, img_width, max_text_length: as in KerasCV; the model accepts any size.
        name: of the model.
        download_weights: whether to load the published weights; otherwise they are random.
        model: the name of a model (preset, hub id, folder) with the UNet; by default the published one.
        part: a `keras_sd.models.unet.UNet` whose weights are shared.
    """

    published = ("sd-1.5", {})

    def __init__(
        self,
        img_height=512,
        img_width=512,
        max_text_length=77,
        name=None,
        download_weights=True,
        model=None,
        part=None,
    ):
        if part is None:
            part = make_part("unet", model, self.published, download_weights)
        super().__init__(name=name, autocast=False, dtype=part.dtype_policy)
        self.img_height, self.img_width, self.max_text_length = img_height, img_width, max_text_length
        self.unet = part
        self.built = True

    def call(self, inputs):
        if isinstance(inputs, dict):
            inputs = [inputs[name] for name in ("latent", "timestep_embedding", "context")]
        return self.unet(list(inputs))

    def load_weights(self, filepath, *arguments, **options):
        """Load weights as every Keras model does, and KerasCV's H5 files."""
        if not load_h5("unet", self.unet, filepath):
            super().load_weights(filepath, *arguments, **options)


class DiffusionModelV2(DiffusionModel):
    """`DiffusionModel` of Stable Diffusion 2.1."""

    published = _SD2
