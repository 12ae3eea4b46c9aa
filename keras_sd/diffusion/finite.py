"""Stops NaN and infinity before they become an image, as a black one or noise.

One reduction checks the inputs and one the result. The cause is looked for only when a check fails.
"""

import numpy as np
from keras import ops

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths

# With a larger guidance scale the latents may grow from step to step.
_LARGEST_USUAL_GUIDANCE = 30.0


def is_finite(values):
    """Return whether all numbers of a tensor are finite; True for None."""
    return values is None or bool(np.isfinite(ops.convert_to_numpy(values)).all())


def check_inputs(inputs):
    """Check that the inputs of a computation are finite.

    Args:
        inputs: dictionary of title -> tensor or None.

    Raises:
        UserError: a tensor holds NaN or infinity; the message names it.
    """
    for title, values in inputs.items():
        if not is_finite(values):
            raise UserError(
                f"{title}: holds NaN or infinity, so no image can be made; look for damaged weights or "
                "embeddings, or take float32 in place of float16"
            )


def check_result(values, model, title, *, guidance_scale=None):
    """Check that a result is finite.

    Args:
        values: the result of a model's computation, a tensor.
        model: the Keras model that computed it; its weights are searched for the cause.
        title: the model's name in messages.
        guidance_scale: the guidance scale, if any.

    Raises:
        UserError: the result holds NaN or infinity; the message names the likely cause.
    """
    if is_finite(values):
        return
    what = f"{title}: computed NaN or infinity, so no image can be made"
    weights = ((each.name, each.variable) for each in parameter_paths(model))
    damaged = next((name for name, weight in weights if not is_finite(ops.cast(weight, "float32"))), None)
    if damaged is not None:
        raise UserError(f"{what}; its weight {damaged} is not finite: load undamaged weights")
    if model.compute_dtype == "float16":
        raise UserError(f"{what}; float16 overflows; use bfloat16 or float32")
    if guidance_scale is not None and guidance_scale > _LARGEST_USUAL_GUIDANCE:
        raise UserError(f"{what}; guidance_scale {guidance_scale:g} is large; use less")
    raise UserError(
        f"{what}; likely causes are a LoRA that is too strong, or another model's schedule or prediction_type"
    )
