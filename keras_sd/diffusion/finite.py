"""Keeps numbers that are not finite from becoming images, where they would be black, or noise.

One reduction over what goes in and one over what comes out; only where that fails is looked for the cause.
"""

import numpy as np
from keras import ops

from keras_sd.errors import UserError
from keras_sd.models.parameters import parameter_paths

# Beyond it numbers may grow from step to step.
_LARGEST_USUAL_GUIDANCE = 30.0


def is_finite(values):
    """Return whether all of a tensor's numbers are finite; None, which stands for no tensor, is."""
    return values is None or bool(np.isfinite(ops.convert_to_numpy(values)).all())


def check_inputs(inputs):
    """Refuse tensors with numbers that are not finite before anything is made of them.

    Args:
        inputs: title -> tensor or None.

    Raises:
        UserError: one is not finite; the line names it.
    """
    for title, values in inputs.items():
        if not is_finite(values):
            raise UserError(
                f"{title}: NaN or infinity in it, of which no image can be made; look for damaged weights or "
                "embeddings, or take float32 in place of float16"
            )


def check_result(values, model, title, *, guidance_scale=None):
    """Refuse a result with numbers that are not finite.

    Args:
        values: what a model's computation ended in.
        model: the Keras model that made it, in which the cause is looked for.
        title: what a message calls the model.
        guidance_scale: the guidance that it was made with, if there was any.

    Raises:
        UserError: the result is not finite; the line names the likely cause.
    """
    if is_finite(values):
        return
    what = f"{title}: computed NaN or infinity, of which no image can be made"
    weights = ((each.name, each.variable) for each in parameter_paths(model))
    damaged = next((name for name, weight in weights if not is_finite(ops.cast(weight, "float32"))), None)
    if damaged is not None:
        raise UserError(f"{what}; its weight {damaged} is not finite: load undamaged weights")
    if model.compute_dtype == "float16":
        raise UserError(f"{what}; float16 overflows: take bfloat16 or float32")
    if guidance_scale is not None and guidance_scale > _LARGEST_USUAL_GUIDANCE:
        raise UserError(f"{what}; guidance_scale {guidance_scale:g} is large: take less")
    raise UserError(
        f"{what}; likely causes are a LoRA that is too strong, and a schedule or a prediction_type "
        "of another model"
    )
