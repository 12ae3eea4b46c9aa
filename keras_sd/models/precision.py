"""Precision policies: the floating-point types of a model's weights and computations."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import keras

from keras_sd.config import Config
from keras_sd.errors import UserError

# "mixed" computes in half precision with weights in float32, as training needs.
POLICIES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


@contextlib.contextmanager
def dtype_policy(policy: Any) -> Iterator[None]:
    """Set the precision of the weights and of the computation of models that are built inside the block.

    Under every policy, the moments of normalisations, softmax and the features of timesteps are computed in
    float32, since half precision would lose too much. Models take and return float32.

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


class ConfiguredModel(keras.Model):
    """A model with the config of its part, which Keras can serialise."""

    config: Any
    config_class: ClassVar[type[Config]]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as JSON values; `config` is the dictionary of the part's `config.json`."""
        return super().get_config() | {"config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Return a new model, with random weights, from the dictionary of `get_config`."""
        options = {**config, "config": cls.config_class.from_dict(config["config"])}
        with dtype_policy(keras.dtype_policies.get(options.pop("dtype"))):
            return cls(**options)


class ComputedInFloat32(keras.DTypePolicy):
    """A policy with the weights' precision of the policy of that name, which computes in float32."""

    @property
    def compute_dtype(self):
        return "float32"
