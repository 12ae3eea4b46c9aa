"""Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA."""

from keras_sd.errors import UserError

__version__ = "0.1.0"
__all__ = ["StableDiffusion", "UserError", "__version__"]


def __getattr__(name):
    # Found when first used, so that the command line's help need not wait for a backend.
    if name == "StableDiffusion":
        from keras_sd.pipeline.stable_diffusion import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
