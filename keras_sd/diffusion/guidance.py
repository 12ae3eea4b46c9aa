"""Classifier-free guidance (Ho and Salimans, 2022): a wrapper of the denoiser."""

from keras import ops


def guided_prediction(unet, latents, timesteps, context=None, negative=None, scale=None):
    """The UNet's prediction, pushed away from what the negative context asks for.

    Without a negative context the UNet is called once on the batch, with one on the doubled batch.

    Args:
        unet: called on `[latents, timesteps]` or `[latents, timesteps, context]`.
        latents: `(n, h, w, c)`.
        timesteps: `(n,)`.
        context: text encodings `(n, tokens, width)`; None for an unconditional UNet.
        negative: encodings of the negative prompts, of the same shape, or None.
        scale: guidance scale, a scalar; 1 gives the prediction for `context` alone.

    Returns:
        `(n, h, w, out)`.
    """
    if context is None:
        return unet([latents, timesteps])
    if negative is None:
        return unet([latents, timesteps, context])

    def doubled(values):
        return ops.concatenate([values, values])

    predictions = unet([doubled(latents), doubled(timesteps), ops.concatenate([negative, context])])
    unconditional, conditional = ops.split(predictions, 2)
    return unconditional + scale * (conditional - unconditional)
