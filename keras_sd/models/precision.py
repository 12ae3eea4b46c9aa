"""Precision policies: the floating-point types of a model's weights and computations."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import keras

from keras_sd.arguments import shown
from keras_sd.config import Config, ConfigError
from keras_sd.errors import UserError

# "mixed" computes in half precision with weights in float32, as training needs.
POLICIES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


LOADED = POLICIES[:3]
"""The policies that are documented for loading a model."""


def check_dtype(dtype: Any) -> None:
    """Check the precision of a model before it is read.

    Raises:
        UserError: it is unknown.
    """
    if not isinstance(dtype, keras.DTypePolicy) and not (isinstance(dtype, str) and dtype in POLICIES):
        raise UserError(f"dtype {shown(dtype)}: unknown; use {', '.join(LOADED[:-1])} or {LOADED[-1]}")


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
    check_dtype(policy)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


class ConfiguredModel(keras.Model):
    """A model with the config of its part, which Keras can serialise, save and copy.

    Args:
        config: of the class `config_class`.
        options: as `keras.Model` takes them.

    Raises:
        ConfigError: the config is of another class.
    """

    config: Any
    config_class: ClassVar[type[Config]]

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(**options)
        self.config = self.config_class.checked(config)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as JSON values; `config` is the dictionary of the part's `config.json`."""
        return super().get_config() | {"config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Return a new model, with random weights, from the dictionary of `get_config`."""
        if not isinstance(config, dict) or not config.keys() >= {"config", "dtype"}:
            raise ConfigError(f"{cls.__name__} {shown(config)}: no config in it; give that of `get_config`")
        options = {**config, "config": cls.config_class.from_dict(config["config"])}
        with dtype_policy(keras.dtype_policies.get(options.pop("dtype"))):
            return cls(**options)


@keras.saving.register_keras_serializable("keras_sd")
class ComputedInFloat32(keras.DTypePolicy):
    """A policy with the weights' precision of the policy of that name, which computes in float32."""

    @property
    def compute_dtype(self):
        return "float32"
