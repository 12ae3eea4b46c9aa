"""In which floating-point type a model keeps its weights and computes."""

import contextlib

import keras

from keras_sd.errors import UserError

# "mixed" computes in half precision with weights in float32, as training needs.
POLICIES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


@contextlib.contextmanager
def dtype_policy(policy):
    """Makes models built inside it keep their weights, and compute, in a precision.

    What a half precision would spoil is computed in float32 under every policy: the moments of
    normalisations, softmax, the features of timesteps. Models take and return float32.

    Args:
        policy: one of `POLICIES`, or a `keras.DTypePolicy`.

    Raises:
        UserError: the name is unknown.
    """
    if not isinstance(policy, keras.DTypePolicy) and policy not in POLICIES:
        raise UserError(f"precision {policy!r}: unknown; use {', '.join(POLICIES)}")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


class _InFloat32(keras.DTypePolicy):
    """Keeps weights as the policy of that name does, and computes in float32."""

    @property
    def compute_dtype(self):
        return "float32"


def in_float32(policy):
    """The policy that keeps weights as `policy` does and computes in float32."""
    return _InFloat32(policy.name)
