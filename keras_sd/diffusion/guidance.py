"""Classifier-free guidance (Ho and Salimans, 2022, equation 6), around the UNet's prediction."""

from collections.abc import Callable

from keras import ops

from keras_sd.arguments import Tensor, real_number

LARGEST_SCALE = 1e30  # float32 holds its product with a few more factors


def checked_guidance_scale(scale):
    """Return the guidance scale as a float.

    Raises:
        UserError: it is no number (None, NaN), negative, or too large for float32.
    """
    return real_number(
        "guidance_scale",
        scale,
        lambda number: 0 <= number < LARGEST_SCALE,
        "0 or more (up to 1: no guidance)",
    )


def gives_guidance(scale):
    """Return whether a scale means guidance; up to 1 there is none, as in diffusers and on model cards."""
    return scale > 1


def guided_prediction(
    unet: Callable,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor = None,
    negative: Tensor = None,
    scale: Tensor = None,
    rescale: Tensor = 0.0,
    class_labels: Tensor = None,
) -> Tensor:
    """Return the UNet's prediction with classifier-free guidance.

    The UNet is called once: on the doubled batch if there is a negative context, otherwise on the batch
    itself.

    Args:
        unet: called on `[latents, timesteps]` or `[latents, timesteps, context]`.
        latents: `(n, h, w, c)`, including additional input channels.
        timesteps: `(n,)`.
        context: text encodings `(n, tokens, width)`; None for an unconditional UNet.
        negative: encodings of the negative prompts, of the same shape, or None.
        scale: guidance scale, a scalar above 1 (`gives_guidance`).
        rescale: 0 to 1, how far the standard deviation of each guided prediction is set back to that of the
            prediction for `context`, as strong guidance enlarges it (Lin et al., 2023, equations 15 and 16).
        class_labels: `(n,)` for a UNet that takes them, or None.

    Returns:
        `(n, h, w, out)`.
    """

    def predict(latents, timesteps, contexts, labels):
        options = {} if labels is None else {"class_labels": labels}
        return unet([latents, timesteps, *contexts], **options)

    if negative is None:
        return predict(latents, timesteps, [] if context is None else [context], class_labels)

    def doubled(values):
        return None if values is None else ops.concatenate([values, values])

    contexts = [ops.concatenate([negative, context])]
    predictions = predict(doubled(latents), doubled(timesteps), contexts, doubled(class_labels))
    unconditional, conditional = ops.split(predictions, 2)
    guided = unconditional + scale * (conditional - unconditional)
    # A network whose last layer is still zero predicts a constant.
    enlarged = ops.maximum(_standard_deviation(guided), 1e-12)
    return guided * (1 + rescale * (_standard_deviation(conditional) / enlarged - 1))


def _standard_deviation(predictions):
    return ops.std(predictions, axis=(1, 2, 3), keepdims=True)
