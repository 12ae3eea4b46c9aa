"""Default values of sampling and training, which depend on the model.

A model whose defaults differ from the usual ones names them in `keras_sd.json` in its folder, a file that
diffusers ignores and that `save` writes again::

    {"sampling": {"num_inference_steps": 20, "guidance_scale": 5.0, "guidance_rescale": 0.7,
                  "upscaler": "emoji-upscaler"},
     "training": {"lora": {"learning_rate": 0.001, "train_batch_size": 64}}}

The sampler is that of `scheduler_config.json`. This module imports no backend, so that commands can use it
before they load one.
"""

import warnings
from pathlib import Path

from keras_sd import presets
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, shown
from keras_sd.files.writing import write_json
from keras_sd.weights.diffusers_folder import holds_pixel_upscaler

FILE = "keras_sd.json"
_LARGEST_NUMBER = 2**31

SAMPLING = {"num_inference_steps": 30, "guidance_scale": 7.5, "guidance_rescale": 0.0, "upscaler": ""}
"""The usual values of sampling: those of Stable Diffusion 1 and 2, which have no upscaler of their own."""

UPSCALING = SAMPLING | {"num_inference_steps": 10}
"""Those of an upscaler that works on pixels."""

# Least and largest value, where they are not those of the other numbers.
_RANGES = {"num_inference_steps": (1, _LARGEST_NUMBER), "guidance_rescale": (0, 1)}

_COLUMNS = "learning_rate train_batch_size lr_scheduler lr_warmup_steps max_train_steps ema_decay adam_beta2"
# The usual values of each method, for a model of Stable Diffusion 1's size, from diffusers' scripts and
# documentation and from the methods' papers. A variant of a method follows a comma.
_USUAL = {
    "text-to-image": (1e-5, 16, "constant", 100, 1000, 0.9999, 0.999),
    "text-to-image, from scratch": (1e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
    "lora": (1e-4, 4, "cosine", 100, 1000, 0.999, 0.999),
    "lcm": (1e-4, 16, "constant", 0, 1000, 0.95, 0.999),
    "dreambooth": (5e-6, 1, "constant", 0, 400, 0.99, 0.999),
    "dreambooth, lora": (1e-4, 1, "constant", 0, 500, 0.99, 0.999),
    "textual-inversion": (5e-4, 4, "constant", 0, 3000, 0.99, 0.999),
    "vae": (1e-5, 4, "constant", 100, 3000, 0.9999, 0.999),
    "vae, from scratch": (1e-4, 8, "constant", 1000, 100_000, 0.9999, 0.999),
    "clip": (5e-4, 256, "cosine", 2000, 30_000, 0.9999, 0.98),
    "ddim": (2e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
    "super-resolution": (1e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
}


def usual(method, variant=None):
    """Return option -> usual value of a training method, or of a variant such as "lora" of "dreambooth"."""
    row = _USUAL.get(f"{method}, {variant}", _USUAL[method])
    return dict(zip(_COLUMNS.split(), row, strict=True)) | {"guidance_scale": SAMPLING["guidance_scale"]}


class ModelDefaults:
    """The default values of one model.

    Args:
        values: the dictionary in its `keras_sd.json`; None for the usual values.
        source: the file, for messages.
        usual_sampling: option -> value of what the file's section "sampling" does not name.

    Attributes:
        sampling: option -> value of `num_inference_steps`, `guidance_scale`, `guidance_rescale`, and the
            preset `upscaler` that fits the model's images ("" for none).

    Raises:
        UserError: a section, a method or an option is unknown, or a value has another type.

    Example:
        ```python
        sd.defaults = ModelDefaults({"sampling": {"guidance_scale": 4.0, "num_inference_steps": 20}})
        sd.save("my-model")
        ```
    """

    def __init__(self, values=None, source=FILE, usual_sampling=SAMPLING):
        self.values = {} if values is None else values
        self._source = source
        self._check_names(self.values, ("sampling", "training"))
        own = self.values.get("sampling", {})
        self._check(own, SAMPLING)
        self.sampling = usual_sampling | own
        if self.sampling["upscaler"] not in ("", *presets.PRESETS):
            raise UserError(f"{source}: upscaler {shown(own['upscaler'])} is no preset; mend the file")
        training = self.values.get("training", {})
        self._check_names(training, _USUAL)
        for method, options in training.items():
            self._check(options, usual(method.partition(",")[0]))

    @classmethod
    def load(cls, source):
        """Read the defaults of a model's folder; without the file they are the usual ones.

        Raises:
            UserError: the file is damaged.
        """
        path = Path(source) / FILE
        values = read_json(path, default=None, remedy="mend or remove the file")
        usual_sampling = UPSCALING if holds_pixel_upscaler(source) else SAMPLING
        return cls(usual_sampling=usual_sampling) if values is None else cls(values, path, usual_sampling)

    def filled(self, options):
        """Return options of sampling, name -> value, with this model's default in place of each None."""
        usual = self.sampling
        return {name: usual.get(name) if value is None else value for name, value in options.items()}

    def training(self, method, variant=None):
        """Return option -> default of a training method: this model's own, otherwise the usual one."""
        own = self.values.get("training", {})
        guidance = {"guidance_scale": self.sampling["guidance_scale"]}
        return usual(method, variant) | guidance | own.get(method, {}) | own.get(f"{method}, {variant}", {})

    def save(self, folder):
        """Write `keras_sd.json` into a model's folder, if the model has values of its own."""
        if self.values:
            write_json(Path(folder) / FILE, self.values)

    def warn_of_loss(self, path):
        """Warn that a single file has no place for values of the model's own, if it has any."""
        sampling = [f"{name} {shown(value)}" for name, value in self.values.get("sampling", {}).items()]
        lost = sampling + ["those of training"] * bool(self.values.get("training"))
        if lost:
            message = f"{path}: a single file has no place for the model's own defaults: {', '.join(lost)}"
            warnings.warn(f"{message}; give them as options, or keep the folder too", stacklevel=3)

    def _check_names(self, given, known):
        if not isinstance(given, dict):
            raise UserError(f"{self._source}: {shown(given)} is no object; mend or remove the file")
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise UserError(
                f"{self._source}: {shown(unknown[0])} is unknown; use {', '.join(known)}, or remove it"
            )

    def _check(self, given, known):
        self._check_names(given, known)
        for name, value in given.items():
            kind = type(known[name])
            accepted = (int, float) if kind is float else kind
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise UserError(f"{self._source}: {name} {shown(value)} is no {kind.__name__}; mend the file")
            least, largest = _RANGES.get(name, (0, _LARGEST_NUMBER))
            if kind is not str and not least <= value <= largest:
                remedy = (
                    f"give {least} or more" if largest == _LARGEST_NUMBER else f"give {least} to {largest}"
                )
                raise UserError(f"{self._source}: {name} is out of range; {remedy}")
