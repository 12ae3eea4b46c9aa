"""The scale of a LoRA's updates from PEFT's config.

The config is `adapter_config.json` beside the weights, or the entry `lora_adapter_metadata` that diffusers
writes into a safetensors header. PEFT multiplies an update of rank r by alpha / r, and with rsLoRA
(Kalajdzievski, 2023) by alpha / sqrt(r); `rank_pattern` and `alpha_pattern` set other values for single
layers. Other options that change the result are not supported; they raise a UserError that names them.
"""

import math
import os
import re

from typing_extensions import TypedDict

from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json, read_json, shape_fault, shown
from keras_sd.weights.safetensors_files import read_metadata

ADAPTER_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"

# Fields of PEFT's LoraConfig that may change the result -> their values that do not.
_NEUTRAL = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    # Other initialisations move a part of the model's own weights into the update.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        [
            *("lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"),
            *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "target_parameters"),
            *("monteclora_config", "kasa_config", "velora_config"),
        ],
        (False, None, [], {}),
    ),
}


class _Shape(TypedDict, total=False):
    """The fields that determine the scale of the updates."""

    r: int | None
    lora_alpha: float | None
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None


_USUAL_RANK = _USUAL_ALPHA = 8  # PEFT's defaults
_LARGEST_ALPHA = 1e30
_LONGEST_PATTERN = 300
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_QUANTIFIERS = re.compile(r"[*+?{]\??")
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")
# Cost of a regular expression, as a power of two: a quantifier tries each position of a name, about 2^6.
_QUANTIFIER_COST = 6
_LARGEST_COST = 16


class LoraStrength:
    """The scales of a LoRA's updates.

    Args:
        config: the fields of PEFT's `LoraConfig`, as a dictionary.
        source: the config's name in messages.

    Attributes:
        use_dora: whether the updates are those of DoRA, which have a magnitude.

    Raises:
        UserError: a field is not supported or has a wrong type.
    """

    def __init__(self, config, source):
        self._source = source
        fault = shape_fault(config, _Shape)
        if fault:
            raise UserError(f"{source}: {fault}; fetch it again")
        for name, neutral in _NEUTRAL.items():
            if config.get(name) not in neutral:
                raise UserError(f"{source}: {name} {shown(config[name])} is not supported; use a plain LoRA")
        self._ranks = self._patterns("rank_pattern", config)
        self._alphas = self._patterns("alpha_pattern", config)
        rank, alpha = config.get("r"), self._checked("lora_alpha", config.get("lora_alpha"))
        self._rank = _USUAL_RANK if rank is None else rank
        self._alpha = _USUAL_ALPHA if alpha is None else alpha
        self._rank_stabilized = bool(config.get("use_rslora"))
        self.use_dora = bool(config.get("use_dora"))

    def alpha(self, layer, rank):
        """Return the alpha of a layer's update of this rank; alpha / rank is its scale.

        Raises:
            UserError: the config has another rank.
        """
        expected = _of_layer(self._ranks, layer, self._rank)
        if expected != rank:
            raise UserError(
                f"{self._source}: says rank {expected} for {layer}, whose update has {rank}; "
                "use the config that was written with the weights"
            )
        alpha = _of_layer(self._alphas, layer, self._alpha)
        return alpha * math.sqrt(rank) if self._rank_stabilized else float(alpha)

    def _checked(self, name, value):
        if value is not None and not abs(value) < _LARGEST_ALPHA:  # also true for NaN
            raise UserError(f"{self._source}: {name} {shown(value)} is not a usable number; fetch it again")
        return value

    def _patterns(self, name, config):
        """Return the compiled patterns of layers' names with their values, in order."""
        patterns = config.get(name) or {}
        return [
            (self._compiled(name, pattern), self._checked(name, value)) for pattern, value in patterns.items()
        ]

    def _compiled(self, name, pattern):
        """Compile a pattern for the end of a layer's name, as in PEFT; refuse one that could run forever."""
        try:
            if len(pattern) > _LONGEST_PATTERN or _could_hang(pattern):
                raise ValueError
            return re.compile(rf"(.*\.)?({pattern})$")
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{self._source}: {name} has {shown(pattern)}, too complex a pattern; write layers' names"
            ) from error


def _could_hang(pattern):
    """Return whether a regular expression may need too many attempts."""
    plain = _CLASS.sub("_", _ESCAPED.sub("_", pattern)).replace("(?", "(")
    choices = plain.count("|") if "(" in plain else 0  # without groups, alternatives only add up
    cost = choices + _QUANTIFIER_COST * len(_QUANTIFIERS.findall(plain))
    return cost > _LARGEST_COST or _QUANTIFIED_GROUP.search(plain) is not None


def _of_layer(patterns, layer, usual):
    return next((value for pattern, value in patterns if pattern.match(layer)), usual)


def read_strengths(path, parts):
    """Return the scales that the files of a LoRA specify.

    Args:
        path: the file of the weights.
        parts: the parts that updates may be for ("unet", "text_encoder").

    Returns:
        Part -> its `LoraStrength`, for the parts that have a config.

    Raises:
        UserError: the config is damaged, or asks for something unsupported.
    """
    beside = path.with_name(ADAPTER_CONFIG)
    if path.stem == "adapter_model" and os.path.lexists(beside):
        return dict.fromkeys(parts, LoraStrength(read_json(beside), beside))
    written = read_metadata(path).get(_METADATA) if path.suffix == ".safetensors" else None
    if written is None:
        return {}
    source = f"{path}: {_METADATA}"
    config = parse_json(written, source)
    if config.keys() & {*_Shape.__annotations__, *_NEUTRAL}:  # written for a single model
        return dict.fromkeys(parts, LoraStrength(config, source))
    configs = {part: {} for part in parts}
    for name, value in config.items():
        part, _, field = name.partition(".")
        own = {field: value} if field else value  # dotted names, or nested dictionaries
        if part not in configs or not isinstance(own, dict):
            raise UserError(
                f"{source}: {shown(name)} does not belong to {' or '.join(parts)}; "
                "use a LoRA that was made for this kind of model"
            )
        configs[part] |= own
    return {part: LoraStrength(own, source) for part, own in configs.items() if own}
