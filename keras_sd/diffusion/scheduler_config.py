"""The noise schedule and the sampler's options, as the public ``scheduler_config.json`` holds them."""

import dataclasses
from typing import Any, ClassVar, Self

from keras_sd.config import Config, ConfigError
from keras_sd.diffusion.scheduler_options import OPTIONS
from keras_sd.files.json_files import shown

# The behaviour of scheduler classes of diffusers that do not have the option.
_WITHOUT_OPTION = {
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "set_alpha_to_one": True,
    "clip_sample": False,
}

_MOST_TIMESTEPS = 100_000

_KEPT = ("published", "repairs")  # fields of `SchedulerConfig` that are not keys of the file


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(Config):
    """The noise schedule (diffusers' ``scheduler_config.json``). Defaults: SD 1.x.

    ``published`` is the dictionary of the file that was read, and is written again; None for a config that
    was not read from a diffusers file. ``repairs`` are values that replace those of the file
    (`weights.old_models`).
    """

    json_header: ClassVar[dict] = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.35.0"}
    computed: ClassVar[dict] = {"_class_name": tuple(OPTIONS), "use_flow_sigmas": (False, None)}
    sizes: ClassVar[tuple] = ("num_train_timesteps",)

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    published: dict | None = dataclasses.field(default=None, compare=False, repr=False)
    repairs: dict | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_dict(cls, values: Any, repairs: dict[str, Any] | None = None) -> Self:
        """Build the config from a dictionary; a missing key has the default of the class in `_class_name`.

        Args:
            values: the dictionary of a `scheduler_config.json`.
            repairs: values that replace those of the dictionary.
        """
        cls._check_dictionary(values)
        for name in ("beta_start", "beta_end"):
            if values.get(name, 0) is None:
                raise cls._error(f"{name} None is no number")
        name = values.get("_class_name")
        defaults = OPTIONS.get(name if isinstance(name, str) else None)
        filled = values if defaults is None else _WITHOUT_OPTION | defaults | values
        filled = {key: value for key, value in (filled | (repairs or {})).items() if key not in _KEPT}
        config = super().from_dict(filled)
        betas = values.get("trained_betas")
        if betas is not None and not _are_betas(betas, config.num_train_timesteps):
            raise cls._error(f"trained_betas are no {config.num_train_timesteps} numbers from 0 to 1")
        if name is None:  # not a file of diffusers, whose classes would have other defaults
            published = None if betas is None else config.noise_schedule() | {"trained_betas": betas}
            return dataclasses.replace(config, published=published)
        return dataclasses.replace(config, published=dict(values), repairs=repairs)

    def to_dict(self, class_name: str = "DDIMScheduler") -> dict[str, Any]:
        """Return the JSON dictionary: the one that was read, with later changes.

        Args:
            class_name: the scheduler class, for a config that was not read from a file.
        """
        if self.published is None:
            return self.noise_schedule() | {"_class_name": class_name}
        read = self.from_dict(self.published, self.repairs)
        changed = {name: value for name, value in self._values().items() if value != getattr(read, name)}
        return self.published | changed

    def noise_schedule(self) -> dict[str, Any]:
        """Return a dictionary of all values, for a training checkpoint."""
        betas = {} if self.trained_betas is None else {"trained_betas": self.trained_betas}
        return self.json_header | self._values() | betas

    @property
    def trained_betas(self) -> list[float] | None:
        """The betas of all timesteps as a list, or None if they follow from `beta_schedule`."""
        return (self.published or {}).get("trained_betas")

    @property
    def class_name(self) -> str:
        """The scheduler class of diffusers in the file."""
        return (self.published or {}).get("_class_name") or self.json_header["_class_name"]

    def with_zero_terminal_snr(self) -> Self:
        """Return the config whose last timestep is noise alone, and where sampling starts there.

        That takes "trailing" timesteps (Lin et al., 2023, section 3.4). A scheduler class that has no such
        option, such as PNDM's, is replaced by DDIM's.
        """
        changes: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if self.published is None or "rescale_betas_zero_snr" in OPTIONS[self.class_name]:
            return dataclasses.replace(self, **changes)
        plain = dataclasses.replace(self, **changes, published=None, repairs=None)
        betas = self.trained_betas
        published = None if betas is None else plain.noise_schedule() | {"trained_betas": betas}
        return dataclasses.replace(plain, published=published)

    def options(self) -> dict[str, Any]:
        """Return the options for a scheduler of diffusers: the file's dictionary with the repairs."""
        return self.to_dict() | (self.repairs or {})

    def _values(self):
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _KEPT
        }

    def __post_init__(self):
        super().__post_init__()
        if self.num_train_timesteps > _MOST_TIMESTEPS:
            raise self._error(
                f"num_train_timesteps {shown(self.num_train_timesteps)} is more than {_MOST_TIMESTEPS}"
            )
        if not 0 <= self.beta_start <= self.beta_end <= 1 or not self.beta_end:
            raise self._error(
                f"beta_start {self.beta_start!r} and beta_end {self.beta_end!r} do not rise from 0 to 1"
            )
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"prediction_type {shown(self.prediction_type)}: unknown; use epsilon, v_prediction or sample"
            )


def _are_betas(values, count):
    """Return whether the values are a list of `count` valid betas."""
    is_list = isinstance(values, list | tuple) and len(values) == count
    return is_list and all(type(value) in (int, float) and 0 <= value < 1 for value in values)
